"""A row as the rules see it: who said what, exchange by exchange; and words as numbers.

messages  system | user a | assistant b | user c | user d | assistant e
exchanges          (a, b)                 (c + d, e)
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from sftjax.data import formats, values
from sftjax.data.conversations import Conversation
from sftjax.data.types import RowError

# Where words aren't spaced: Chinese and Japanese; Thai, Lao, Tibetan, Burmese and Khmer. (Korean is spaced.)
_HAN = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0002fa1f"
_THAI = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"
_ALONE = rf"{_HAN}{_THAI}\uac00-\ud7af"
_WORDS = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")  # as numbers: each character of these is one
# As people count them: words of these have about two characters, and about four.
_SPOKEN = re.compile(rf"[{_HAN}]{{1,2}}|[{_THAI}]{{1,4}}|[^\s{_HAN}{_THAI}\u3000-\u303f\uff00-\uff0f\uff1a-\uff20]+")
# What a model thinks or calls, written into its text.
_TAGGED = re.compile(r"<(think|thinking|thought|reasoning|tool_call|function_call|tool_calls)>.*?(?:</\1>|\Z)", re.S)
_NUMBERS = re.compile(
    r"[-+*/^<>=×÷]?\s?\d+(?:[.,]\d+)*|\b(?:zero|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen"
    r"|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
    r"|hundred|thousand|million|billion)\b"
)
_ASCII_WORDS = re.compile(r"\w+", re.ASCII)
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_CACHED_WORDS = 1_000_000


class Exchange:
    """What was asked since the last answer, and the answer.

    Attributes:
      instruction: None for a bare text.
      response: what the answer says, without its thoughts and calls.
      acts: the answer has thoughts or calls tools, whatever it says besides.
      loose: another answer of the conversation ends without a full stop: that is how this writer writes.
    """

    def __init__(self, instruction: str | None, response: str, acts: bool = False):
        self.instruction, self.response, self.acts, self.loose = instruction, response, acts, False

    @cached_property
    def instruction_words(self) -> list[str]:
        return spoken(self.instruction or "")

    @cached_property
    def response_words(self) -> list[str]:
        return spoken(self.response)

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
    """One row. `messages` are (role, all text: thoughts, content and calls); a tree of replies gives those of all its
    paths. `calls` are the tool calls, and the tools offered, as JSON text."""

    messages: tuple[tuple[str, str], ...]
    exchanges: tuple[Exchange, ...]
    calls: str = ""

    @property
    def system(self) -> str:
        return "\n".join(text for role, text in self.messages if role in ("system", "developer"))

    @property
    def answers(self) -> str:
        return "\n".join(text for role, text in self.messages if role == "assistant")


def read(row: Mapping[str, Any], format: str = "auto", fields: Mapping[str, str] | None = None) -> Dialogue:
    """A row of any format that holds text.

    Raises:
      RowError: the row can't be read, or holds token ids only.
    """
    messages: list[tuple[str, str]] = []
    exchanges: list[Exchange] = []
    calls: list[str] = []
    for example in formats.parse(row, format, fields):
        if isinstance(example, Conversation):
            turns = [(message["role"], _all_text(message)) for message in example.messages]
            exchanges += _exchanges(example.messages, turns)
            messages += turns
            calls += [_called(message) for message in example.messages if "tool_calls" in message]
            calls += [values.as_json(example.tools)] if example.tools else []
        elif isinstance(example, formats.Text):
            messages += [("user", example.prompt)] if example.prompt else []
            messages.append(("assistant", example.completion))
            exchanges.append(_exchange(example.prompt or None, example.completion))
        else:
            raise RowError("tokens_only", "the row holds token ids: curate the text that they were made from")
    if not exchanges:
        raise RowError("no_assistant_turn", "there is no answer in the row")
    if len(exchanges) < len(messages) // 2:
        messages = list(dict.fromkeys(messages))
    return Dialogue(tuple(messages), tuple(exchanges), "\n".join(calls))


def _called(message: Mapping[str, Any]) -> str:
    """Names and arguments of a message's calls, without the ids that each run gives anew."""
    functions = [call.get("function", call) for call in message["tool_calls"]]
    return values.as_json([[one.get("name"), one.get("arguments")] for one in functions])


def _all_text(message: Mapping[str, Any]) -> str:
    if len(message) == 2 and isinstance(message.get("content"), str):  # nearly all
        return message["content"]
    parts = [message.get("reasoning_content"), message.get("content")]
    parts += [_called(message)] if "tool_calls" in message else []
    return "\n".join(part for part in parts if isinstance(part, str) and part)


def _exchange(asked: str | None, content: str, acts: bool = False) -> Exchange:
    said = _TAGGED.sub("", content) if "<" in content else content
    return Exchange(asked, said, acts or said != content)


def _exchanges(messages: Sequence[Mapping[str, Any]], turns: Sequence[tuple[str, str]]) -> list[Exchange]:
    asked: list[str] = []
    found = []
    for message, (role, text) in zip(messages, turns, strict=True):
        if role == "assistant":
            acts = "tool_calls" in message or bool(str(message.get("reasoning_content") or "").strip())
            found.append(_exchange("\n".join(asked), message.get("content") or "", acts))
            asked = []
        elif role in ("user", "tool"):
            asked.append(text)
    unstopped = [exchange for exchange in found if exchange.response.rstrip()[-1:].isalpha()]
    for exchange in found:
        exchange.loose = len(unstopped) > (exchange in unstopped)
    return found


def spoken(text: str) -> list[str]:
    """Words as people count them, in scripts with blanks between words and in those without."""
    return text.split() if text.isascii() else _SPOKEN.findall(text)


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
    parts += [dialogue.calls] if dialogue.calls else []
    return xxhash.xxh3_128_digest("\0".join(parts).encode())


def kind_of(dialogue: Dialogue) -> int:
    """A number of 64 bits; only rows of one kind can be near duplicates: those with the same calls and system text."""
    answers = _folded(dialogue.answers)
    wordless = "" if _WORDS.search(answers) else answers  # nothing else would tell these from another
    parts = (dialogue.calls, " ".join(_folded(dialogue.system).split()), wordless)
    return xxhash.xxh3_64_intdigest("\0".join(parts).encode())


def numbers_of(dialogue: Dialogue) -> np.ndarray:
    """uint32 [n], sorted: a hash of each number that the row speaks of, one for each time."""
    counts: Counter[str] = Counter()
    for _, text in dialogue.messages:
        counts.update("".join(found.split()) for found in _NUMBERS.findall(_folded(text)))
    times = [f"{number} {time}".encode() for number, count in counts.items() for time in range(count)]
    return np.unique(np.array([xxhash.xxh32_intdigest(one) for one in times], np.uint32))


def _folded(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
