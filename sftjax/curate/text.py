"""A row as the rules see it: who said what, exchange by exchange; and words as numbers.

messages  system | user a | assistant b | user c | user d | assistant e
exchanges          (a, b)                 (c + d, e)
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import orjson
import xxhash

from sftjax.data import formats
from sftjax.data.conversations import Conversation
from sftjax.data.types import RowError

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORDS = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")  # where words aren't spaced, each character is one
_ASCII_WORDS = re.compile(r"\w+", re.ASCII)
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_CACHED_WORDS = 1_000_000


class Exchange:
    """What was asked since the last answer, and the answer.

    Attributes:
      instruction: None for a bare text.
      response: the answer; tool calls in it are JSON text.
      loose: another answer of the conversation ends without a full stop: that is how this writer writes.
    """

    def __init__(self, instruction: str | None, response: str):
        self.instruction, self.response, self.loose = instruction, response, False

    @cached_property
    def instruction_words(self) -> list[str]:
        return (self.instruction or "").split()

    @cached_property
    def response_words(self) -> list[str]:
        return self.response.split()

    @cached_property
    def plain(self) -> str:
        """The response with typewriter apostrophes, as patterns have them."""
        return self.response.replace("’", "'")

    @cached_property
    def prose(self) -> str:
        """The response without fenced code."""
        return re.sub(r"```.*?(?:```|\Z)", " ", self.response, flags=re.S) if "```" in self.response else self.response


@dataclass(frozen=True)
class Dialogue:
    """One row. `messages` are (role, text); a tree of replies gives those of all its paths."""

    messages: tuple[tuple[str, str], ...]
    exchanges: tuple[Exchange, ...]

    @property
    def system(self) -> str:
        return "\n".join(text for role, text in self.messages if role in ("system", "developer"))


def read(row: Mapping[str, Any], format: str = "auto", fields: Mapping[str, str] | None = None) -> Dialogue:
    """A row of any format that holds text.

    Raises:
      RowError: the row can't be read, or holds token ids only.
    """
    messages: list[tuple[str, str]] = []
    exchanges: list[Exchange] = []
    for example in formats.parse(row, format, fields):
        if isinstance(example, Conversation):
            turns = [(message["role"], _content(message)) for message in example.messages]
            exchanges += _exchanges(turns)
            messages += turns
        elif isinstance(example, formats.Text):
            messages += [("user", example.prompt)] if example.prompt else []
            messages.append(("assistant", example.completion))
            exchanges.append(Exchange(example.prompt or None, example.completion))
        else:
            raise RowError("tokens_only", "the row holds token ids: curate the text that they were made from")
    if not exchanges:
        raise RowError("no_assistant_turn", "there is no answer in the row")
    return Dialogue(
        tuple(dict.fromkeys(messages)) if len(exchanges) < len(messages) // 2 else tuple(messages), tuple(exchanges)
    )


def _content(message: Mapping[str, Any]) -> str:
    text = message.get("content") or ""
    if message.get("tool_calls"):
        text = f"{text}\n{orjson.dumps(message['tool_calls'], default=str).decode()}".strip()
    return text


def _exchanges(turns: Sequence[tuple[str, str]]) -> list[Exchange]:
    asked: list[str] = []
    found = []
    for role, text in turns:
        if role == "assistant":
            found.append(Exchange("\n".join(asked), text))
            asked = []
        elif role in ("user", "tool"):
            asked.append(text)
    unstopped = [exchange for exchange in found if exchange.response.rstrip()[-1:].isalpha()]
    for exchange in found:
        exchange.loose = len(unstopped) > (exchange in unstopped)
    return found


# --- words as numbers ---------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Words without regard to case, punctuation, blanks or Unicode form."""
    if text.isascii():
        return _ASCII_WORDS.findall(text.lower())
    return _WORDS.findall(_folded(text))


class _Cache(dict):
    def __missing__(self, word: str) -> int:
        if len(self) >= _CACHED_WORDS:
            self.clear()
        self[word] = value = xxhash.xxh3_64_intdigest(word.encode())
        return value


_hashes = _Cache()


def word_hashes(text: str) -> np.ndarray:
    """uint64 [n], one for each word."""
    found = words(text)
    return np.fromiter(map(_hashes.__getitem__, found), np.uint64, len(found))


def grams(hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64 [len - n + 1]: one hash for each run of n words. Empty where there are fewer."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    out = hashes[:count].copy()
    for k in range(1, n):
        out *= _PRIME
        out += hashes[k : k + count]
    return out


def exact_key(dialogue: Dialogue) -> bytes:
    """16 bytes; equal for rows with the same roles and the same words, whatever their case, blanks or Unicode form.

    Punctuation counts: "Let's eat, grandma" is not "Let's eat grandma".
    """
    parts = [part for role, text in dialogue.messages for part in (role, " ".join(_folded(text).split()))]
    return xxhash.xxh3_128_digest("\0".join(parts).encode())


def _folded(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
