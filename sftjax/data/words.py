"""Encodes texts a word at a time, for byte-level tokenizers: each word is merged once, and looked up from then on.

The tokenizer itself keeps an alignment of every character while it cuts a text into words, and that takes most of its
time. Here one search of a compiled pattern cuts many texts at once (`splitting`), and a dictionary gives the tokens of
each word; the words it lacks go through the tokenizer's own merges. A text in which this could differ from the
tokenizer is left to the tokenizer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel

from sftjax.data import splitting

_MAX_WORDS = 1 << 18  # about 50 MB
_LONG_WORD = 64  # characters; longer ones hardly come twice
_MAX_ADDED = 3000  # each has a character of its own among the barriers
_BARRIER = 0x10F000
_END = chr(_BARRIER)  # behind each text
_END_ID = np.int32(-1)


class WordEncoder:
    """Ids of texts, from the ids of their words."""

    def __init__(
        self, words: re.Pattern[str], passes: Sequence[tuple[re.Pattern, dict[str, str]]], ids: _Words, nfc: bool
    ):
        self._words, self._passes, self._ids, self._needs_nfc = words, passes, ids, nfc

    @classmethod
    def of(cls, backend: Backend, saved: dict[str, Any]) -> WordEncoder | None:
        """None for tokenizers of another kind. `saved` is `backend` as its tokenizer.json."""
        model, normalizer, tokens = saved["model"], saved.get("normalizer") or {}, saved["added_tokens"]
        byte_level = model["type"] == "BPE" and not any(
            model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        )
        greedy = any(token[key] for token in tokens for key in ("lstrip", "rstrip", "single_word"))
        plain = not greedy and all(token["content"] for token in tokens)
        if not byte_level or not plain or len(tokens) > _MAX_ADDED or normalizer.get("type", "NFC") != "NFC":
            return None
        try:
            words = splitting.compile_words(saved.get("pre_tokenizer"))
        except splitting.Unsupported:
            return None
        characters = {token["content"]: chr(_BARRIER + 1 + i) for i, token in enumerate(tokens)}
        ids = _Words(backend, {_END: _END_ID.tobytes()})
        ids.update({characters[token["content"]]: np.int32(token["id"]).tobytes() for token in tokens})
        passes = []
        for normalized in (False, True):  # the tokenizer's order
            names = [token["content"] for token in tokens if bool(token["normalized"]) is normalized]
            names.sort(key=len, reverse=True)
            if names:
                found = {name: characters[name] for name in names}
                passes.append((re.compile("|".join(map(re.escape, names))), found))
        return cls(words, passes, ids, bool(normalizer))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        """Ids (int32 [n]) of each text; None for a text that only the tokenizer itself can encode."""
        taken = [i for i, text in enumerate(texts) if self._takes(text)]
        found: list[np.ndarray | None] = [None] * len(texts)
        for i, ids in zip(taken, self._encode([texts[i] for i in taken]), strict=True):
            found[i] = ids
        return found

    def _takes(self, text: str) -> bool:
        if text.isascii():
            return True
        return splitting.covers(text) and (not self._needs_nfc or unicodedata.is_normalized("NFC", text))

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        if not texts:
            return []
        joined = _END.join(texts) + _END
        for pattern, names in self._passes:
            joined = pattern.sub(lambda match, names=names: names[match[0]], joined)
        try:
            flat = np.frombuffer(b"".join(map(self._ids.__getitem__, self._words.findall(joined))), np.int32)
        except _NoWord:
            return [None] if len(texts) == 1 else [ids for text in texts for ids in self._encode([text])]
        ends = np.flatnonzero(flat == _END_ID).tolist()
        return [flat[begin:end] for begin, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


class _NoWord(Exception):
    """There is a character that belongs to no word."""


class _Words(dict[str, bytes]):
    """Ids of each word, as bytes; a word that isn't there goes through the tokenizer's merges."""

    def __init__(self, backend: Backend, known: dict[str, bytes]):
        super().__init__(known)
        self._backend, self._model = backend, backend.model
        self._to_bytes = ByteLevel(add_prefix_space=False, use_regex=False)

    def __reduce__(self):  # the words met so far go along
        return _Words, (self._backend, dict(self))

    def __missing__(self, word: str) -> bytes:
        if not word:
            raise _NoWord
        ((spelled, _),) = self._to_bytes.pre_tokenize_str(word)
        ids = np.array([token.id for token in self._model.tokenize(spelled)], np.int32).tobytes()
        if len(self) < _MAX_WORDS and len(word) <= _LONG_WORD:
            self[word] = ids
        return ids
