"""Samples in stream order, with worker processes and an exact position.

Worker processes only turn rows into lists of samples (1:1). Everything that depends on what came before (dropping,
over-length, packing, batching) happens in the process that asked, so the sequence is the same with any number of
workers, and a position saved with two is good for none.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import grain
import numpy as np
from absl import flags

from sftjax.data import packing
from sftjax.data.ledger import Ledger
from sftjax.data.mixture import ENDLESS, Mixture
from sftjax.data.types import RowError, Sample
from sftjax.errors import ConfigError, DataError

REDUCTIONS = ("token", "example")
CHUNK = 64  # rows a worker encodes at a time: one message between processes, one call into the tokenizer
_CHUNKS_AHEAD = 4  # chunks each worker keeps ready
_WORKER_RESTARTS = 3  # in a row, without a row in between
_GRACE_ROWS = 1000  # the share of dropped rows is judged as if at least so many had been read

log = logging.getLogger(__name__)


class EncodedRow:
    """What became of one row: its samples, or why there are none."""

    __slots__ = ("error", "row", "samples", "source")

    def __init__(self, source: int, row: int, samples: list[Sample], error: tuple[str, str] | None):
        self.source, self.row, self.samples, self.error = source, row, samples, error


class EncodedChunk:
    """Rows in stream order, opaque to Grain's tree functions.

    Between processes it travels as two arrays, not as two for every sample.
    """

    __slots__ = ("rows",)

    def __init__(self, rows: list[EncodedRow]):
        self.rows = rows

    def __reduce__(self):
        samples = [sample for row in self.rows for sample in row.samples]
        rows = [(row.source, row.row, row.error, len(row.samples)) for row in self.rows]
        about = [(len(s.tokens), s.source, s.index, s.sample, s.flags) for s in samples]
        tokens = np.concatenate([s.tokens for s in samples]) if samples else None
        weights = np.concatenate([s.weights for s in samples]) if samples else None
        return _arrived, (rows, about, tokens, weights)


def _arrived(rows: list[tuple], about: list[tuple], tokens: np.ndarray | None, weights: np.ndarray | None):
    samples, begin = [], 0
    for length, *place in about:
        end = begin + length
        samples.append(Sample(tokens[begin:end], weights[begin:end], *place))
        begin = end
    left = iter(samples)
    return EncodedChunk([EncodedRow(source, row, [*islice(left, n)], error) for source, row, error, n in rows])


class _Chunks:
    """Grain source: element c = the encoded rows [start + c * CHUNK, ...) of the stream."""

    def __init__(self, mixture: Mixture, start: int):
        self._mixture, self._start = mixture, start

    def __len__(self) -> int:
        total = len(self._mixture)
        return sys.maxsize if total == ENDLESS else max(0, -(-(total - self._start) // CHUNK))

    def __getitem__(self, chunk: int) -> EncodedChunk:
        first = self._start + chunk * CHUNK
        return EncodedChunk(encode_rows(self._mixture, range(first, min(first + CHUNK, len(self._mixture)))))

    def __repr__(self) -> str:
        return f"rows from {self._start}"


def encode_rows(mixture: Mixture, places: range | list[int]) -> list[EncodedRow]:
    """Encodes the rows at some places of the stream, in that order."""
    out: list[EncodedRow | None] = [None] * len(places)
    by_source: dict[int, list[tuple[int, int, dict]]] = {}
    for i, place in enumerate(places):
        _, source, row = mixture.locate(place)
        try:
            by_source.setdefault(source, []).append((i, row, mixture.ingredients[source].source[row]))
        except RowError as error:
            out[i] = EncodedRow(source, row, [], (error.reason, error.detail))
    for source, rows in by_source.items():
        encoded = _encode(mixture.ingredients[source].encode, [r[2] for r in rows], [r[1] for r in rows], source)
        for (i, row, _), result in zip(rows, encoded, strict=True):
            failed = isinstance(result, RowError)
            error = (result.reason, result.detail) if failed else None
            out[i] = EncodedRow(source, row, [] if failed else result, error)
    return out


def _encode(encode: Any, records: list[dict], rows: list[int], source: int) -> list[list[Sample] | RowError]:
    if hasattr(encode, "encode_batch"):
        return encode.encode_batch(records, rows, source)
    results: list[list[Sample] | RowError] = []
    for record, row in zip(records, rows, strict=True):
        try:
            results.append(encode(record, row, source))
        except RowError as error:
            results.append(error)
    return results


def _start_worker(index: int, count: int) -> None:
    """In a worker: leave interrupts to the parent, one thread for the tokenizer, and don't outlive the parent."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()


def _die_with(parent: int) -> None:
    """Ends this process soon after its parent has ended (a killed parent can't tell its workers to stop).

    Not PR_SET_PDEATHSIG: that fires when the *thread* that started the worker ends.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


class SampleStream(grain.IterDataset):
    """Elements for the packer (`packing.to_element`), in stream order."""

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
            raise ConfigError(f"data.overlong={overlong!r} is unknown: choose one of {', '.join(packing.OVERLONG)}")
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
        self._carry_before = 0
        self._since_sample = 0
        self._rows: Iterator[EncodedRow] | None = None
        self._workers: grain.DatasetIterator | None = None

    def __next__(self) -> dict[str, Any]:
        while self._pieces is None or self._piece >= len(self._pieces):
            self._read_row()
        piece = self._pieces[self._piece]
        share = 1 / len(self._pieces) + (self._carry if self._piece == 0 else 0)
        loss_weight = self._stream.mixture.ingredients[piece.source].loss_weight
        element = packing.to_element(piece, loss_weight=loss_weight, share=share)
        self._piece += 1
        if self._piece == len(self._pieces):
            self._row, self._piece, self._pieces, self._carry = self._row + 1, 0, None, 0
        return element

    def get_state(self) -> dict[str, Any]:
        if self._pieces is None:
            return {"row": self._row, "piece": 0, "carry": self._carry, "ledger": self.ledger.snapshot()}
        return {"row": self._row, "piece": self._piece, "carry": self._carry_before, "ledger": self._before}

    def set_state(self, state: dict[str, Any]) -> None:
        self.close()
        self._row, self._piece, self._carry = state["row"], state["piece"], state["carry"]
        self._pieces = None
        self.ledger.restore(state["ledger"])

    def close(self) -> None:
        """Stops the workers."""
        if self._workers is not None:
            self._workers.close()
        self._workers = self._rows = None

    def _read_row(self) -> None:
        """Reads row `_row`; one without pieces is passed over."""
        self._before, self._carry_before = self.ledger.snapshot(), self._carry
        row = self._next_row()
        pieces = account(self.ledger, row, self._stream.length, self._stream.overlong, self._stream.mixture.location)
        if self._stream.reduction == "example":
            pieces = count_alike(pieces, self._stream.mixture.location)
        if pieces:
            self._pieces, self._since_sample = pieces, 0
            return
        self._row, self._piece, self._carry = self._row + 1, 0, self._carry + 1
        self._since_sample += 1
        self._judge_losses()

    def _next_row(self) -> EncodedRow:
        """The next row; workers that were killed are started again at the same place."""
        for attempt in range(_WORKER_RESTARTS + 1):
            try:
                if self._rows is None:
                    self._rows = self._open(self._row)
                return next(self._rows)
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error):
                    raise
                self.close()
                if attempt == _WORKER_RESTARTS:
                    raise DataError(
                        f"a data worker process died {attempt + 1} times at row {self._row} of the stream (out of "
                        "memory?): set data.workers=0 to see why"
                    ) from error
                log.warning("a data worker process died; starting again at row %d of the stream", self._row)
        raise AssertionError("unreachable")

    def _open(self, row: int) -> Iterator[EncodedRow]:
        chunks = grain.MapDataset.source(_Chunks(self._stream.mixture, row))
        dataset = chunks.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        if self._stream.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain hands its flags on to the workers
            options = grain.MultiprocessingOptions(self._stream.workers, per_worker_buffer_size=_CHUNKS_AHEAD)
            dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
        self._workers = iter(dataset)
        return (row for chunk in self._workers for row in chunk.rows)

    def _judge_losses(self) -> None:
        read, empty = self.ledger.total("rows"), self.ledger.total("empty_rows")
        if self._since_sample >= self._stream.mixture.rows_per_epoch:
            raise DataError(f"a whole epoch gave no training sample: {explain_drops(self.ledger)}")
        if empty > self._stream.max_dropped * max(read, _GRACE_ROWS):
            raise DataError(
                f"{empty} of {read} rows gave no sample, more than data.max_dropped={self._stream.max_dropped:g} "
                f"allows: "
                f"{explain_drops(self.ledger)}; mend the rows, or raise the limit"
            )


def account(ledger: Ledger, row: EncodedRow, length: int, overlong: str, location: Any) -> list[Sample]:
    """Applies the over-length policy to a row's samples and books all of it; returns the pieces to pack."""
    source = row.source
    ledger.add(source, rows=1)
    if row.error is not None:
        ledger.drop(source, row.row, row.error[0])
    pieces: list[Sample] = []
    for sample in row.samples:
        ledger.flag(source, sample.flags)
        fit = packing.fit_to_length(sample, length, overlong)
        ledger.add(source, samples=1, tokens=len(sample.tokens), trained=fit.trained)
        if fit.reason == "too_long" and overlong == "error":
            raise DataError(
                f"{location(source, row.row)}: a sample of {len(sample.tokens)} tokens is longer than max_length="
                f"{length}: raise max_length, or set data.overlong to drop, truncate or split"
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


def explain_drops(ledger: Ledger) -> str:
    """One line: the reasons, most frequent first, with the first row numbers."""
    parts = []
    for reason, entry in sorted(ledger.reasons().items(), key=lambda item: -item[1]["count"]):
        name, rows = next(iter(entry["rows"].items()))
        parts.append(f"{reason} ({entry['count']}; {name} row {', '.join(map(str, rows[:3]))})")
    return "; ".join(parts) or "no reason given"
