"""Exact and near duplicates. Of each group the best-scored row stays; between equals, the first.

Near: MinHash signatures of word shingles (rensa), banded so that pairs at the threshold are missed once in a hundred,
and every candidate pair verified by its exact Jaccard index. A row is removed only for a row that stays: similarity is
not passed on from row to row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import rensa

from sftjax.curate.text import grams

PERMUTATIONS = 128
_SEED = 42


class Duplicate(NamedTuple):
    """A row to remove, the row that stays for it, and how similar they are (0..1)."""

    row: int
    of: int
    similarity: float


def exact_duplicates(keys: Sequence[bytes], order: Iterable[int]) -> list[Duplicate]:
    """Rows whose key was seen before, going through the rows in this order."""
    first: dict[bytes, int] = {}
    return [Duplicate(row, of, 1.0) for row in order if (of := first.setdefault(keys[row], row)) != row]


def shingles(hashes: np.ndarray, n: int) -> np.ndarray:
    """uint32 [s], sorted and distinct: the runs of n words; a text of fewer words is one run, one of none has none."""
    runs = grams(hashes, max(1, min(n, len(hashes))))
    return np.unique((runs >> np.uint64(32)).astype(np.uint32))


def signatures(sets: Sequence[np.ndarray]) -> np.ndarray:
    """uint32 [len(sets), PERMUTATIONS]: MinHash of sets of shingles."""
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in sets])]).astype(np.uint64)
    flat = np.concatenate(sets).astype(np.uint64) if len(sets) else np.zeros(0, np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, PERMUTATIONS, _SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(sets), PERMUTATIONS)


def rows_in_band(threshold: float) -> int:
    """The most rows a band may have so that a pair at the threshold shares one with a chance of 0.99."""
    fits = [r for r in range(1, 33) if (1 - threshold**r) ** (PERMUTATIONS // r) <= 0.01]
    return max(fits, default=1)


class Shingled(NamedTuple):
    """Shingles of rows one behind the other, those of row i from offsets[i] to offsets[i + 1]."""

    flat: np.ndarray
    offsets: np.ndarray

    def of(self, row: int) -> np.ndarray:
        return self.flat[self.offsets[row] : self.offsets[row + 1]]


def near_duplicates(
    signs: np.ndarray,
    flat: np.ndarray,
    offsets: np.ndarray,
    order: Iterable[int],
    threshold: float,
    *,
    alike: Callable[[int, int], bool] = lambda row, other: True,
) -> list[Duplicate]:
    """Rows at least as similar as `threshold` to one that stays, going through the rows in this order.

    Args:
      signs: uint32 [rows, PERMUTATIONS].
      flat: the rows' shingles one behind the other, those of row i from offsets[i] to offsets[i + 1].
      order: rows to look at, best first; others are as if they weren't there.
      threshold: of the Jaccard index.
      alike: whether two rows whose text is as similar can be duplicates.
    """
    texts = Shingled(flat, offsets)
    buckets = _buckets(signs, rows_in_band(threshold))
    staying: dict[int, list[int]] = {}
    found = []
    for row in order:
        if offsets[row] == offsets[row + 1]:
            continue  # no words: neither like another nor unlike
        mine = buckets[row][buckets[row] >= 0].tolist()
        candidates = {other for bucket in mine for other in staying.get(bucket, ())}
        best = _best(row, candidates, signs, texts, alike, threshold) if candidates else None
        if best is not None:
            found.append(best)
            continue
        for bucket in mine:
            staying.setdefault(bucket, []).append(row)
    return found


def _buckets(signs: np.ndarray, size: int) -> np.ndarray:
    """int64 [rows, bands]: numbers of the buckets that a row shares with others; -1 where it is alone."""
    bands = []
    start = 0
    for band in range(signs.shape[1] // size):
        keys = grams_of_columns(signs[:, band * size : (band + 1) * size])
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        bands.append(np.where(counts[inverse] > 1, inverse + start, -1))
        start += len(counts)
    return np.stack(bands, axis=1) if bands else np.zeros((len(signs), 0), np.int64)


@dataclass(frozen=True)
class Lessons:
    """What two rows have to share, beside their words, to teach the same.

    Attributes:
      kinds: uint64 [rows], see `text.kind_of`.
      numbers: see `text.numbers_of`.
      answers: shingles of the answers.
    """

    kinds: np.ndarray
    numbers: Shingled
    answers: Shingled

    def may_be_alike(self, row: int, other: int) -> bool:
        """The same calls and system text, and no number in the place of another (one more or less may be)."""
        mine, others = self.numbers.of(row), self.numbers.of(other)
        other_numbers = len(np.setdiff1d(mine, others, True)) and len(np.setdiff1d(others, mine, True))
        return self.kinds[row] == self.kinds[other] and not other_numbers

    def alike(self, row: int, other: int, least: float) -> bool:
        """The same lesson, by answers with a Jaccard index of at least so much."""
        return self.may_be_alike(row, other) and jaccard(self.answers.of(row), self.answers.of(other)) >= least


def grams_of_columns(columns: np.ndarray) -> np.ndarray:
    """One uint64 for each row of small numbers."""
    keys = np.zeros(len(columns), np.uint64)
    for column in columns.T:
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + column.astype(np.uint64) + np.uint64(1)
        keys ^= keys >> np.uint64(29)
    return keys


def _best(row, candidates, signs, texts: Shingled, alike, threshold) -> Duplicate | None:
    others = np.fromiter(sorted(candidates), np.int64, len(candidates))
    estimate = (signs[others] == signs[row]).mean(axis=1)
    likely = others[estimate >= threshold - 0.2]  # five standard deviations of the estimate
    best = None
    for other in likely.tolist():
        similarity = jaccard(texts.of(row), texts.of(other))
        if similarity < threshold or (best is not None and similarity <= best.similarity):
            continue
        if alike(row, other):
            best = Duplicate(row, other, round(similarity, 4))
    return best


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sorted arrays of distinct values; 1 for two empty ones."""
    if not len(a) and not len(b):
        return 1.0
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
