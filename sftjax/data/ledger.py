"""The ledger: what became of every row and every token, per source; nothing is lost without an entry here.

For each source, at any moment:  tokens in + repeated = packed + waiting in the packer + lost.
It is a plain record (`snapshot()` is JSON), because it travels with the data position and so survives a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sftjax.data.types import Sample

FLAGS_KEPT, OTHER_FLAGS = 100, "others"  # kinds of flags told apart; the rest are counted together
ROWS_KEPT = 20  # row numbers written down per reason; the count goes on

COUNTERS = (
    "rows",  # rows read
    "empty_rows",  # of these, rows that gave no sample to the packer
    "samples",  # samples the encoder gave
    "tokens",  # their tokens
    "trained",  # their trained tokens (weight not 0, and something stands before them)
    "lost_tokens",  # tokens cut off, or in dropped samples
    "lost_trained",  # trained ones among them
    "repeated",  # tokens that stand in two pieces of a split sample
    "truncated",  # samples cut
    "split",  # samples split into pieces
)


def trained_tokens(sample: Sample) -> int:
    """Tokens of a sample that count in the loss."""
    return int(np.count_nonzero(sample.weights[1:]))


class Ledger:
    """Counts per source; see the module's docstring for the balance that holds."""

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self.details: dict[str, str] = {}  # reason -> what was said of the first row, since this run began
        self._counts = [dict.fromkeys(COUNTERS, 0) for _ in self.names]
        self._flags: list[dict[str, int]] = [{} for _ in self.names]
        # reason -> (count, first rows). Entries are replaced, never changed in place: snapshots share them.
        self._dropped: list[dict[str, tuple[int, tuple[int, ...]]]] = [{} for _ in self.names]

    def add(self, source: int, **amounts: int) -> None:
        """Adds to counters of one source."""
        counts = self._counts[source]
        for name, amount in amounts.items():
            counts[name] += amount

    def flag(self, source: int, flags: Iterable[str]) -> None:
        """Counts the flags of a sample."""
        counts = self._flags[source]
        for flag in flags:
            if flag not in counts and len(counts) >= FLAGS_KEPT:  # data name columns and keys as they like
                flag = OTHER_FLAGS
            counts[flag] = counts.get(flag, 0) + 1

    def drop(self, source: int, row: int, reason: str, detail: str = "") -> None:
        """Writes down that row `row`, or a sample of it, was dropped because of `reason`; of the first one `detail`."""
        self.details.setdefault(reason, detail)
        count, rows = self._dropped[source].get(reason, (0, ()))
        if len(rows) < ROWS_KEPT and row not in rows:
            rows = (*rows, row)
        self._dropped[source] = {**self._dropped[source], reason: (count + 1, rows)}

    def total(self, counter: str) -> int:
        """A counter over all sources."""
        return sum(counts[counter] for counts in self._counts)

    def of(self, source: int, counter: str) -> int:
        """A counter of one source."""
        return self._counts[source][counter]

    def reasons(self, location: Callable[[int, int], str]) -> dict[str, dict[str, Any]]:
        """reason -> {"count", "rows": {source name: where the first rows stand}} over all sources.

        Args:
          location: gives the place of a row, from the numbers of its source and of the row (`Mixture.location`).
        """
        found: dict[str, dict[str, Any]] = {}
        for source, (name, dropped) in enumerate(zip(self.names, self._dropped, strict=True)):
            for reason, (count, rows) in dropped.items():
                entry = found.setdefault(reason, {"count": 0, "rows": {}})
                entry["count"] += count
                entry["rows"][name] = [location(source, row) for row in rows]
        return found

    def flags(self) -> dict[str, int]:
        """Samples per flag, over all sources."""
        found: dict[str, int] = {}
        for flags in self._flags:
            for flag, count in flags.items():
                found[flag] = found.get(flag, 0) + count
        return found

    def snapshot(self) -> dict[str, Any]:
        """A JSON-able copy: source name -> counters, `flags`, `dropped`."""
        return {
            name: {
                **self._counts[i],
                "flags": dict(self._flags[i]),
                "dropped": {r: {"count": c, "rows": list(rows)} for r, (c, rows) in self._dropped[i].items()},
            }
            for i, name in enumerate(self.names)
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Takes over a `snapshot()`; sources are matched by name."""
        for i, name in enumerate(self.names):
            saved = snapshot[name]
            self._counts[i] = {counter: saved[counter] for counter in COUNTERS}
            self._flags[i] = dict(saved["flags"])
            self._dropped[i] = {r: (d["count"], tuple(d["rows"])) for r, d in saved["dropped"].items()}
