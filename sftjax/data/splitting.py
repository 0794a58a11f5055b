"""The words that a byte-level tokenizer cuts a text into before it merges bytes, as one pattern for Python's `re`.

A tokenizer.json tells them by steps: patterns in Oniguruma's language, each applied to what the one before left. This
module writes the same as a single pattern, with every class of characters spelled out, for the characters of the
basic plane that this Python's Unicode tables know, and for emoji (astral symbols; `covers` tells them from the rest).

Barriers are characters that no text has and that part texts: `\\s+(?!\\S)` takes them for the end, and no word
reaches over one. The words of many texts are so found in one search, which is what makes it fast.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Any

import numpy as np

BARRIERS = "\U0010f000-\U0010fffd"  # at the end of plane 16, for private use
_ASTRAL = "\U00010000-\U0010efff"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel means by itself
_SPACE = (*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
_PLAIN_ESCAPES = {"r": "\r", "n": "\n", "t": "\t", "f": "\f", "v": "\v"}
_QUANTIFIER = re.compile(r"(?:[?*+]|\{\d+(?:,\d*)?\})[?+]?")
_GROUPS = ("(?:", "(?i:", "(?!", "(?=", "(")


class Unsupported(ValueError):
    """The steps can't be written as one pattern."""


def compile_words(pre_tokenizer: dict[str, Any] | None) -> re.Pattern[str]:
    """The pattern of a tokenizer.json's `pre_tokenizer`: each match is a word or a barrier, or empty.

    A text that it `covers` is cut alike by both if no match is empty: that one stands where no word begins.

    Raises:
      Unsupported: steps of a kind that this doesn't know.
    """
    steps = _steps(pre_tokenizer)
    parted = _Set(np.zeros(1 << 16, bool), False)  # what earlier steps cut out: as good as the end of a text
    alternatives = []
    for number, pattern in enumerate(steps):
        parts = _Translator(pattern, parted).parts
        alternatives.append("".join(part if isinstance(part, str) else part.written() for part in parts))
        if number + 1 < len(steps):
            single = isinstance(parts[0], _Set) and all(isinstance(part, str) for part in parts[1:])
            if not (single and (len(parts) == 1 or _QUANTIFIER.fullmatch("".join(parts[1:])))):
                raise Unsupported(f"a first step other than a class of characters: {pattern!r}")
            parted = parted | parts[0]
    # No two of them can begin at the same character, so the order is free: what is found most often comes first.
    return re.compile("|".join([*alternatives[::-1], f"[{BARRIERS}]", r"(?!\Z)"]))


def covers(text: str) -> bool:
    """Whether `text` has no astral characters but symbols (which are neither letters nor numbers for any pattern)."""
    if text.isascii() or len(text.encode("utf-16-le", "surrogatepass")) == 2 * len(text):
        return True
    return all(c < "\U00010000" or unicodedata.category(c) in ("So", "Sk") for c in set(text))


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[str]:
    """Oniguruma patterns, one for each step."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    steps = []
    for part in parts:
        kind = part.get("type")
        if kind == "Digits":
            steps.append(r"\p{N}" if part["individual_digits"] else r"\p{N}+")
        elif kind == "Split" and "Regex" in part["pattern"]:
            if (part["behavior"], part["invert"]) not in (("Isolated", False), ("Removed", True)):
                raise Unsupported(f"a split whose matches are {part['behavior']}")
            steps.append(part["pattern"]["Regex"])
        elif kind == "ByteLevel" and part is parts[-1] and not part.get("add_prefix_space"):
            steps += [_GPT2] if part.get("use_regex", True) else []
        else:
            raise Unsupported(f"a pre-tokenizer {kind}")
    if not steps or parts[-1].get("type") != "ByteLevel":
        raise Unsupported("no step that tells words")
    return steps


class _Set:
    """Characters: a table for the basic plane, and whether the astral symbols belong to it."""

    def __init__(self, table: np.ndarray, astral: bool):
        self.table, self.astral = table, astral

    def __or__(self, other: _Set) -> _Set:
        return _Set(self.table | other.table, self.astral or other.astral)

    def __sub__(self, other: _Set) -> _Set:
        return _Set(self.table & ~other.table, self.astral and not other.astral)

    def __invert__(self) -> _Set:
        return _Set(_categories()["assigned"] & ~self.table, not self.astral)

    def written(self) -> str:
        edges = np.flatnonzero(np.diff(self.table.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        ranges = "".join(f"\\u{begin:04x}-\\u{end - 1:04x}" for begin, end in edges)
        if not ranges and not self.astral:
            return r"[^\s\S]"  # nothing
        return f"[{ranges}{_ASTRAL if self.astral else ''}]"


@lru_cache(maxsize=1)
def _categories() -> dict[str, np.ndarray]:
    """bool [65536] for each general category and for each of their first letters; "assigned": all but surrogates."""
    names = np.array([unicodedata.category(chr(c)) for c in range(1 << 16)])
    tables = {name: names == name for name in np.unique(names)}
    for letter in "LMNPSZ":
        tables[letter] = np.char.startswith(names, letter)
    tables["assigned"] = (names != "Cn") & (names != "Cs")
    return tables


def _property(name: str) -> _Set:
    if name not in _categories() or name[0] == "C":
        raise Unsupported(f"the property {name}")
    return _Set(_categories()[name], name == "S")


def _characters(*numbers: int) -> _Set:
    table = np.zeros(1 << 16, bool)
    table[list(numbers)] = True
    return _Set(table, False)


class _Translator:
    """Reads one Oniguruma pattern into `parts`: text of a Python pattern, and sets of characters."""

    def __init__(self, pattern: str, parted: _Set):
        self._pattern, self._parted, self._at = pattern, parted, 0
        self.parts: list[str | _Set] = []
        while self._at < len(pattern):
            self.parts.append(self._next())

    def _next(self) -> str | _Set:
        pattern, at = self._pattern, self._at
        if match := _QUANTIFIER.match(pattern, at):
            self._at = match.end()
            return match[0]
        for group in _GROUPS:
            if pattern.startswith(group, at) and (group != "(" or not pattern.startswith("(?", at)):
                self._at += len(group)
                return "(?:" if group == "(" else group
        if pattern[at] in ")|":
            self._at += 1
            return pattern[at]
        if pattern[at] == "[":
            return self._class() - self._parted
        if pattern[at] in "(.^$":
            raise Unsupported(f"{pattern[at:]!r}")
        found = self._character()
        if isinstance(found, _Set):
            return found - self._parted
        if ord(found) > 0xFFFF or self._parted.table[ord(found)]:
            raise Unsupported(f"the character {found!r}")
        return re.escape(found)

    def _character(self) -> str | _Set:
        """One character, or the set that an escape means."""
        pattern, at = self._pattern, self._at
        if pattern[at] != "\\":
            self._at += 1
            return pattern[at]
        kind = pattern[at + 1 : at + 2]
        self._at += 2
        if kind in ("p", "P"):
            match = re.compile(r"\{(\w+)\}").match(pattern, at + 2)
            if match is None:
                raise Unsupported(f"{pattern[at:]!r}")
            self._at = match.end()
            return _property(match[1]) if kind == "p" else ~_property(match[1])
        if kind in ("s", "S"):
            return _characters(*_SPACE) if kind == "s" else ~_characters(*_SPACE)
        if kind in _PLAIN_ESCAPES:
            return _PLAIN_ESCAPES[kind]
        if not kind or kind.isalnum():
            raise Unsupported(f"\\{kind}")
        return kind

    def _class(self) -> _Set:
        """`[...]` or `[^...]`, without classes inside."""
        self._at += 1
        negated = self._pattern.startswith("^", self._at)
        self._at += negated
        found = _characters()
        while not self._pattern.startswith("]", self._at):
            if self._at >= len(self._pattern) or self._pattern.startswith(("[", "&&"), self._at):
                raise Unsupported(f"the class in {self._pattern!r}")
            first = self._character()
            if isinstance(first, _Set):
                found |= first
                continue
            last = first
            if self._pattern.startswith("-", self._at) and not self._pattern.startswith("-]", self._at):
                self._at += 1
                last = self._character()
            if isinstance(last, _Set) or ord(last) > 0xFFFF:
                raise Unsupported(f"the class in {self._pattern!r}")
            found |= _characters(*range(ord(first), ord(last) + 1))
        self._at += 1
        return ~found if negated else found
