"""How alike texts are (ROUGE-L), and what the filters of questions and answers look at."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_WORDS = re.compile(r"[^\W_]+")
# What a refusal starts with ("sorry to hear" is sympathy); only short answers are judged by it.
_SORRY = re.compile(r"\b(sorry(?! (to|for|about)\b)|i can(no|')t|i am unable|i'm unable|as an ai)\b", re.IGNORECASE)
_START = 100  # characters
_SHORT = 80  # words


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits."""
    return _WORDS.findall(text.lower())


_EMPTY_WORDS = frozenset(
    words(
        "a an and are as at be but by for from had has have he her his i if in is it its me my no not of on or our she "
        "so that the their them there they this to was we were will with you your"
    )
)


def rouge_l(first: Sequence[str], second: Sequence[str]) -> float:
    """ROUGE-L's F1 of two lists of words: by their longest common subsequence (Lin 2004)."""
    if not first or not second:
        return 0.0
    return 2 * common_subsequence(first, second) / (len(first) + len(second))


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time, in the bits of one integer.

    Source: Hyyrö, "Bit-parallel LCS-length computation revisited", 2004.
    """
    places: dict[str, int] = {}
    for number, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << number
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        met = row & places.get(word, 0)
        row = (row + met | row - met) & full
    return len(first) - row.bit_count()


class Novelty:
    """A growing pool of texts; a new one must be less alike to every one of them than `limit` (ROUGE-L)."""

    def __init__(self, texts: Iterable[str], limit: float = 0.7):
        self._pool = [words(text) for text in texts]
        self._limit = limit

    def nearest(self, text: str) -> float:
        """The largest ROUGE-L with a text of the pool that reaches the limit, else something below the limit."""
        new = words(text)
        largest = 0.0
        for old in self._pool:
            if not new or not old:
                continue
            # No more words than the shorter one has can be common.
            if 2 * min(len(new), len(old)) / (len(new) + len(old)) < self._limit:
                continue
            largest = max(largest, rouge_l(new, old))
        return largest

    def add(self, text: str) -> bool:
        """Adds the text if it is new, and tells whether it was."""
        if self.nearest(text) >= self._limit:
            return False
        self._pool.append(words(text))
        return True


def is_refusal(text: str) -> bool:
    """A short answer that starts with being sorry, or with what it can't."""
    return len(text.split()) < _SHORT and _SORRY.search(text[:_START].replace("’", "'")) is not None


def says_nothing(text: str) -> bool:
    """Nothing but punctuation and words without a meaning of their own."""
    return all(word in _EMPTY_WORDS for word in words(text))


def key(text: str) -> str:
    """Equal for texts that differ in case, punctuation and blanks only; for texts without words, the text itself."""
    return " ".join(words(text)) or text.strip()
