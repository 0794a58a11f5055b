"""Finds control tokens that data spell, and hides them for the time of rendering.

Each is written in private-use characters, as many as it has, so that every place in the rendered text stays the same,
and the template's own control tokens can be told from the data's:

    user says     what is <|im_end|> ?
    hidden        what is XXXXXXXXXX ?        X: one private-use character for each control token

Vocabularies can have thousands (Gemma has 6,000 `<unused…>`), so they are looked up by length and not by one pattern.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

_BASE = 0xF0000  # plane 15, for private use
_MAX_BEGINNINGS = 16
_HTML = (
    "a b i u s p br hr em li ol ul td th tr h1 h2 h3 h4 h5 h6 sub sup code caption table thead tbody tfoot blockquote"
    " strong div span pre img"
)
# Gemma lists these and blanks as added tokens: they are text.
HTML_TAG = re.compile(rf"</?(?:{'|'.join(_HTML.split())})>")
_HIDDEN = re.compile(f"[{chr(_BASE)}-{chr(_BASE + 0xFFFD)}]")


class ControlText:
    """Hides and unhides control tokens in text.

    Args:
      names: all control tokens.
      kept_in_answers: those that stay as they are in answers.
    """

    def __init__(self, names: Iterable[str], kept_in_answers: Collection[str] = ()):
        self._names = sorted(names)
        self._numbers = {name: i for i, name in enumerate(self._names)}
        self._kept = frozenset(kept_in_answers)
        self._lengths = sorted({len(name) for name in self._names}, reverse=True)  # the longest wins, as in tokenizers
        self._beginnings = _beginnings(self._names)
        written = "|".join(map(re.escape, self._beginnings)) or r"(?!)"
        self._beginning = re.compile(f"(?={written})")  # takes no character: the next may begin inside of this one

    def possible(self, text: str) -> bool:
        """A quick look; False means that the text spells no control token."""
        return any(map(text.__contains__, self._beginnings))

    def hide(self, text: str, *, answer: bool = False) -> str:
        """`text` with each spelled control token in private-use characters, as many as it has."""
        if not self.possible(text):
            return text
        parts, done = [], 0
        for match in self._beginning.finditer(text):
            start = match.start()
            if start < done:
                continue
            name = self._at(text, start)
            if name is not None and not (answer and name in self._kept):
                parts += [text[done:start], chr(_BASE + self._numbers[name]) * len(name)]
                done = start + len(name)
        return "".join([*parts, text[done:]])

    def _at(self, text: str, start: int) -> str | None:
        for length in self._lengths:
            if (name := text[start : start + length]) in self._numbers:
                return name
        return None

    def unhide(self, text: str) -> str:
        """The inverse of `hide`, on a rendering too; characters that hide nothing stay."""
        parts, done = [], 0
        for match in _HIDDEN.finditer(text):
            start, number = match.start(), ord(match[0]) - _BASE
            if start < done or number >= len(self._names):
                continue
            name = self._names[number]
            if text[start : start + len(name)] == match[0] * len(name):
                parts += [text[done:start], name]
                done = start + len(name)
        return "".join([*parts, text[done:]])


def _beginnings(names: Sequence[str]) -> list[str]:
    """What all names begin with, as many characters as leave few of them: data has many a `<`, and hardly any `<|i`."""
    for length in (3, 2):
        found = sorted({name[:length] for name in names})
        if len(found) <= _MAX_BEGINNINGS:
            return found
    return sorted({name[0] for name in names})
