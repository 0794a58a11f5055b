"""Which tokens are trained, proved from the rendering of the model's own chat template.

    full   <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n
    head   <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n        = the prompt that generation sees
    trained                                                          ^^^^^^^^^^^^^^^^

`boundaries` says where an answer begins and ends, and `conservation` that nothing of the row is missing. The ids are
those of one tokenisation of the full text. Checked for each row, and not taken from marks in the template:

  * each turn, its end included, stands in the whole conversation as it stands when it is the last (templates that
    delete earlier `<think>` break this: one sample for each trained turn);
  * the token behind the answer is one that generation stops on;
  * a token that crosses the start is trained, and the sample is flagged "straddle"; where the head alone would be
    tokenised otherwise than it is in the sample, the sample is flagged "prompt_differs".
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from sftjax.data import boundaries, conservation, thoughts
from sftjax.data.boundaries import Ending, Finder, Turn
from sftjax.data.places import Encoded
from sftjax.data.rendering import MARK, Renderer, holds_mark
from sftjax.data.sandbox import TemplateError, TemplateLimit
from sftjax.data.tokenizer import Tokenizer
from sftjax.data.types import RowError
from sftjax.errors import DataError

MAX_PREFIX_RENDERINGS = 2_000  # messages of a conversation, for templates that are rendered prefix by prefix


class Span(NamedTuple):
    """Where a trained turn stands: its characters begin at `start`, and its last token, which stops, at `stop`."""

    start: int
    stop: int
    end: int
    weight: float


@dataclass(frozen=True)
class Rendered:
    """Text of one sample with its trained spans; `hidden` is `text` with the data's control tokens hidden.

    A completion behind a plain prompt (no template) has no spans, and the length of its prompt. `lost` are lines for
    a person on parts of the row that the text lacks.
    """

    text: str
    hidden: str
    spans: tuple[Span, ...]
    flags: tuple[str, ...] = ()
    prompt_length: int | None = None
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class Policy:
    """What a run wants of rendering.

    Attributes:
      on_mask_error: what becomes of a conversation whose history the template rewrites: "unroll" (one sample for each
        trained turn), "drop" (RowError) or "raise" (DataError).
      allow_lost: parts of trained answers (`conservation.PARTS`) that a template may leave out.
      close_thoughts: whether a thought that the generation prompt opens, and the message lacks, is closed at once.
    """

    on_mask_error: str = "unroll"
    allow_lost: Collection[str] = field(default=())
    close_thoughts: bool = False


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    weights: Sequence[float],
    *,
    tools: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    policy: Policy = Policy(),
) -> list[Rendered]:
    """Renders a conversation into the texts to train on.

    Args:
      messages: as the template gets them.
      weights: one number for each message; 0 = not trained.
      tools: JSON schemas, or None.
      kwargs: further variables for the template.
      policy: see there.

    Raises:
      RowError: the conversation can't be used.
    """
    tokenizer.require_template()
    try:
        return _Conversation(tokenizer, messages, weights, tools, kwargs, policy).samples()
    except TemplateLimit as error:
        raise RowError("template_limit", str(error)) from None
    except TemplateError as error:
        raise RowError("template_refused", f"the chat template refuses the conversation: {error}") from None


class _Part(NamedTuple):
    """A sample of the first `length` messages: its text, control tokens hidden and (None: not yet known) as they are,
    and the turns trained in it."""

    text: str
    turns: Sequence[Turn]
    length: int
    flags: tuple[str, ...] = ()
    own: str | None = None


class _Conversation:
    """A conversation on its way to samples."""

    def __init__(self, tokenizer: Tokenizer, messages, weights, tools, kwargs, policy: Policy):
        self.tokenizer, self.weights, self.policy = tokenizer, weights, policy
        self.renderer: Renderer = tokenizer.tools_renderer if tools else tokenizer.renderer
        self.ending: Ending = tokenizer.tools_ending if tools else tokenizer.ending
        self.messages, self.tools, self.kwargs = messages, tools, kwargs
        self.hidden, touched, joined = _hide(tokenizer, messages)
        self.marked = joined is None or MARK in joined  # maybe
        self.may_think = joined is None or thoughts.may_have({"content": joined})
        self.hidden_tools, self.hidden_kwargs, also = tools, kwargs, False
        if tools or kwargs:
            self.marked = True
            self.hidden_tools, also = _map_strings(tools, tokenizer.hide_control_tokens)
            self.hidden_kwargs, more = _map_strings(kwargs, tokenizer.hide_control_tokens)
            also |= more
        self.touched = touched or also

    def samples(self) -> list[Rendered]:
        turns = tuple(k for k, weight in enumerate(self.weights) if weight)
        parts = self._by_pieces(turns) or self._by_prefixes(turns)
        return [self._rendered(part) for part in parts]

    # --- from one rendering ---

    def _by_pieces(self, turns: Sequence[int]) -> list[_Part] | None:
        """The same as by prefixes, from one rendering, for templates that provably only append. None: not sure."""
        if not self.renderer.append_only or not turns or turns[0] == 0:
            return None
        if self.marked and any(map(holds_mark, (self.hidden, self.hidden_tools, self.hidden_kwargs))):
            return None
        pieces = self.renderer.pieces(self.hidden, tools=self.hidden_tools, kwargs=self.hidden_kwargs)
        if pieces is None:
            return None
        text, prompt, ends, found = pieces.text, pieces.prompt, pieces.ends, []
        for k in turns:
            i = k - pieces.first
            if i < 0:
                return None
            head = pieces.begin if i == 0 else ends[i - 1]
            begin, end = head + len(prompt), ends[i]
            if begin > end or not text.startswith(prompt, head):
                return None  # the other way finds what stands for it, or words the reason
            stop = self.ending.find(text, begin, end)
            if stop is None or (self.may_think and not _has_its_thought(text, begin, stop[1], self.hidden[k])):
                return None
            found.append(Turn(k, text, begin, *stop, False))
        own = self.tokenizer.unhide_control_tokens(text) if self.touched else text
        if self.touched and own != self.renderer.render(self.messages, tools=self.tools, kwargs=self.kwargs):
            raise _acted_upon()
        return [_Part(text, found, len(self.messages), (), own)]

    # --- from the rendering of every prefix ---

    def _by_prefixes(self, turns: Sequence[int]) -> list[_Part]:
        count = len(self.messages)
        if count > MAX_PREFIX_RENDERINGS:
            raise RowError(
                "too_many_turns", f"{count:,} messages; this template can take {MAX_PREFIX_RENDERINGS:,} at most"
            )
        finder = self._finder(self.hidden, self.hidden_tools, check=self.touched)
        finder.render(count)  # first: if the template refuses the whole, that is the reason
        found = tuple(finder.turn(k) for k in turns)
        whole = found[-1].text if found and found[-1].number == count - 1 else finder.render(count)
        alike = len(found) == 1 or not any(turn.built for turn in found)
        if alike and all(whole.startswith(turn.text[: turn.end]) for turn in found):
            return [_Part(whole, found, count, found[0].flags if len(found) == 1 else ())]
        if len(found) > 1 and self.policy.on_mask_error != "unroll":
            detail = (
                "the chat template rewrites earlier turns, so one rendering can't hold them all as generation saw them"
            )
            if self.policy.on_mask_error == "raise":
                raise DataError(f"{detail}; set data.on_mask_error to 'unroll' for one sample a turn")
            raise RowError("history_rewritten", detail)
        return [_Part(turn.text, (turn,), turn.number + 1, ("unrolled", *turn.flags)) for turn in found]

    def _finder(self, messages, tools, *, check: bool = False) -> Finder:
        """Finds turns of these messages. With `check`, each rendering is compared with that of the data's own text."""

        kept: dict[tuple, str] = {}

        def render(length: int, *, generation: bool = False, variables=None, answer_only: bool = False) -> str:
            key = (length, generation, answer_only, *(variables or {}).items())
            if key not in kept:
                kept[key] = render_anew(length, generation, variables, answer_only)
            return kept[key]

        def render_anew(length: int, generation: bool, variables, answer_only: bool) -> str:
            text = self._render(messages[:length], tools, self.hidden_kwargs, generation, variables, answer_only)
            if check:
                own = self._render(self.messages[:length], self.tools, self.kwargs, generation, variables, answer_only)
                if self.tokenizer.unhide_control_tokens(text) != own:
                    raise _acted_upon()
            return text

        return Finder(
            render,
            messages,
            self.ending,
            switches=[name for name in self.renderer.switches if name not in (self.kwargs or ())],
            close_thoughts=self.policy.close_thoughts,
        )

    def _render(self, messages, tools, kwargs, generation, variables, answer_only) -> str:
        if answer_only:
            messages = [*messages[:-1], thoughts.without(messages[-1])]
        return self.renderer.render(
            messages, tools=tools, generation=generation, kwargs={**(kwargs or {}), **(variables or {})}
        )

    # --- to samples ---

    def _rendered(self, part: _Part) -> Rendered:
        text, flags, lost = part.own, part.flags, self._lost(part)
        spans = tuple([Span(turn.begin, turn.stop, turn.end, self.weights[turn.number]) for turn in part.turns])
        if text is None:
            text = self.tokenizer.unhide_control_tokens(part.text) if self.touched else part.text
        if self.touched and text != part.text:
            flags = (*flags, "control_text")
        if not lost:
            return Rendered(text, part.text, spans, flags)
        flags += tuple(dict.fromkeys(one.flag for one in lost))
        return Rendered(text, part.text, spans, flags, lost=tuple(f"{one.flag}: {one.detail}" for one in lost))

    def _lost(self, part: _Part) -> Sequence[conservation.Lost]:
        messages, turns = self.hidden[: part.length], {turn.number: turn for turn in part.turns}
        if not self.tools and conservation.plainly_there(part.text, turns, messages, self.renderer.literals):
            return ()

        def rerender(messages, tools) -> str:
            if any(turn.built for turn in part.turns):
                return self._finder(messages, tools).turn(part.turns[0].number).text
            return self.renderer.render(messages, tools=tools, kwargs=self.hidden_kwargs)

        return conservation.check(
            part.text,
            {number: conservation.Stretch(turn.begin, turn.end) for number, turn in turns.items()},
            messages,
            self.hidden_tools,
            literals=self.renderer.literals,
            rerender=rerender,
            allow=self.policy.allow_lost,
        )


def _has_its_thought(text: str, begin: int, end: int, message) -> bool:
    thought = thoughts.split(message)[0] if thoughts.may_have(message) else ""
    return not thought or boundaries.holds(text, thought, begin, end)


def _acted_upon() -> RowError:
    return RowError("control_text", "the text spells a control token in a place where the chat template acts on it")


# --- control tokens in data --------------------------------------------------------------------------------------


def _map_strings(value, function) -> tuple[Any, bool]:
    """`value` with `function` on every string in it, keys too, and whether that changed any."""
    if isinstance(value, str):
        new = function(value)
        return new, new is not value and new != value
    if isinstance(value, Mapping):
        keys = [_map_strings(key, function) for key in value]
        items = [_map_strings(item, function) for item in value.values()]
        changed = any(flag for _, flag in (*keys, *items))
        return ({key: item for (key, _), (item, _) in zip(keys, items, strict=True)} if changed else value), changed
    if isinstance(value, (list, tuple)):
        results = [_map_strings(item, function) for item in value]
        changed = any(flag for _, flag in results)
        return ([item for item, _ in results] if changed else value), changed
    return value, False


def _hide(tokenizer: Tokenizer, messages) -> tuple[list, bool, str | None]:
    """The messages with control tokens hidden, whether there are any, and their texts joined (None: not only texts)."""
    values = [value for message in messages for value in message.values()]
    joined = "".join(values) if set(map(type, values)) == {str} else None
    if joined is not None and not tokenizer.control_text.possible(joined):
        return list(messages), False, joined  # nearly all rows
    results, touched = [], False
    for message in messages:
        answer = message["role"] == "assistant"
        hide = functools.partial(tokenizer.hide_control_tokens, answer=answer)
        found = {key: _map_strings(value, hide) for key, value in message.items()}
        touched |= any(changed for _, changed in found.values())
        results.append({key: value for key, (value, _) in found.items()})
    return results, touched, joined


# --- from characters to tokens -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masked:
    """Weights of one sample, and the prompts to compare: (first token, token behind) of each head's last stretch."""

    weights: np.ndarray
    flags: tuple[str, ...]
    heads: tuple[tuple[int, int, str, str], ...]


def mask(tokenizer: Tokenizer, rendered: Rendered, encoded: Encoded) -> Masked:
    """Trained spans in tokens.

    Returns the weights, and for each span the stretch of the prompt in front of it that begins at the last control
    token: (number of its first token, number behind its last, text, hidden text). Control tokens cut the tokenizer's
    work into independent stretches, so the prompt alone is tokenised alike if this stretch alone is.
    """
    weights = np.zeros(len(encoded.ids), np.float32)
    controls = np.flatnonzero(tokenizer.is_control[encoded.ids])
    firsts = first_tokens(encoded, [span.start for span in rendered.spans])
    begins = encoded.starts[firsts[firsts < len(encoded.ids)]].tolist()  # behind the last token: an error below
    stops = np.array([span.stop for span in rendered.spans], np.int32)
    lasts = encoded.ends.searchsorted(stops, side="right").tolist()
    control_starts, firsts, controls = encoded.starts[controls].tolist(), firsts.tolist(), controls.tolist()
    straddle, heads = False, []
    for i, (span, first, end) in enumerate(zip(rendered.spans, firsts, lasts, strict=True)):
        if end >= len(encoded.ids) or not tokenizer.is_turn_end[encoded.ids[end]] or end < first:
            name = rendered.text[span.stop : span.end]
            raise RowError("no_end_of_turn", f"the tokenizer doesn't read {name!r} behind an answer as one stop token")
        weights[first : end + 1] = span.weight
        straddle |= begins[i] < span.start
        last = bisect_left(controls, first) - 1
        begin, at = (controls[last], control_starts[last]) if last >= 0 else (0, 0)
        heads.append((begin, first, rendered.text[at : span.start], rendered.hidden[at : span.start]))
    flags = (*rendered.flags, *(("straddle",) if straddle else ()))
    return Masked(weights, flags, tuple(heads))


def first_tokens(encoded: Encoded, starts: Sequence[int]) -> np.ndarray:
    """For each of some characters, the first token that has text at or behind it, or stands there without text.

    text     a s s i s t a n t \\n | Y e s          start = |
    tokens   [   assistant   ][\\n][ Yes ]          -> Yes
    tokens   [   assistant   ][ \\n   Yes ]          -> the last, which straddles
    """
    wanted = np.array(starts, np.int32)  # of the array's own type: another would be converted for each search
    firsts = encoded.ends.searchsorted(wanted, side="right")
    if len(encoded.ids) and not encoded.no_blanks:
        while (made_up := (firsts > 0) & (encoded.starts[firsts - 1] >= wanted)).any():  # SentencePiece's prefix blank
            firsts -= made_up
    return firsts
