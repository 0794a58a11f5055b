"""Scorers that compare an answer with the one that was expected."""

from __future__ import annotations

import functools
import re
import string
from decimal import Decimal, InvalidOperation
from typing import Any

from sftjax.errors import ConfigError
from sftjax.scorers.rows import Row, expected_of, field_of

_NUMBER = re.compile(r"(?:(?<![\w.)])[-+])?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_HASHES = re.compile(r"####\s*(.*)")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans({mark: " " for mark in string.punctuation + "“”‘’«»…"})
_CHOICE = re.compile(r"\banswer\s*(?:is|:)?\s*\**\(?([A-Z])\b", re.IGNORECASE)
_LETTER = re.compile(r"(?:^|[\s(*])([A-Z])(?=[\s).:*,]|$)")


def exact(row: Row, answer: str, argument: str = "") -> float:
    return float(answer.strip() in [expected.strip() for expected in expected_of(row)])


def normalize(text: str) -> str:
    """Lower case, without punctuation, English articles and doubled blanks (as SQuAD's evaluation does)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def normalized(row: Row, answer: str, argument: str = "") -> float:
    return float(normalize(answer) in [normalize(expected) for expected in expected_of(row)])


def contains(row: Row, answer: str, argument: str = "") -> float:
    said = f" {normalize(answer)} "
    wanted = [normalize(expected) for expected in expected_of(row)]
    return float(any(expected and f" {expected} " in said for expected in wanted))


def choice(row: Row, answer: str, argument: str = "") -> float:
    """Multiple choice: 'The answer is B', else the first letter that stands alone."""
    named = _CHOICE.findall(answer)
    alone = _LETTER.findall(answer)
    said = named[-1] if named else alone[0] if alone else ""
    return float(bool(said) and said.upper() in [expected.strip(" ().").upper() for expected in expected_of(row)])


def number_in(text: str, *, behind_hashes: bool = False) -> Decimal | None:
    """The number that a text settles on: behind '####', in \\boxed{}, or the last one.

    Args:
      behind_hashes: only the first of these counts.
    """
    places = _HASHES.findall(text)
    if not places and not behind_hashes:
        places = _BOXED.findall(text) or [text]
    found = _NUMBER.findall(places[-1]) if places else []
    if not found:
        return None
    chosen = found[0] if _HASHES.search(text) else found[-1]
    try:
        return Decimal(chosen.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def tolerance_of(argument: Any) -> Decimal:
    try:
        tolerance = Decimal(str(argument or 0))
    except InvalidOperation:
        tolerance = Decimal(-1)
    if not 0 <= tolerance < 1:
        raise ConfigError(f"scorer numeric:{argument}: the tolerance is relative, between 0 and 1")
    return tolerance


def numeric(row: Row, answer: str, argument: Any = "", *, behind_hashes: bool = False) -> float:
    said = number_in(answer, behind_hashes=behind_hashes)
    if said is None:
        return 0.0
    tolerance = tolerance_of(argument)
    wanted = [number_in(expected) for expected in expected_of(row)]
    return float(any(abs(said - one) <= tolerance * abs(one) for one in wanted if one is not None))


def gsm8k(row: Row, answer: str, argument: str = "") -> float:
    return numeric(row, answer, behind_hashes=True)


@functools.lru_cache
def pattern_of(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"scorer regex: {pattern!r} is no regular expression ({error})") from error


def regex(row: Row, answer: str, argument: str = "") -> float:
    return float(pattern_of(argument or field_of(row, "pattern")).search(answer) is not None)
