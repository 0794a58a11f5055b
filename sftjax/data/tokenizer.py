"""The tokenizer of a model folder, with what training needs beside it: stop tokens, template, plain encoding.

Text from a data set may spell a control token (`<|im_end|>` in an article on chat models). As text it must stay text:
otherwise a row can close its own turn, or open another's. So there are two encoders: the tokenizer itself, for what
the template writes, and a copy that has no control tokens, for what the data says. `Tokenizer.encode_mixed` joins them:
control tokens of the template cut the text into stretches that are encoded independently, as the tokenizer does by
itself, and a stretch in which the data spells a control token goes through the copy.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tokenizers import Tokenizer as Backend
from tokenizers.models import Unigram

from sftjax.data import boundaries, lookalikes, places, plain, templates, thoughts, tokenizer_export, tokenizer_files
from sftjax.data.boundaries import Ending
from sftjax.data.control import HTML_TAG, ControlText
from sftjax.data.rendering import Renderer
from sftjax.data.sandbox import TemplateError
from sftjax.data.templates import Template
from sftjax.data.words import WordEncoder
from sftjax.errors import ConfigError

_ANSWER_TAG = re.compile(r"</?[a-z_]+>")  # <think>, <tool_call>: added, not special; what a model writes in answers
# Thoughts and calls, by whatever name: what a model writes itself, though some vocabularies list them as special.
_THOUGHT_OR_CALL = re.compile(
    r"think|thought|reason|tool[_▁ ]?calls?|function|action|arg_(key|value)|parameter|invoke|python_tag", re.IGNORECASE
)


class Tokenizer:
    """A fast tokenizer with its chat template. Picklable: worker processes get a copy, which encodes and decodes.

    Attributes:
      hf: the transformers tokenizer; None in a copy from another process, where importing it would take a second.
      backend: the same without additions in front or behind (no BOS or EOS by itself).
      template: the chat template, or None.
      renderer, tools_renderer: it, compiled; the second for conversations with tools.
      ending, tools_ending: how it ends answers; None without template, or where nothing tells.
      end_of_turn_id: id of the token behind a plain answer; None like `ending`.
      stop_ids: what generation stops on: end of turn first, then generation_config.json's, then EOS, then what else the
        template ends an answer with.
      eos_id, bos_id: None where the tokenizer has none.
      pad_id: some valid id; it need not be distinct from EOS, since padding is found by position.
      prefix_ids, suffix_ids: what the tokenizer adds around plain text by itself (a BOS, mostly).
      added_tokens: names of tokens that are new to the model: its embedding must reach their ids.
      vocab_size: number of ids, added ones included.
      rows: how many ids the model has a row for in its embedding; `vocab_size` unless `fit_rows` said less.
      came: the files it was read from, by name; empty in a copy from another process.
    """

    def __init__(
        self,
        hf,
        template: Template | None,
        *,
        added_tokens: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        came: Mapping[str, bytes] | None = None,
        end_of_turn: str | None = None,
    ):
        self.hf = hf
        self.came = came or {}
        self.template = template
        self.added_tokens = tuple(added_tokens)
        backend = Backend.from_str(hf.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        self.prefix_ids, self.suffix_ids = _additions(backend)
        backend.post_processor = _no_post_processor()
        self.backend = backend
        self.vocab_size = self.rows = len(hf)
        self._unknown = hf.unk_token
        self.eos_id, self.bos_id = hf.eos_token_id, hf.bos_token_id
        candidates = (hf.pad_token_id, self.eos_id, hf.unk_token_id, 0)
        self.pad_id = next(number for number in candidates if number is not None)
        self.renderer = self.tools_renderer = self.ending = self.tools_ending = None
        self.end_of_turn_id, ends = None, ()
        if template is not None:
            names = {key: str(value) for key, value in hf.special_tokens_map.items() if isinstance(value, (str,))}
            fixed = tuple(template.kwargs)
            try:
                self.renderer = self.tools_renderer = Renderer(_text(template.text, template), names, fixed)
                if template.tools_text:
                    self.tools_renderer = Renderer(_text(template.tools_text, template), names, fixed)
            except TemplateError as error:
                raise ConfigError(f"chat template {template.name}: {error}; mend it, or give another one") from None
            named = [*stop_ids, *((self.eos_id,) if self.eos_id is not None else ())]
            self.ending = self.tools_ending = self._find_ending(self.renderer, named, end_of_turn)
            if template.tools_text:
                self.tools_ending = self._find_ending(self.tools_renderer, named, end_of_turn)
            ends = [self._id(name) for one in (self.ending, self.tools_ending) if one for name in one.tokens]
            self.end_of_turn_id = self._id(self.ending.mark) if self.ending else None
        chosen = self._id(end_of_turn) if end_of_turn else None
        stops = [self.end_of_turn_id, chosen, *stop_ids, self.eos_id, *ends]
        self.stop_ids = tuple(dict.fromkeys(number for number in stops if number is not None))

    def _id(self, name: str) -> int | None:
        return self.backend.token_to_id(name)

    def fit_rows(self, rows: int) -> None:
        """Says how many rows the model's embedding has, where the tokenizer has more ids (Gemma 3's image token).

        Those ids are never padding and never a stop token; where one occurs in a text, `no_row` tells.
        """
        self.rows = min(rows, self.vocab_size)
        self.stop_ids = tuple(number for number in self.stop_ids if number < rows)
        if self.pad_id >= rows:
            self.pad_id = self.eos_id if self.eos_id is not None and self.eos_id < rows else 0

    def no_row(self, ids: Sequence[int] | np.ndarray, rows: int | None = None) -> str | None:
        """What is wrong with ids that the model's embedding has no row for; None where all have one.

        Args:
          rows: of the embedding; None: what `fit_rows` said.
        """
        rows = self.rows if rows is None else rows
        last = max(ids, default=0) if isinstance(ids, (list, tuple)) else int(np.max(ids, initial=0))
        if last < rows:
            return None
        name = self.backend.id_to_token(int(last))
        what = f"id {last}" if name is None else f"the token {name!r} (id {last})"
        return f"{what} has no row in the model's embedding, which has {rows}"

    def __getstate__(self):
        left = ("plain_backends", "control_text", "control_tokens", "_headers")  # made again on demand
        state = {key: value for key, value in self.__dict__.items() if key not in left}
        return {**state, "hf": None, "came": {}, "_fast_parts": self._fast_parts}

    # --- encoding ------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; control tokens spelled in it are control tokens; nothing is added in front or behind."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` as plain text, even where it spells a control token."""
        return list(self.encode_ids([text], [self.hide_control_tokens(text)])[0])

    def encode_mixed(self, texts: Sequence[str], hidden: Sequence[str]) -> list[places.Encoded]:
        """Encodes texts with their places.

        Args:
          texts: what is encoded.
          hidden: the same texts (same lengths) with each control token that is *data* written in private-use
            characters by `hide_control_tokens`; equal to the text where there is none.
        """
        found = self._with_places(hidden)
        return [
            one if text == cover else self._patch(text, cover, one)
            for text, cover, one in zip(texts, hidden, found, strict=True)
        ]

    def encode_ids(self, texts: Sequence[str], hidden: Sequence[str]) -> list[Sequence[int]]:
        """`encode_mixed` without the places."""
        return [
            ids if text == cover else self.encode_mixed([text], [cover])[0].ids.tolist()
            for text, cover, ids in zip(texts, hidden, self._ids(hidden), strict=True)
        ]

    def _ids(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Ids of texts: from their words where that is proved to be the same, else by the tokenizer itself."""
        found = [None] * len(texts) if self.words is None else self.words.encode(texts)
        left = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        if len(left) == 1:  # without waking threads
            rest = iter([self.backend.encode(left[0], add_special_tokens=False)])
        else:
            rest = iter(self.backend.encode_batch_fast(left, add_special_tokens=False))
        return [next(rest).ids if ids is None else ids for ids in found]

    def _with_places(self, texts: Sequence[str]) -> list[places.Encoded]:
        if self.byte_counter is None:
            return [*map(places.of_encoding, self.backend.encode_batch(list(texts), add_special_tokens=False))]
        counted = map(self.byte_counter.places, self._ids(texts), texts)
        return [
            one or places.of_encoding(self.backend.encode(text, add_special_tokens=False))
            for one, text in zip(counted, texts, strict=True)
        ]

    def decode(self, ids, *, skip_special: bool = False) -> str:
        return self.backend.decode([int(number) for number in ids], skip_special_tokens=skip_special)

    def _patch(self, text: str, cover: str, encoded: places.Encoded) -> places.Encoded:
        """Encodes anew, through the copy without control tokens, the stretches in which the data spells one."""
        cuts = np.flatnonzero(self.is_control[encoded.ids])
        bounds = [(0, 0, 0, 0)]  # (token from, token to, char from, char to) of each control token
        bounds += [(i, i + 1, int(encoded.starts[i]), int(encoded.ends[i])) for i in cuts]
        bounds.append((len(encoded.ids), len(encoded.ids), len(text), len(text)))
        parts = []
        for (_, first, _, begin), (last, until, end, _) in pairwise(bounds):
            if cover[begin:end] != text[begin:end]:
                at_start, inside = self.plain_backends
                part = (at_start if begin == 0 else inside).encode(text[begin:end], add_special_tokens=False)
                part = places.of_encoding(part)
                parts.append((part.ids, part.starts + begin, part.ends + begin))
            else:
                parts.append((encoded.ids[first:last], encoded.starts[first:last], encoded.ends[first:last]))
            parts.append((encoded.ids[last:until], encoded.starts[last:until], encoded.ends[last:until]))
        ids, starts, ends = (np.concatenate(column) for column in zip(*parts, strict=True))
        return places.Encoded(ids, starts, ends)

    # --- control tokens ------------------------------------------------------------------------------------------

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Added tokens that mean structure: all but blanks and HTML tags that some vocabularies list as added."""
        added = self.backend.get_added_tokens_decoder()
        return {
            token.content: number
            for number, token in added.items()
            if token.special or (token.content.strip("▁ \t\r\n") and not HTML_TAG.fullmatch(token.content))
        }

    @cached_property
    def is_control(self) -> np.ndarray:
        """bool [vocab_size]: control tokens; without the unknown one, which any odd character gives."""
        model = self.backend.model
        unknown = self._unknown if isinstance(model, Unigram) else getattr(model, "unk_token", None)
        return self._table(number for name, number in self.control_tokens.items() if name != unknown)

    @cached_property
    def is_turn_end(self) -> np.ndarray:
        """bool [vocab_size]: what ends an assistant turn, the template's own and whatever else generation stops on."""
        return self._table(self.stop_ids)

    def _table(self, ids) -> np.ndarray:
        table = np.zeros(max(self.vocab_size, self.backend.get_vocab_size()), bool)
        table[list(ids)] = True
        return table

    @cached_property
    def control_text(self) -> ControlText:
        """Hides control tokens that data spell. In answers, marks of thoughts and calls stay, which the model writes
        itself: `<think>` and its like (added, not special), and what says so by its name; stops and headers never."""
        added, kept = self.backend.get_added_tokens_decoder(), []
        for name, number in self.control_tokens.items():
            tag = not added[number].special and _ANSWER_TAG.fullmatch(name)
            if (tag or _THOUGHT_OR_CALL.search(name)) and number not in self.stop_ids and name not in self._headers:
                kept.append(name)
        return ControlText(self.control_tokens, kept)

    @cached_property
    def _headers(self) -> frozenset[str]:
        """Control tokens that the template writes around plain messages, and that are no marks of thoughts."""
        if self.renderer is None:
            return frozenset()
        texts = []
        for roles in (("user", "assistant", "user", "assistant"), ("system", "user"), ("user", "assistant", "tool")):
            try:
                texts.append(self.renderer.render([{"role": role, "content": "x"} for role in roles]))
            except TemplateError:
                continue
        thoughts_of = {mark for pair in thoughts.MARKS for mark in pair}
        return frozenset(name for text in texts for name, _, _ in self._controls(text)) - thoughts_of

    def hide_control_tokens(self, text: str, *, answer: bool = False) -> str:
        """`text` with each control token it spells in private-use characters, as many as that has."""
        return self.control_text.hide(text, answer=answer)

    def unhide_control_tokens(self, cover: str) -> str:
        """The inverse of `hide_control_tokens`, on a rendering too."""
        return self.control_text.unhide(cover)

    @property
    def byte_counter(self) -> places.ByteCounter | None:
        return self._fast_parts[0]

    @property
    def words(self) -> WordEncoder | None:
        return self._fast_parts[1]

    @cached_property
    def _fast_parts(self) -> tuple[places.ByteCounter | None, WordEncoder | None]:
        saved = orjson.loads(self.backend.to_str())
        return places.ByteCounter.of(self.backend, saved), WordEncoder.of(self.backend, saved)

    @cached_property
    def plain_backends(self) -> tuple[Backend, Backend]:
        """Copies without control tokens: for text at the very start, and for text behind a control token."""
        return plain.copies(self.backend, self.control_tokens)

    # --- template ------------------------------------------------------------------------------------------------

    def _find_ending(self, renderer: Renderer, named: Sequence[int], end_of_turn: str | None) -> Ending | None:
        """Renders short conversations. Raises ConfigError where the template can't write them."""
        try:
            return boundaries.probe(
                renderer,
                self._controls,
                [self.backend.id_to_token(number) for number in named],
                bos=None if self.bos_id is None else self.backend.id_to_token(self.bos_id),
                eos=None if self.eos_id is None else self.backend.id_to_token(self.eos_id),
                chosen=end_of_turn,
            )
        except TemplateError as error:
            raise ConfigError(
                f"chat template {self.template.name!r} fails on a question and an answer ({error}): "
                "set model.chat_template to a built-in one or a file"
            ) from None
        except ValueError as error:
            raise ConfigError(f"chat template {self.template.name!r}: {error}") from None

    def _controls(self, text: str) -> list[tuple[str, int, int]]:
        """Control tokens in a text: name, where it begins, where it ends."""
        encoded = places.of_encoding(self.backend.encode(text, add_special_tokens=False))
        return [
            (self.backend.id_to_token(int(encoded.ids[i])), int(encoded.starts[i]), int(encoded.ends[i]))
            for i in np.flatnonzero(self.is_control[encoded.ids])
        ]

    def require_template(self) -> Renderer:
        """The compiled template. Raises ConfigError where there is none, or no token ends its turns."""
        if self.renderer is None:
            raise ConfigError(
                "the tokenizer has no chat template, and the data are conversations: set model.chat_template to "
                f"one of {', '.join(templates.BUILTIN)}, or to a file with Jinja text"
            )
        if self.ending is None or self.tools_ending is None:
            raise ConfigError(lookalikes.explain_missing_end(self))
        return self.renderer

    # --- identity ------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Hex digest of everything that decides ids: tokenizer, template text, stop tokens, added tokens."""
        text = [self.backend.to_str(), json.dumps([self.prefix_ids, self.suffix_ids, self.stop_ids, self.added_tokens])]
        if self.template is not None:
            text += [self.renderer.source, self.tools_renderer.source, json.dumps(self.renderer.special_tokens)]
            text += [repr(self.ending), repr(self.tools_ending)]
        return hashlib.sha256("\0".join(text).encode()).hexdigest()

    def files(self) -> dict[str, bytes]:
        """The tokenizer's files for an export, by their names in its folder; see `tokenizer_export`."""
        return tokenizer_export.files(self.hf, self.came)

    def generation_config(self) -> dict:
        """The token fields of an export's generation_config.json."""
        fields = {"bos_token_id": self.bos_id, "eos_token_id": list(self.stop_ids), "pad_token_id": self.pad_id}
        return {key: value for key, value in fields.items() if value not in (None, [])}


def load(
    path: str | Path,
    *,
    chat_template: str | None = None,
    end_of_turn: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    add_tokens: Sequence[str] = (),
) -> Tokenizer:
    """Loads the tokenizer of an HF folder, or of one with only a SentencePiece `tokenizer.model`.

    Args:
      path: folder.
      chat_template: name of a built-in template (`templates.BUILTIN`), a file with Jinja text, or None for the
        folder's own. Control tokens that a built-in template needs and the tokenizer lacks are added as special
        tokens, and named in `added_tokens`.
      end_of_turn: token that ends an assistant turn, in place of the template's own.
      template_kwargs: values for variables of the template, such as {"enable_thinking": False}, unless a row has its
        own; they are saved with it.
      add_tokens: more special tokens, as a template from a file may need them: one token each, in all that a template
        writes. Those new to the tokenizer get the next free ids, in this order. (A name such as <think> that the
        template doesn't write is one for answers: added, not special.)

    Raises:
      ConfigError: no folder, no or damaged tokenizer files, unknown template.
    """
    path = Path(path)
    hf = tokenizer_files.load(path)
    template, added = None, []
    if chat_template:
        template = templates.find(chat_template, end_of_turn)
        added = _add_tokens(hf, template.tokens)
    elif hf.chat_template:
        template = _own_template(hf)
    if template is not None:
        template = replace(template, kwargs=dict(template_kwargs or {}))
    added += _add_tokens(hf, add_tokens, template.text + (template.tools_text or "") if template else "")
    stop_ids = tokenizer_files.generation_stops(path, len(hf))
    came = tokenizer_export.read(path)
    tokenizer = Tokenizer(hf, template, added_tokens=added, stop_ids=stop_ids, came=came)
    if template is not None and end_of_turn and template.end_of_turn is None:
        tokenizer = _with_end_of_turn(tokenizer, end_of_turn, stop_ids)
    if tokenizer.template is not None:
        hf.chat_template = _all_templates(hf.chat_template, tokenizer)
    return tokenizer


def _all_templates(came: str | dict[str, str] | None, used: Tokenizer) -> str | dict[str, str]:
    """The template that is trained with, among the model's others: those under names of their own stay as they came."""
    others = came if isinstance(came, dict) else {}
    found = {name: text for name, text in others.items() if name not in ("default", "tool_use")}
    found["default"] = used.renderer.source
    if used.template.tools_text:
        found["tool_use"] = used.tools_renderer.source
    return found if len(found) > 1 else used.renderer.source


def _text(text: str, template: Template) -> str:
    return templates.with_defaults(text, template.kwargs)


def _own_template(hf) -> Template:
    text = hf.chat_template
    if isinstance(text, dict):
        if "default" not in text:
            raise ConfigError(
                f"the tokenizer has chat templates {sorted(text)}, none named default: give one as a file"
            )
        return Template("tokenizer", text["default"], tools_text=text.get("tool_use"))
    return Template("tokenizer", text)


def _add_tokens(hf, names: Sequence[str], written: str | None = None) -> list[str]:
    """Adds those of `names` that the tokenizer lacks; one it has as ordinary text becomes a control token.

    Args:
      written: the template's text. A name such as <think> that isn't in it is for answers, where the data spell it: it
        is added as no special token, so that they may and that a decoded answer shows it. None: all are special.

    Returns those whose id is new.
    """
    from tokenizers import AddedToken

    known = {token.content for token in hf.added_tokens_decoder.values()}
    missing = [name for name in dict.fromkeys(names) if name not in known]
    before = len(hf)
    for name in missing:
        special = written is None or name in written or not _ANSWER_TAG.fullmatch(name)
        hf.add_tokens([AddedToken(name, special=special, normalized=False)], special_tokens=special)
    return [name for name in missing if hf.convert_tokens_to_ids(name) >= before]


def _with_end_of_turn(tokenizer: Tokenizer, end_of_turn: str, stop_ids: Sequence[int]) -> Tokenizer:
    """The same tokenizer with a foreign template changed to end its turns with another token; where it writes that
    token anyway, or none, the template stays as it is."""
    added = [*tokenizer.added_tokens, *_add_tokens(tokenizer.hf, [end_of_turn])]
    options = {"added_tokens": added, "stop_ids": stop_ids, "end_of_turn": end_of_turn, "came": tokenizer.came}
    result = Tokenizer(tokenizer.hf, tokenizer.template, **options)
    if result.end_of_turn_id == tokenizer.hf.convert_tokens_to_ids(end_of_turn):
        return result
    own, name = tokenizer.template, tokenizer.ending.mark
    text = templates.with_end_of_turn(own.text, name, end_of_turn)
    tools_text = own.tools_text and templates.with_end_of_turn(own.tools_text, name, end_of_turn)
    result = Tokenizer(tokenizer.hf, replace(own, text=text, tools_text=tools_text, end_of_turn=end_of_turn), **options)
    if result.end_of_turn_id != tokenizer.hf.convert_tokens_to_ids(end_of_turn):
        raise ConfigError(
            f"model.end_of_turn={end_of_turn!r} could not be put into the template {own.name!r}: write it there behind "
            f"the answer, in place of {name!r}, and set model.add_tokens={(end_of_turn,)!r} and model.end_of_turn=''"
        )
    return result


def _no_post_processor():
    """A post-processor that does nothing: the usual byte-level one would trim blanks off the places."""
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="$A:0", special_tokens=[])


def _additions(backend: Backend) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the tokenizer puts in front of and behind a text by itself."""
    plain, full = (backend.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    for cut in range(len(full) - len(plain) + 1):
        if full[cut : cut + len(plain)] == plain:
            return tuple(full[:cut]), tuple(full[cut + len(plain) :])
    return (), ()
