"""Batches for training and evaluation, each with the position from which the next one continues.

    mixture -> (workers: read, encode) -> over-length -> pack -> batch -> this process's rows -> prefetch thread

`build` and `build_eval` give an iterator of `Item(batch, position, info)`:
  batch     dict of [A, B, L] arrays (see packing.py for the picture), ready for the device
  position  JSON-able; `build(..., position=item.position)` goes on with the batch after this one, bit for bit,
            whatever the number of workers or processes
  info      what the arrays don't say: the rows behind the batch, epoch, token counts (global, in every process)

Legend: A micro-batches of accumulation, B rows of a micro-batch, L length.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sftjax.data import packing
from sftjax.data.mixture import Mixture
from sftjax.data.stream import PackedRows, SampleIterator, SampleStream
from sftjax.errors import ConfigError

_POSITION_VERSION = 1


@dataclass(frozen=True)
class BatchInfo:
    """What stands behind a batch. Counts and examples are of the whole global batch, in every process.

    Attributes:
      epoch: epochs passed when this batch is done.
      examples: [A][B] lists of (source, row, sample), in the order of the segments: examples[a][b][s - 1] is
        segment s of that row.
      rows: indices in 0..B-1 of the rows that `batch` holds.
      real_tokens, trained_tokens, padding_tokens: of all A * B * L.
      num_examples: samples (pieces of split samples count each).
      tokens_by_source: source name -> {"tokens", "trained", "examples"}.
    """

    epoch: float
    examples: list[list[list[tuple[int, int, int]]]]
    rows: tuple[int, ...]
    real_tokens: int
    trained_tokens: int
    padding_tokens: int
    num_examples: int
    tokens_by_source: dict[str, dict[str, int]]


class Item(NamedTuple):
    """One step's data; see the module's docstring."""

    batch: dict[str, np.ndarray]
    position: dict[str, Any]
    info: BatchInfo


def build(
    mixture: Mixture,
    *,
    length: int,
    batch_size: int,
    accumulation: int = 1,
    packing_strategy: str = "best_fit",
    max_segments: int = 64,
    packing_bins: int | None = None,
    static_lengths: int = 1,
    flat_rows: int = 1,
    fill: str = "sequences",
    overlong: str = "truncate",
    reduction: str = "token",
    max_dropped: float = 1.0,
    pad_id: int = 0,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    prefetch: int = 2,
    position: dict[str, Any] | None = None,
) -> Pipeline:
    """Opens the training data.

    Args:
      mixture: the rows, their order, how many epochs.
      length: most tokens of a sample and, unless padding-free, of a row; a multiple of 128.
      batch_size: sequences (rows of `length` tokens) per micro-batch, over all processes. For a batch size in tokens:
        tokens // length.
      accumulation: micro-batches per step (A).
      packing_strategy, max_segments, static_lengths, flat_rows, fill: see `packing.row_shape`.
      packing_bins: open bins, see `packing.open_bins`; None = `packing.default_bins(length)`.
      overlong: see `packing.fit_to_length`.
      reduction: what counts alike in the loss, each "token" or each "example"; see `stream.SampleStream`.
      max_dropped: DataError once more than this share of rows gave no sample.
      pad_id: id that stands in the padding.
      rows: which of the B rows of each micro-batch this process keeps; None = all. Every process walks the same stream.
      workers: processes that read and encode rows; 0 = none.
      prefetch: batches made ahead in a thread; 0 = none.
      position: of the last batch consumed; None = from the start.

    Raises:
      ConfigError: settings that can't work, or a position that was saved with other ones.
    """
    shape = packing.row_shape(
        packing_strategy,
        length=length,
        batch_size=batch_size,
        max_segments=max_segments,
        static_lengths=static_lengths,
        flat_rows=flat_rows,
        fill=fill,
    )
    packing_bins = packing_bins or packing.default_bins(length)
    if accumulation < 1:
        raise ConfigError(f"accumulation={accumulation} must be at least 1")
    kept = tuple(range(shape.rows)) if rows is None else tuple(int(row) for row in rows)
    if any(not 0 <= row < shape.rows for row in kept):
        raise ConfigError(f"rows {kept} are not all in a batch of {shape.rows} rows")
    rows_made = {"rows": shape.rows, "lengths": list(shape.lengths), "max_examples": shape.max_examples}
    if packing_strategy == "padding_free" and fill == "sequences":
        rows_made = {"sequences": batch_size}  # so many a step, in however many rows (devices) they are laid out
    settings = {
        "mixture": mixture.settings(),
        "length": length,
        **rows_made,
        "accumulation": accumulation,
        "packing": packing_strategy,
        "packing_bins": packing_bins,
        "overlong": overlong,
        "reduction": reduction,
    }
    stream = SampleStream(
        mixture, length=length, overlong=overlong, reduction=reduction, workers=workers, max_dropped=max_dropped
    )
    bins = packing.open_bins(packing_strategy, shape, packing_bins)
    packed = PackedRows(stream, bins, shuffle=mixture.shuffle, seed=mixture.seed)
    batches = _Batches(stream, packed, shape, accumulation, kept, pad_id, settings, position)
    return Pipeline(batches, shape, prefetch)


def build_eval(
    mixture: Mixture, *, length: int, batch_size: int, packing_strategy: str = "best_fit", **options: Any
) -> Pipeline:
    """Opens evaluation data: one pass in the order of the files, the last batch filled up with padding rows.

    Give it a `Mixture(..., shuffle=False)` of one epoch; each sample comes exactly once, and all batches have the same
    number of rows. `packing_strategy="none"` for one sample a row. Options as in `build` (not `accumulation`: A is 1).
    """
    if mixture.shuffle or mixture.epochs != 1:
        raise ConfigError("evaluation data: make the mixture with shuffle=False and epochs=1")
    return build(mixture, length=length, batch_size=batch_size, packing_strategy=packing_strategy, **options)


class _Batches:
    """Iterator of items, without the thread."""

    def __init__(self, stream, packed, shape, accumulation, kept, pad_id, settings, position):
        self._stream, self._mixture, self._shape, self._accumulation = stream, stream.mixture, shape, accumulation
        self._kept, self._pad_id, self._settings = kept, pad_id, settings
        self._packer = iter(packed)
        self._batches, self._rows_done = 0, 0.0
        if position is not None:
            _check_position(position, settings)
            self._packer.set_state(position["packer"])
            self._batches, self._rows_done = position["batches"], position["rows_done"]

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        count = self._accumulation * self._shape.rows
        rows = []
        while len(rows) < count and (row := next(self._packer, None)) is not None:
            rows.append(row)
        if not rows:
            raise StopIteration
        self._batches += 1
        self._rows_done += sum(element.share for row in rows for element in row)
        if len(rows) < count:
            self._rows_done = float(len(self._mixture))  # the end, past any dropped rows at the end of the file
        arrays = packing.assemble(rows, count, self._shape.lengths, self._pad_id)
        info = self._info(arrays, rows)
        batch = {
            name: np.ascontiguousarray(a.reshape(self._accumulation, self._shape.rows, -1)[:, self._kept])
            for name, a in arrays.items()
        }
        return Item(batch, self._position(), info)

    def _position(self) -> dict[str, Any]:
        return {
            "version": _POSITION_VERSION,
            "settings": self._settings,
            "packer": self._packer.get_state(),
            "batches": self._batches,
            "rows_done": self._rows_done,
        }

    def _info(self, arrays: dict[str, np.ndarray], rows: list[list[packing.Element]]) -> BatchInfo:
        names = self._mixture.names
        flat = [[element.example for element in row] for row in rows]
        flat += [[] for _ in range(self._accumulation * self._shape.rows - len(rows))]
        per_row = self._shape.rows
        examples = [flat[a * per_row : (a + 1) * per_row] for a in range(self._accumulation)]
        source, trained = arrays["source_ids"], arrays["weights"] != 0
        tokens = np.bincount(source[source >= 0], minlength=len(names))
        targets = np.bincount(source[trained], minlength=len(names))
        samples = np.bincount([e[0] for row in flat for e in row], minlength=len(names))
        return BatchInfo(
            epoch=round(self._mixture.epoch_at(self._rows_done + 1e-9), 6),
            examples=examples,
            rows=self._kept,
            real_tokens=int(tokens.sum()),
            trained_tokens=int(targets.sum()),
            padding_tokens=int(source.size - tokens.sum()),
            num_examples=int(samples.sum()),
            tokens_by_source={
                name: {"tokens": int(tokens[i]), "trained": int(targets[i]), "examples": int(samples[i])}
                for i, name in enumerate(names)
            },
        )

    @property
    def samples(self) -> SampleIterator:
        return self._stream.opened

    def close(self) -> None:
        self.samples.close()


def _check_position(position: dict[str, Any], settings: dict[str, Any]) -> None:
    """A position only means something with the settings that it was saved with."""
    if position.get("version") != _POSITION_VERSION:
        raise ConfigError(f"the data position has version {position.get('version')}, this is {_POSITION_VERSION}")
    saved, now = _flat(position["settings"]), _flat(settings)
    changed = [
        f"{name} {saved.get(name)} -> {now.get(name)}" for name in {**saved, **now} if saved.get(name) != now.get(name)
    ]
    if changed:
        raise ConfigError(f"the data position was saved with other data settings ({'; '.join(changed)}): put them back")


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        **{f"mixture.{k}": v for k, v in settings["mixture"].items()},
        **{k: v for k, v in settings.items() if k != "mixture"},
    }


class Pipeline:
    """Iterator of `Item`s, made ahead in a thread. Close it, or use it in a `with` block.

    Attributes:
      shape: rows per micro-batch, static lengths, segments per row (`packing.Shape`).
    """

    def __init__(self, batches: _Batches, shape: packing.Shape, prefetch: int):
        self.shape = shape
        self._batches = batches
        self._thread: threading.Thread | None = None
        if prefetch:
            self._queue: queue.Queue = queue.Queue(maxsize=prefetch)
            self._stop = threading.Event()
            self._thread = threading.Thread(
                target=_fill, args=(batches, self._queue, self._stop), daemon=True, name="sftjax-data"
            )
            self._thread.start()
        self._finished = False
        self._at_exit = _close_at_exit(self)

    def __iter__(self) -> Pipeline:
        return self

    def __next__(self) -> Item:
        if self._finished:
            raise StopIteration
        if self._thread is None:
            return next(self._batches)
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._finished = True
            raise item
        return item

    def ledger(self) -> dict[str, Any]:
        """What became of the rows read so far (those behind batches made ahead included), by source."""
        return self._batches.samples.ledger.snapshot()

    def close(self) -> None:
        """Stops the thread and the workers."""
        if self._thread is not None:
            self._stop.set()
            while self._thread.is_alive():
                with contextlib.suppress(queue.Empty):
                    self._queue.get(timeout=0.05)  # it may be waiting to put
            self._thread = None
            self._finished = True
        self._batches.close()
        atexit.unregister(self._at_exit)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _close_at_exit(pipeline: Pipeline) -> Any:
    """A thread that is still in Grain when the interpreter goes down can hang or crash it."""
    reference = weakref.ref(pipeline)

    def close() -> None:
        if (alive := reference()) is not None:
            alive.close()

    atexit.register(close)
    return close


def _fill(batches: _Batches, out: queue.Queue, stop: threading.Event) -> None:
    """Thread: makes items until the end; the last thing put is the exception that ended it."""
    while not stop.is_set():
        try:
            item: Any = next(batches)
        except BaseException as error:
            item = error
        while not stop.is_set():
            try:
                out.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return


def sum_per_example(
    values: np.ndarray, batch: dict[str, np.ndarray], info: BatchInfo
) -> dict[tuple[int, int, int], float]:
    """Sums a per-token array over the segments of each example: what a bootstrap over examples resamples.

    Args:
      values: [A, B, L] for the rows that `batch` holds, such as nll * weights.
      batch: a batch.
      info: its info.

    Returns:
      (source, row, sample) -> sum, in float64; pieces of a split sample are added up.
    """
    sums: dict[tuple[int, int, int], float] = {}
    segments = batch["segment_ids"]
    for a in range(values.shape[0]):
        for local, b in enumerate(info.rows):
            per_segment = np.bincount(segments[a, local], weights=np.asarray(values[a, local], np.float64))
            for segment, example in enumerate(info.examples[a][b], start=1):
                sums[example] = sums.get(example, 0.0) + float(per_segment[segment])
    return sums
