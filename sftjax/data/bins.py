"""First-fit and best-fit into open bins: which row each sample goes to.

A set of bins stays open until a sample fits into none of them; then all its bins come out as rows, and that sample
begins the next set. The choice is that of Grain's `BestFitPackIterDataset` and `FirstFitPackIterDataset`, which are the
tests' reference; here only lengths are compared, and nothing is copied into bins, which takes a tenth of the time.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

import numpy as np

STRATEGIES = ("best_fit", "first_fit", "none", "padding_free")  # the last two are one bin, so that the order stays


class Bins:
    """A set of open bins: for one sample after the other, which bin takes it.

    Args:
      strategy: one of STRATEGIES.
      count: bins of a set (where the strategy has more than one).
      capacity: tokens in a bin.
      most: samples in a bin.
    """

    def __init__(self, strategy: str, *, count: int, capacity: int, most: int):
        self.best = strategy == "best_fit"
        self.count = count if strategy in ("best_fit", "first_fit") else 1
        self.capacity, self.most = capacity, most
        self.open()

    def open(self) -> None:
        """All bins are empty again."""
        self._left = [self.most] * self.count
        self._free = np.full(self.count, self.capacity)  # first-fit: of each bin
        self._by_free = [(self.capacity, i) for i in range(self.count)]  # best-fit: the bins that take more, ascending

    def place(self, length: int) -> int | None:
        """The bin that takes a sample of so many tokens; None if it fits into none.

        Raises:
          ValueError: it wouldn't fit into an empty bin.
        """
        if not 0 < length <= self.capacity:
            raise ValueError(f"a sample of {length} tokens for bins of {self.capacity}: see packing.fit_to_length")
        return self._best_fit(length) if self.best else self._first_fit(length)

    def _first_fit(self, length: int) -> int | None:
        fits = self._free >= length
        number = int(fits.argmax())
        if not fits[number]:
            return None
        self._left[number] -= 1
        self._free[number] -= length
        if not self._left[number]:
            self._free[number] = 0
        return number

    def _best_fit(self, length: int) -> int | None:
        at = bisect_left(self._by_free, (length,))
        if at == len(self._by_free):
            return None
        free, number = self._by_free.pop(at)
        self._left[number] -= 1
        if self._left[number] and free > length:
            insort(self._by_free, (free - length, number))
        return number


def lay_out(lengths: Iterable[int], bins: Bins) -> Iterator[list[int]]:
    """Rows, each the numbers of the samples in it, for samples of these lengths in this order; not shuffled."""
    bins.open()
    rows: list[list[int]] = [[] for _ in range(bins.count)]
    for number, length in enumerate(lengths):
        if (place := bins.place(length)) is None:
            yield from filter(None, rows)
            bins.open()
            rows = [[] for _ in range(bins.count)]
            place = bins.place(length)
        rows[place].append(number)
    yield from filter(None, rows)
