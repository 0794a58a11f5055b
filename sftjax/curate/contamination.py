"""Benchmark items that occur in the training rows, by runs of 8 words (and of 13 beside).

    item     w0 w1 w2 w3 w4 w5 w6 w7 w8 w9 ...      a word counts as covered when it stands in a run of 8 words
    rows     ..... [w1 .......... w8] .....         that also stands in a prompt or a response of any row

An item is contaminated when more than half of its words are covered (the measure of Tulu 3). An item shorter than 8
words is contaminated when all of it is a message, or, from 5 words on, stands in one. Words are compared without
regard to case and punctuation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from sftjax.curate.text import grams, word_hashes, words
from sftjax.data.sources import open_source
from sftjax.data.types import RowError
from sftjax.errors import ConfigError

N, LONG_N = 8, 13
_SHORTEST_INSIDE = 5
_USUAL_FIELDS = ("question", "prompt", "instruction", "problem", "query", "goal", "ctx", "context", "sentence", "text")
_BETWEEN = np.uint64(0x5BF03635)  # stands between messages: no run of a benchmark has it


@dataclass(frozen=True)
class Item:
    """One text of a benchmark."""

    benchmark: str
    row: int
    field: str
    words: tuple[str, ...]


class Hit(NamedTuple):
    """What one training row has in common with one item: starts of runs of 8 and of 13 words, or all of it."""

    row: int
    item: int
    starts: tuple[int, ...]
    long_starts: tuple[int, ...]
    whole: bool


class Index:
    """Benchmark items by their runs of words. Made once, shared with worker processes."""

    def __init__(self, items: Sequence[Item]):
        self.items = list(items)
        hashes = [word_hashes(" ".join(item.words)) for item in items]
        self._runs = {n: _Postings(hashes, n) for n in (N, LONG_N)}
        self._short: dict[int, dict[int, list[int]]] = {}  # length -> hash -> items
        for number, one in enumerate(hashes):
            if 0 < len(one) < N:
                by_hash = self._short.setdefault(len(one), {})
                by_hash.setdefault(int(grams(one, len(one))[0]), []).append(number)

    def find(self, rows: Sequence[Sequence[np.ndarray]]) -> list[Hit]:
        """Hits of some rows, each given as the word hashes of its messages."""
        messages = [(number, hashes) for number, row in enumerate(rows) for hashes in row]
        if not messages or not self.items:
            return []
        gap = np.array([_BETWEEN])
        flat = np.concatenate([part for _, hashes in messages for part in (hashes, gap)])
        ends = np.cumsum([len(hashes) + 1 for _, hashes in messages])
        found: dict[tuple[int, int], tuple[set, set, list]] = {}

        def entry(place: int, item: int):
            row = messages[int(np.searchsorted(ends, place, side="right"))][0]
            return found.setdefault((row, item), (set(), set(), []))

        for kind, n in enumerate((N, LONG_N)):
            for place, item, start in self._runs[n].find(grams(flat, n)):
                entry(place, item)[kind].add(start)
        for length, by_hash in self._short.items():
            runs = grams(flat, length)
            for place in np.flatnonzero(np.isin(runs, np.fromiter(by_hash, np.uint64, len(by_hash)))).tolist():
                whole = flat[place + length] == _BETWEEN and (place == 0 or flat[place - 1] == _BETWEEN)
                if whole or length >= _SHORTEST_INSIDE:
                    for item in by_hash[int(runs[place])]:
                        entry(place, item)[2].append(True)
        return [
            Hit(row, item, tuple(sorted(starts)), tuple(sorted(long_starts)), bool(whole))
            for (row, item), (starts, long_starts, whole) in sorted(found.items())
        ]


class _Postings:
    """Where each run of n words stands in the items."""

    def __init__(self, hashes: Sequence[np.ndarray], n: int):
        runs = [grams(one, n) for one in hashes]
        flat = np.concatenate(runs) if runs else np.zeros(0, np.uint64)
        item = np.repeat(np.arange(len(runs)), [len(one) for one in runs])
        start = np.concatenate([np.arange(len(one)) for one in runs]) if runs else np.zeros(0, np.int64)
        order = np.argsort(flat, kind="stable")
        self._keys, self._item, self._start = flat[order], item[order], start[order]

    def find(self, runs: np.ndarray) -> Iterable[tuple[int, int, int]]:
        """(place in `runs`, item, start in the item)."""
        if not len(self._keys) or not len(runs):
            return
        low = np.searchsorted(self._keys, runs, side="left")
        hit = np.flatnonzero(self._keys[np.minimum(low, len(self._keys) - 1)] == runs)
        high = np.searchsorted(self._keys, runs[hit], side="right")
        for place, first, last in zip(hit.tolist(), low[hit].tolist(), high.tolist(), strict=True):
            for at in range(first, last):
                yield place, int(self._item[at]), int(self._start[at])


def load_items(specs: Sequence[Mapping[str, Any]]) -> list[Item]:
    """Items of benchmark files.

    Args:
      specs: each as data.sources.open_source takes it, and optionally `columns`: which fields of a row to look at
        (default: the first of the usual ones that is there, such as question or prompt; else all that are text).

    Raises:
      ConfigError: a file has no such column.
      DataError, StorageError: a file can't be read.
    """
    items = []
    for spec in specs:
        spec = dict(spec)
        columns = spec.pop("columns", ())
        source = open_source(spec)
        name = spec.get("name") or str(spec["path"]).replace("\\", "/").rsplit("/", 1)[-1]
        for number in range(len(source)):
            try:
                row = source[number]
            except RowError:
                continue
            for column, text in _texts(row, columns, name):
                if found := tuple(words(text)):
                    items.append(Item(name, number, column, found))
    return items


def _texts(row: Mapping[str, Any], columns: Sequence[str], name: str) -> Iterable[tuple[str, str]]:
    columns = [columns] if isinstance(columns, str) else columns
    for column in columns:
        if column not in row:
            raise ConfigError(f"benchmark {name}: a row has no field {column!r}, only {', '.join(map(str, row))}")
    usual = next((column for column in _USUAL_FIELDS if isinstance(row.get(column), str)), None)
    for column in columns or ([usual] if usual else row):
        for text in _strings(row[column]):
            yield column, text


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _strings(one)


# --- the verdict ----------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """Which items are contaminated, by which rows.

    Attributes:
      benchmarks: name -> counts: rows, contaminated (rows), by_runs, whole, by_long_runs.
      items: contaminated items: {"benchmark", "row", "field", "coverage", "long_coverage", "spans", "rows"}.
      remove: row -> what it leaks, in words. Without these rows no item is contaminated any more.
    """

    benchmarks: dict[str, dict[str, int]] = field(default_factory=dict)
    items: list[dict[str, Any]] = field(default_factory=list)
    remove: dict[int, str] = field(default_factory=dict)


def judge(index: Index, hits: Iterable[Hit], threshold: float = 0.5) -> Verdict:
    """What the hits of all rows come to.

    Rows are removed from the one that covers most of an item on, until what the others cover is at or below the
    threshold: a row that only shares a common phrase with a leaked item stays.
    """
    by_item: dict[int, list[Hit]] = {}
    for hit in hits:
        by_item.setdefault(hit.item, []).append(hit)
    verdict = Verdict()
    touched: dict[str, dict[str, set[int]]] = {}
    for item in index.items:
        counts = touched.setdefault(item.benchmark, {})
        counts.setdefault("rows", set()).add(item.row)
    for number, found in sorted(by_item.items()):
        item = index.items[number]
        size = len(item.words)
        covered = _covered(size, (hit.starts for hit in found), N)
        long_covered = _covered(size, (hit.long_starts for hit in found), LONG_N)
        whole = any(hit.whole for hit in found)
        by_runs, by_long = covered.mean() > threshold, long_covered.mean() > threshold
        for kind, value in (("whole", whole), ("by_runs", by_runs), ("by_long_runs", by_long)):
            if value:
                touched[item.benchmark].setdefault(kind, set()).add(item.row)
        if not (whole or by_runs):
            continue
        touched[item.benchmark].setdefault("contaminated", set()).add(item.row)
        rows = _to_remove(size, found, threshold)
        spans = [" ".join(item.words)] if whole else _spans(item.words, covered)
        verdict.items.append(
            {
                "benchmark": item.benchmark,
                "row": item.row,
                "field": item.field,
                "coverage": 1.0 if whole else round(float(covered.mean()), 4),
                "long_coverage": round(float(long_covered.mean()), 4),
                "spans": spans[:3],
                "rows": rows,
            }
        )
        for row in rows:
            share = verdict.items[-1]["coverage"]
            verdict.remove.setdefault(
                row, f"{item.benchmark} row {item.row}, {item.field}: {share:.0%}: “{spans[0][:200]}”"
            )
    kinds = ("rows", "contaminated", "by_runs", "whole", "by_long_runs")
    verdict.benchmarks = {name: {kind: len(sets.get(kind, ())) for kind in kinds} for name, sets in touched.items()}
    return verdict


def _covered(size: int, starts: Iterable[Sequence[int]], n: int) -> np.ndarray:
    """bool [size]: words that stand in a run."""
    covered = np.zeros(size, bool)
    for some in starts:
        for start in some:
            covered[start : start + n] = True
    return covered


def _to_remove(size: int, found: Sequence[Hit], threshold: float) -> list[int]:
    own = {hit.row: _covered(size, [hit.starts], N) for hit in found}
    rows = [hit.row for hit in found if hit.whole]
    rest = sorted((row for row in own if row not in rows), key=lambda row: (-own[row].sum(), row))
    while rest and np.any([own[row] for row in rest], axis=0).mean() > threshold:
        rows.append(rest.pop(0))
    return rows


def _spans(found: Sequence[str], covered: np.ndarray) -> list[str]:
    """The covered stretches as text, longest first."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], covered, [False]]).astype(np.int8)))
    spans = [" ".join(found[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return sorted(spans, key=len, reverse=True)
