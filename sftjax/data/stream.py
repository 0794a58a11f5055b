"""Samples in stream order and rows of them, with worker processes and an exact position.

Worker processes only turn rows into lists of samples (1:1). Everything that depends on what came before (dropping,
over-length, packing, batching) happens in the process that asked, so the sequence is the same with any number of
workers, and a position saved with two is good for none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from typing import Any

import grain
import numpy as np

from sftjax.data import packing
from sftjax.data.bins import Bins
from sftjax.data.ledger import Ledger
from sftjax.data.mixture import Mixture
from sftjax.data.types import Sample
from sftjax.data.workers import EncodedRow, read_rows
from sftjax.errors import ConfigError, DataError

REDUCTIONS = ("token", "example")
_WORKER_RESTARTS = 3  # in a row, without a row in between
_GRACE_ROWS = 1000  # the share of dropped rows is judged as if at least so many had been read

log = logging.getLogger(__name__)


class SampleStream(grain.IterDataset):
    """Elements for the packer (`packing.Element`), in stream order."""

    def __init__(
        self,
        mixture: Mixture,
        *,
        length: int,
        overlong: str = "truncate",
        reduction: str = "token",
        workers: int = 0,
        max_dropped: float = 1.0,
    ):
        """A stream over a mixture.

        Args:
          mixture: the rows.
          length: most tokens of a sample.
          overlong: see `packing.fit_to_length`.
          reduction: "token" leaves weights as they are; "example" scales each sample's so that they add up to 1.
          workers: processes that read and encode; 0 = this one.
          max_dropped: DataError once more than this share of the rows read gave no sample.
        """
        super().__init__()
        if overlong not in packing.OVERLONG:
            raise ConfigError(f"data.over_length={overlong!r} is unknown: choose one of {', '.join(packing.OVERLONG)}")
        if reduction not in REDUCTIONS:
            raise ConfigError(f"train.loss_reduction={reduction!r} is unknown: choose one of {', '.join(REDUCTIONS)}")
        if workers < 0:
            raise ConfigError(f"data.workers={workers} must be 0 or more")
        self.mixture, self.length, self.overlong, self.reduction = mixture, length, overlong, reduction
        self.workers, self.max_dropped = workers, max_dropped

        self.opened: SampleIterator | None = None  # the iterator that the packer reads

    def __iter__(self) -> SampleIterator:
        self.opened = SampleIterator(self)
        return self.opened


class SampleIterator(grain.DatasetIterator):
    """Iterator with state {"row", "piece", "carry", "ledger"}: the next row, and how many of its pieces were given.

    `carry` counts the dropped rows since the last piece; it goes into the next piece's share, so that the shares add up
    to the rows passed.
    """

    def __init__(self, stream: SampleStream):
        super().__init__()
        self._stream = stream
        self.ledger = Ledger(stream.mixture.names)
        self._row, self._piece, self._carry = 0, 0, 0
        self._pieces: list[Sample] | None = None  # of row `_row`
        self._before: dict[str, Any] | None = None  # the ledger as it was before row `_row`
        self._snapshot: dict[str, Any] | None = None  # the ledger as it is; None: not taken since the last change
        self._carry_before = 0
        self._since_sample = 0
        self._rows: Generator[EncodedRow, None, None] | None = None

    def __next__(self) -> packing.Element:
        while self._pieces is None or self._piece >= len(self._pieces):
            self._read_row()
        piece = self._pieces[self._piece]
        share = 1 / len(self._pieces) + (self._carry if self._piece == 0 else 0)
        loss_weight = self._stream.mixture.ingredients[piece.source].loss_weight
        element = packing.Element(piece, loss_weight=loss_weight, share=share)
        self._piece += 1
        if self._piece == len(self._pieces):
            self._row, self._piece, self._pieces, self._carry = self._row + 1, 0, None, 0
        return element

    def get_state(self) -> dict[str, Any]:
        if self._pieces is None:
            return {"row": self._row, "piece": 0, "carry": self._carry, "ledger": self._ledger_now()}
        return {"row": self._row, "piece": self._piece, "carry": self._carry_before, "ledger": self._before}

    def set_state(self, state: dict[str, Any]) -> None:
        self.close()
        self._row, self._piece, self._carry = state["row"], state["piece"], state["carry"]
        self._pieces = self._snapshot = None
        self.ledger.restore(state["ledger"])

    def close(self) -> None:
        """Stops the workers."""
        if self._rows is not None:
            self._rows.close()
        self._rows = None

    def _read_row(self) -> None:
        """Reads row `_row`; one without pieces is passed over."""
        self._before, self._carry_before = self._ledger_now(), self._carry
        row = self._next_row()
        self._snapshot = None
        pieces = account(self.ledger, row, self._stream.length, self._stream.overlong, self._stream.mixture.location)
        if self._stream.reduction == "example":
            pieces = count_alike(pieces, self._stream.mixture.location)
        if pieces:
            self._pieces, self._since_sample = pieces, 0
            return
        self._row, self._piece, self._carry = self._row + 1, 0, self._carry + 1
        self._since_sample += 1
        self._judge_losses()

    def _ledger_now(self) -> dict[str, Any]:
        if self._snapshot is None:
            self._snapshot = self.ledger.snapshot()
        return self._snapshot

    def _next_row(self) -> EncodedRow:
        """The next row; workers that were killed are started again at the same place."""
        for attempt in range(_WORKER_RESTARTS + 1):
            try:
                if self._rows is None:
                    self._rows = read_rows(self._stream.mixture, self._row, self._stream.workers)
                return next(self._rows)
            except BrokenExecutor as error:
                self.close()
                if attempt == _WORKER_RESTARTS:
                    raise DataError(
                        f"a data worker process died {attempt + 1} times at row {self._row} of the stream (out of "
                        "memory?): set data.workers=0 to see why"
                    ) from error
                log.warning("a data worker process died; starting again at row %d of the stream", self._row)
        raise AssertionError("unreachable")

    def _judge_losses(self) -> None:
        read, empty = self.ledger.total("rows"), self.ledger.total("empty_rows")
        location = self._stream.mixture.location
        if self._since_sample >= self._stream.mixture.rows_per_epoch:
            raise DataError(f"a whole epoch gave no training sample: {explain_drops(self.ledger, location)}")
        if empty > self._stream.max_dropped * max(read, _GRACE_ROWS):
            raise DataError(
                f"{empty} of {read} rows gave no sample, more than "
                f"data.max_dropped_fraction={self._stream.max_dropped:g} allows: "
                f"{explain_drops(self.ledger, location)}; mend the rows, or raise the limit"
            )


class PackedRows(grain.IterDataset):
    """Rows of samples: lists of the parent's elements.

    Args:
      parent: gives elements that have a length.
      bins: the bins.
      shuffle: shuffle the rows of each set of bins (their fill depends on the order).
      seed: for that shuffle.
    """

    def __init__(self, parent: grain.IterDataset, bins: Bins, *, shuffle: bool = False, seed: int = 0):
        super().__init__(parent)
        self.bins, self.shuffle, self.seed = bins, shuffle, seed

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedRows(iter(self._parent), self)


class _PackedRows(grain.DatasetIterator):
    """Iterator with state {"parent", "next_row", "counter"}: the parent's before the set of bins, rows of it given, and
    rows given in all."""

    def __init__(self, parent: grain.DatasetIterator, dataset: PackedRows):
        super().__init__(parent)
        self._dataset = dataset
        self._start(parent.get_state(), 0, 0)

    def _start(self, state: dict[str, Any], next_row: int, counter: int) -> None:
        self._state, self._next_row, self._counter = state, next_row, counter
        self._rows: Sequence[list] = ()
        self._state_behind: dict[str, Any] | None = None  # the parent's behind the set of bins
        self._waiting: Any = None  # the element there, already read

    def __next__(self) -> list:
        if not self._rows:
            self._rows = self._pack()
        row = self._rows[self._next_row]
        self._next_row, self._counter = self._next_row + 1, self._counter + 1
        if self._next_row == len(self._rows):
            self._state, self._rows, self._next_row = self._state_behind, (), 0
        return row

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._state, "next_row": self._next_row, "counter": self._counter}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._start(state["parent"], state["next_row"], state["counter"])

    def _pack(self) -> list[list]:
        """The rows of the next set of bins; StopIteration at the end."""
        bins = self._dataset.bins
        bins.open()
        rows: list[list] = [[] for _ in range(bins.count)]
        element = next(self._parent) if self._waiting is None else self._waiting
        while element is not None and (place := bins.place(len(element))) is not None:
            rows[place].append(element)
            self._state_behind = self._parent.get_state()
            element = next(self._parent, None)
        self._waiting = element
        rows = [row for row in rows if row]
        if self._dataset.shuffle:
            seed = self._dataset.seed + self._counter - self._next_row
            rows = [rows[i] for i in np.random.default_rng(seed).permuted(range(len(rows)))]
        return rows


def account(ledger: Ledger, row: EncodedRow, length: int, overlong: str, location: Any) -> list[Sample]:
    """Applies the over-length policy to a row's samples and books all of it; returns the pieces to pack."""
    source = row.source
    ledger.add(source, rows=1)
    if row.error is not None:
        ledger.drop(source, row.row, *row.error)
    pieces: list[Sample] = []
    for sample in row.samples:
        ledger.flag(source, sample.flags)
        fit = packing.fit_to_length(sample, length, overlong)
        ledger.add(source, samples=1, tokens=len(sample.tokens), trained=fit.trained)
        if fit.reason == "too_long" and overlong == "error":
            raise DataError(
                f"{location(source, row.row)}: a sample of {len(sample.tokens)} tokens is longer than max_length="
                f"{length}: raise max_length, or set data.over_length to drop, truncate or split"
            )
        if fit.reason is not None:
            ledger.drop(source, row.row, fit.reason)
        if fit.reason is not None or len(fit.pieces) != 1 or fit.pieces[0] is not sample:
            ledger.add(
                source,
                lost_tokens=fit.lost_tokens,
                lost_trained=fit.lost_trained,
                repeated=fit.repeated,
                split=int(len(sample.tokens) > length and overlong == "split"),
                truncated=int(len(sample.tokens) > length and overlong == "truncate" and len(fit.pieces) == 1),
            )
        pieces.extend(fit.pieces)
    if not pieces:
        ledger.add(source, empty_rows=1)
        if row.error is None and not row.samples:
            ledger.drop(source, row.row, "no_sample")
    return pieces


def count_alike(pieces: list[Sample], location: Any) -> list[Sample]:
    """The pieces of a row with weights scaled so that those of each sample, all its pieces together, add up to 1.

    Scaled before they are packed, samples count alike whatever packing, accumulation and devices do with them.
    """
    totals: dict[int, float] = {}
    for piece in pieces:
        totals[piece.sample] = totals.get(piece.sample, 0.0) + float(piece.weights[1:].sum(dtype=np.float64))
    for piece in pieces:
        if (total := totals[piece.sample]) <= 0:
            raise DataError(
                f"{location(piece.source, piece.index)}: the weights of this sample add up to {total:g}; "
                "with train.loss_reduction=example they must add up to more than 0"
            )
    return [replace(piece, weights=(piece.weights / totals[piece.sample]).astype(np.float32)) for piece in pieces]


def explain_drops(ledger: Ledger, location: Callable[[int, int], str]) -> str:
    """One line: the reasons, most frequent first, with the places of the first rows."""
    parts = []
    reasons = sorted(ledger.reasons(location).items(), key=lambda item: -item[1]["count"])
    for reason, entry in reasons:
        rows = next(iter(entry["rows"].values()))
        parts.append(f"{reason} ({entry['count']}; {', '.join(rows[:3])})")
    detail = ledger.details.get(reasons[0][0]) if reasons else ""
    said = f" ({reasons[0][0]}: {detail})" if detail else ""  # of a row with the most frequent reason
    return ("; ".join(parts) or "no reason given") + said
