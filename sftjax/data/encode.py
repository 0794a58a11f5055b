"""From a row of a file to training samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from sftjax.data import conservation, formats, masks, rendered, shapes, templates
from sftjax.data.conversations import Conversation
from sftjax.data.formats import Text, Tokens
from sftjax.data.tokenizer import Tokenizer
from sftjax.data.types import RowError, Sample
from sftjax.errors import ConfigError

VERSION = 2  # raised when the same row would give other samples, so that nothing stale is used
# Why a conversation may be refused in one shape and taken in another; what says more about the row has a higher number.
_ASK_AGAIN = {
    "template_refused": 0,
    "lost_answer": 1,
    "prompt_not_prefix": 2,
    "lost_reasoning": 2,
    "lost_tool_call": 2,
}
_SHORT_HEAD = 200  # characters; shorter stretches of prompts repeat from row to row, and are kept
_MAX_KEPT_HEADS = 4096


class RowEncoder:
    """Encodes rows. Picklable; the same row always gives the same samples.

    Args:
      tokenizer: with its template.
      format: a key of `formats.PARSERS`, or "auto" (by the row's keys).
      fields: names of the format's keys -> names in the rows.
      train_on: "all" assistant turns, the "last" only, or "weights" (rows must say it by `train` or `weight` fields).
        Those fields are honoured in every mode.
      system: system text for conversations that have none.
      fold_system: write the system text in front of the first user message, for templates that refuse a system role.
      on_mask_error, allow_lost, close_thoughts: see `masks.Policy`.
      control_text: what becomes of text that spells a control token: "plain" (encoded as text, and flagged) or
        "error" (RowError).
      template_kwargs: further variables for the template, such as {"enable_thinking": False}.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        format: str = "auto",
        fields: Mapping[str, str] | None = None,
        train_on: str = "all",
        system: str | None = None,
        fold_system: bool = False,
        on_mask_error: str = "unroll",
        control_text: str = "plain",
        template_kwargs: Mapping[str, object] | None = None,
        allow_lost: Sequence[str] = (),
        close_thoughts: bool = False,
    ):
        if unknown := sorted(set(fields or {}) - formats.FIELDS):
            raise ConfigError(
                f"fields: no format has a field {unknown[0]!r}; known are {', '.join(sorted(formats.FIELDS))}"
            )
        for name, value, choices in (
            ("train_on", train_on, ("all", "last", "weights")),
            ("on_mask_error", on_mask_error, ("unroll", "drop", "raise")),
            ("control_text", control_text, ("plain", "error")),
            ("format", format, ("auto", *formats.PARSERS)),
        ):
            if value not in choices:
                raise ConfigError(f"data.{name}={value!r} is not one of {', '.join(choices)}")
        if unknown := [part for part in allow_lost if part not in conservation.PARTS]:
            raise ConfigError(f"data.allow_lost: {unknown[0]!r} is not one of {', '.join(conservation.PARTS)}")
        self.tokenizer = tokenizer
        self.format, self.fields = format, dict(fields or {})
        self.train_on, self.system, self.fold_system = train_on, system, fold_system
        self.policy = masks.Policy(on_mask_error, tuple(allow_lost), close_thoughts)
        self.control_text = control_text
        self.template_kwargs = dict(template_kwargs or {})
        self._heads: dict[tuple[str, str], bytes] = {}

    def __getstate__(self):
        return {**{key: value for key, value in self.__dict__.items() if key != "_reader"}, "_heads": {}}

    def __call__(self, row: Mapping, index: int = 0, source: int = 0) -> list[Sample]:
        """Samples of one row. Raises RowError when it gives none."""
        (result,) = self.encode_batch([row], [index], source)
        if isinstance(result, RowError):
            raise result
        return result

    def encode_batch(
        self, rows: Sequence[Mapping], indices: Sequence[int] | None = None, source: int = 0
    ) -> list[list[Sample] | RowError]:
        """The same for many rows at once, which is faster; a row's error is returned in its place."""
        indices = range(len(rows)) if indices is None else indices
        pending = [self._prepare(row) for row in rows]
        texts = [part for parts in pending if not isinstance(parts, RowError) for part in parts]
        texts = [part for part in texts if isinstance(part, masks.Rendered)]
        encodings = iter(self.tokenizer.encode_mixed([t.text for t in texts], [t.hidden for t in texts]))
        drafts = []
        for parts in pending:
            if isinstance(parts, RowError):
                drafts.append(parts)
                continue
            pairs = [(part, next(encodings) if isinstance(part, masks.Rendered) else None) for part in parts]
            try:
                drafts.append([self._draft(part, encoded) for part, encoded in pairs])
            except RowError as error:
                drafts.append(error)
        self._compare_prompts([draft for row in drafts if not isinstance(row, RowError) for draft in row])
        results = []
        for drafts_of_row, index in zip(drafts, indices, strict=True):
            if isinstance(drafts_of_row, RowError):
                results.append(drafts_of_row)
            else:
                results.append([draft.sample(source, index, i) for i, draft in enumerate(drafts_of_row)])
        return results

    def fingerprint(self) -> str:
        """Hex digest of everything that decides a row's samples: tokenizer, template, format and policy."""
        policy = {key: value for key, value in self.__dict__.items() if key not in ("tokenizer", "_heads", "_reader")}
        text = json.dumps([VERSION, self.tokenizer.fingerprint(), policy], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def examples(self, row: Mapping) -> list[formats.Example]:
        """What a row holds. Raises RowError."""
        found = list(formats.parse(row, self.format, self.fields))
        if self.format != "rendered":
            return found
        return [self._reader.read(one) if isinstance(one, Text) else one for one in found]

    @cached_property
    def _reader(self) -> rendered.Reader:
        return rendered.Reader(self.tokenizer)

    # --- rows to texts -------------------------------------------------------------------------------------------

    def _prepare(self, row) -> list | RowError:
        try:
            examples = self.examples(row)
            parts = [_noted(part, example.notes) for example in examples for part in self._render(example)]
        except RowError as error:
            return error
        return parts or RowError("nothing_trained", "no sample came of it")

    def _render(self, example) -> list:
        if isinstance(example, Tokens):
            return [example]
        if isinstance(example, Text):
            return [self._render_text(example)]
        messages, weights = self._turns(example)
        if taken := [name for name in example.kwargs if name in self._taken]:
            raise RowError("reserved_variable", f"chat_template_kwargs sets {taken[0]!r}, which no row can set")
        kwargs = {**self.template_kwargs, **example.kwargs}
        options = {"tools": example.tools, "kwargs": kwargs, "policy": self.policy}
        parts = self._render_in_some_shape(messages, weights, options)
        if self.control_text == "error" and any("control_text" in part.flags for part in parts):
            raise RowError("control_text", "the text spells a control token")
        return parts

    def _render_in_some_shape(self, messages, weights, options) -> list[masks.Rendered]:
        """As the row has it; where the template fails on that or loses part of it, in another shape for the same."""
        try:
            return masks.render(self.tokenizer, messages, weights, **options)
        except RowError as error:
            refused = error
        for other in shapes.others(messages) if refused.reason in _ASK_AGAIN else ():
            if refused.reason not in _ASK_AGAIN:
                break
            try:
                return masks.render(self.tokenizer, other, weights, **options)
            except RowError as error:
                if _ASK_AGAIN.get(error.reason, 2) > _ASK_AGAIN[refused.reason]:
                    refused = error
        raise refused

    @property
    def _taken(self) -> tuple[str, ...]:
        """Variables of a template that no row can set."""
        renderer = self.tokenizer.renderer
        return (*templates.RESERVED, *(renderer.special_tokens if renderer else ()))

    def _turns(self, example: Conversation) -> tuple[list[dict], list[float]]:
        """Messages and weights after this encoder's policy."""
        messages, weights = list(example.messages), list(example.weights)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise RowError("no_assistant_turn", "the conversation has no assistant message, so nothing to train on")
        if self.train_on == "weights" and not example.weighted:
            raise RowError("no_weights", "train_on is 'weights', and no message has a `train` or `weight` field")
        if self.train_on == "last":
            weights = [weight if i == answers[-1] else 0.0 for i, weight in enumerate(weights)]
        if not any(weights):
            raise RowError("nothing_trained", "all assistant messages have weight 0")
        for i in answers:
            message = messages[i]
            empty = not message.get("content", "").strip() and not message.get("reasoning_content", "").strip()
            if weights[i] and empty and "tool_calls" not in message:
                raise RowError("empty_answer", f"message {i} is an empty assistant turn")
        if self.system and messages[0]["role"] not in ("system", "developer"):
            messages, weights = [{"role": "system", "content": self.system}, *messages], [0.0, *weights]
        if (
            self.fold_system
            and messages[0]["role"] in ("system", "developer")
            and len(messages) > 1
            and messages[1]["role"] == "user"
        ):
            content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            messages, weights = [{**messages[1], "content": content}, *messages[2:]], weights[1:]
        return messages, weights

    def _render_text(self, example: Text) -> masks.Rendered:
        tokenizer = self.tokenizer
        if tokenizer.eos_id is None:
            raise ConfigError("the tokenizer has no EOS token, and texts and completions end with it: set eos_token")
        text = example.prompt + example.completion
        hidden = text
        if not example.raw:
            hidden = "".join(map(tokenizer.hide_control_tokens, (example.prompt, example.completion)))
        flags = ("control_text",) if hidden != text else ()
        if flags and self.control_text == "error":
            raise RowError("control_text", "the text spells a control token")
        return masks.Rendered(text, hidden, (), flags, prompt_length=len(example.prompt))

    # --- texts to samples ----------------------------------------------------------------------------------------

    def _draft(self, part, encoded) -> _Draft:
        tokenizer = self.tokenizer
        if isinstance(part, Tokens):
            if (problem := tokenizer.no_row(part.ids)) is not None:
                raise RowError("bad_ids", problem)
            return _Draft(part.ids, part.weights.copy(), part.notes, ())
        if part.prompt_length is not None:
            return self._draft_text(part, encoded)
        self._check_rows(encoded.ids)
        masked = masks.mask(tokenizer, part, encoded)
        return _Draft(encoded.ids, masked.weights, masked.flags, masked.heads, part.lost)

    def _draft_text(self, part: masks.Rendered, encoded) -> _Draft:
        """A text with EOS behind it, and in front only what the tokenizer adds by itself."""
        tokenizer, flags, prompt_length = self.tokenizer, list(part.flags), part.prompt_length
        before, behind = list(tokenizer.prefix_ids), list(tokenizer.suffix_ids)
        if not behind or behind[-1] != tokenizer.eos_id:
            behind.append(tokenizer.eos_id)
        if before and encoded.ids[: len(before)].tolist() == before:  # raw text brings its own
            before = []
        if (ends := np.flatnonzero(tokenizer.is_turn_end[encoded.ids])).size:
            behind = behind if part.text[encoded.ends[ends[-1]] :].strip() else []
        first, heads = 0, ()
        if prompt_length:
            first = int(masks.first_tokens(encoded, [prompt_length])[0])
            if first == len(encoded.ids):
                raise RowError("empty_answer", "the tokenizer leaves nothing of the completion")
            if encoded.starts[first] < prompt_length:
                flags.append("straddle")
            heads = ((0, first, part.text[:prompt_length], part.hidden[:prompt_length]),)
        ids = np.concatenate([np.array(before, np.int32), encoded.ids, np.array(behind, np.int32)])
        self._check_rows(ids)
        weights = np.ones(len(ids), np.float32)
        weights[: len(before) + first] = 0
        heads = tuple((a + len(before), b + len(before), text, hidden) for a, b, text, hidden in heads)
        return _Draft(ids, weights, tuple(flags), heads)

    def _check_rows(self, ids: np.ndarray) -> None:
        fits = self.tokenizer.rows == self.tokenizer.vocab_size  # as nearly always
        if not fits and (problem := self.tokenizer.no_row(ids)) is not None:
            raise RowError("no_embedding_row", problem)

    def _compare_prompts(self, drafts: Sequence[_Draft]) -> None:
        """Flags the samples whose prompt generation would tokenise otherwise."""
        wanted = dict.fromkeys(
            (text, hidden)
            for draft in drafts
            for _, _, text, hidden in draft.heads
            if (text, hidden) not in self._heads
        )
        wanted = list(wanted)
        ids = self.tokenizer.encode_ids([text for text, _ in wanted], [hidden for _, hidden in wanted])
        found = {key: np.asarray(alone, np.int32).tobytes() for key, alone in zip(wanted, ids, strict=True)}
        for draft in drafts:
            for begin, first, text, hidden in draft.heads:
                alone = found[text, hidden] if (text, hidden) in found else self._heads[text, hidden]
                if alone != draft.tokens[begin:first].tobytes():
                    draft.flags = (*draft.flags, "prompt_differs")
                    break
        for key, alone in found.items():
            if len(key[0]) <= _SHORT_HEAD and len(self._heads) < _MAX_KEPT_HEADS:
                self._heads[key] = alone


def encoder_of(
    source: Sequence[Mapping],
    tokenizer: Tokenizer,
    *,
    format: str = "auto",
    fields: Mapping[str, str] | None = None,
    **policy,
) -> RowEncoder:
    """The encoder of a source's rows: where they are a chat template's own text already, one that reads them back.

    Args:
      format, fields, policy: see `RowEncoder`.
    """
    format = rendered.recognised(source, tokenizer, format, fields)
    return RowEncoder(tokenizer, format=format, fields=fields, **policy)


def _noted(part: Tokens | masks.Rendered, notes: tuple[str, ...]) -> Tokens | masks.Rendered:
    """Notes on the row join the sample's flags."""
    return replace(part, flags=(*part.flags, *notes)) if notes and isinstance(part, masks.Rendered) else part


class _Draft:
    """A sample before its prompts have been compared."""

    def __init__(self, tokens: np.ndarray, weights: np.ndarray, flags: tuple[str, ...], heads: tuple, lost: tuple = ()):
        self.tokens, self.weights, self.flags, self.heads, self.lost = tokens, weights, flags, heads, lost

    def sample(self, source: int, index: int, number: int) -> Sample:
        self.weights[0] = 0  # nothing stands before it
        return Sample(self.tokens, self.weights, source, index, number, self.flags, self.lost)
