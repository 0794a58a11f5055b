"""Where tokens come from in a text: read off the tokenizer's answer, or counted from the bytes of each token."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend


@dataclass(frozen=True)
class Encoded:
    """Ids of a text, and where each came from.

    ids, starts, ends: int32 [n]; token i covers characters [starts[i], ends[i]).
    no_blanks: each token is known to cover a character (some tokenizers make a blank up, which covers none).
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    no_blanks: bool = False


def of_encoding(encoding) -> Encoded:
    """As the tokenizer tells them."""
    ids = np.array(encoding.ids, np.int32)
    starts, ends = np.array(encoding.offsets, np.int32).reshape(-1, 2).T.copy()  # contiguous, for searching
    return Encoded(ids, starts, ends)


class ByteCounter:
    """Places in the texts of byte-level tokenizers, whose tokens spell a text's bytes one after another.

    Asking the tokenizer for places costs as much again as a third of the tokenisation, and more to read them from
    Python; a sum over the lengths of tokens costs next to nothing.
    """

    def __init__(self, lengths: np.ndarray, normal_form: str | None):
        self._lengths, self._normal_form = lengths, normal_form

    @classmethod
    def of(cls, backend: Backend, saved: dict[str, Any]) -> ByteCounter | None:
        """None for tokenizers that aren't byte-level, or change the text first. `saved`: `backend` as tokenizer.json.

        What is left can only take bytes away (an added token that takes blanks along), so that a sum that comes out
        right is right everywhere.
        """
        normalizer, decoder = saved.get("normalizer") or {}, saved.get("decoder") or {}
        puts_blank_in_front = '"add_prefix_space": true' in json.dumps(saved.get("pre_tokenizer"))
        if decoder.get("type") != "ByteLevel" or normalizer.get("type", "NFC") != "NFC" or puts_blank_in_front:
            return None
        lengths = np.zeros(backend.get_vocab_size(), np.int32)
        for token, number in backend.get_vocab(with_added_tokens=False).items():
            lengths[number] = len(token)  # one character stands for each byte
        for number, token in backend.get_added_tokens_decoder().items():
            lengths[number] = len(token.content.encode())
        return cls(lengths, normalizer.get("type"))

    def places(self, ids: list[int], text: str) -> Encoded | None:
        """None where the tokens don't add up to the text: one is unknown, or took blanks along, or one was put in."""
        if self._normal_form and not unicodedata.is_normalized(self._normal_form, text):
            return None
        try:
            spelled = text.encode()
        except UnicodeEncodeError:  # half a surrogate pair
            return None
        numbers = np.array(ids, np.int32)
        lengths = self._lengths[numbers]
        ends = np.cumsum(lengths, dtype=np.int32)
        if (ends[-1] if len(ends) else 0) != len(spelled):
            return None
        starts = ends - lengths
        if len(spelled) != len(text):
            begins = (np.frombuffer(spelled, np.uint8) & 0xC0) != 0x80  # a character's first byte
            character = np.cumsum(begins, dtype=np.int32) - 1
            # a token of a part of a character covers all of it
            starts, ends = character[starts], character[ends - 1] + 1
        return Encoded(numbers, starts, ends, no_blanks=True)
