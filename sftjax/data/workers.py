"""Rows of the stream, read and encoded in this process or ahead of it in others.

A worker process turns chunks of rows into lists of samples (1:1), in the order in which they were asked for; which rows
they are is settled here. It imports what encoding needs and neither jax nor Grain, so that it begins within half a
second.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import numpy as np

from sftjax.data.types import RowError, Sample

if TYPE_CHECKING:
    from sftjax.data.mixture import Mixture

CHUNK = 64  # rows encoded at a time: one message between processes, one call into the tokenizer
_CHUNKS_AHEAD = 4  # chunks kept ready for each worker

_parts: Sequence[tuple[Any, Any]] = ()  # in a worker: (source, encode) of each ingredient


class EncodedRow:
    """What became of one row: its samples, or why there are none."""

    __slots__ = ("error", "row", "samples", "source")

    def __init__(self, source: int, row: int, samples: list[Sample], error: tuple[str, str] | None):
        self.source, self.row, self.samples, self.error = source, row, samples, error


def read_rows(mixture: Mixture, start: int, workers: int) -> Generator[EncodedRow, None, None]:
    """The encoded rows of a mixture from place `start` on.

    Args:
      mixture: the rows.
      start: the first place.
      workers: processes that work ahead; 0 = none. They end with the generator.

    Raises:
      concurrent.futures.BrokenExecutor: a worker was killed.
    """
    begins = range(start, len(mixture), CHUNK)
    chunks = (range(begin, min(begin + CHUNK, len(mixture))) for begin in begins)
    workers = min(workers, len(begins))
    if not workers:
        for places in chunks:
            yield from encode_rows(mixture, places)
        return
    pickled = bytes(ForkingPickler.dumps(_parts_of(mixture)))  # here: the queue's thread could only print an error
    located = ([mixture.locate(place)[1:] for place in places] for places in chunks)
    context = multiprocessing.get_context("spawn")
    parts = context.Queue()  # whose thread hands them over: as arguments they would have one process wait for another
    for _ in range(workers):
        parts.put(pickled)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (parts,))
    try:
        with _interrupts_held():  # what a process holds back, those that it starts do as well
            ahead = deque(pool.submit(_work, rows) for rows in islice(located, workers * _CHUNKS_AHEAD))
        while ahead:
            chunk = ahead.popleft().result()
            ahead.extend(pool.submit(_work, rows) for rows in islice(located, 1))
            yield from _unpacked(*chunk)
    finally:
        pool.shutdown(cancel_futures=True)
        parts.close()
        parts.cancel_join_thread()  # what a worker that was killed didn't fetch


def encode_rows(mixture: Mixture, places: Sequence[int]) -> list[EncodedRow]:
    """Encodes the rows at some places of the stream, in that order."""
    return _encode(_parts_of(mixture), [mixture.locate(place)[1:] for place in places])


def _parts_of(mixture: Mixture) -> list[tuple[Any, Any]]:
    return [(ingredient.source, ingredient.encode) for ingredient in mixture.ingredients]


def _encode(parts: Sequence[tuple[Any, Any]], rows: Sequence[tuple[int, int]]) -> list[EncodedRow]:
    """Encodes rows (source, row), those of each source together."""
    out: list[EncodedRow | None] = [None] * len(rows)
    by_source: dict[int, list[tuple[int, int, dict]]] = {}
    for i, (source, row) in enumerate(rows):
        try:
            by_source.setdefault(source, []).append((i, row, parts[source][0][row]))
        except RowError as error:
            out[i] = EncodedRow(source, row, [], (error.reason, error.detail))
    for source, read in by_source.items():
        results = _encode_records(parts[source][1], [r[2] for r in read], [r[1] for r in read], source)
        for (i, row, _), result in zip(read, results, strict=True):
            failed = isinstance(result, RowError)
            error = (result.reason, result.detail) if failed else None
            out[i] = EncodedRow(source, row, [] if failed else result, error)
    return out


def _encode_records(encode: Any, records: list[dict], rows: list[int], source: int) -> list[list[Sample] | RowError]:
    if hasattr(encode, "encode_batch"):
        return encode.encode_batch(records, rows, source)
    results: list[list[Sample] | RowError] = []
    for record, row in zip(records, rows, strict=True):
        try:
            results.append(encode(record, row, source))
        except RowError as error:
            results.append(error)
    return results


# --- in a worker -----------------------------------------------------------------------------------------------------


def _start_worker(parts: multiprocessing.Queue[bytes]) -> None:
    """In a worker: leave interrupts to the parent, one thread for the tokenizer, and don't outlive the parent."""
    global _parts
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    _parts = ForkingPickler.loads(parts.get())


def _die_with(parent: int) -> None:
    """Ends this process soon after its parent has ended (a killed parent can't tell its workers to stop).

    Not PR_SET_PDEATHSIG: that fires when the *thread* that started the worker ends.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _work(rows: Sequence[tuple[int, int]]) -> tuple:
    return _packed(_encode(_parts, rows))


def _packed(rows: Sequence[EncodedRow]) -> tuple:
    """Rows as two arrays, not two for every sample: how they travel between processes."""
    samples = [sample for row in rows for sample in row.samples]
    heads = [(row.source, row.row, row.error, len(row.samples)) for row in rows]
    about = [(len(s.tokens), s.source, s.index, s.sample, s.flags) for s in samples]
    tokens = np.concatenate([s.tokens for s in samples]) if samples else None
    weights = np.concatenate([s.weights for s in samples]) if samples else None
    return heads, about, tokens, weights


def _unpacked(heads: list[tuple], about: list[tuple], tokens: np.ndarray | None, weights: np.ndarray | None):
    samples, begin = [], 0
    for length, *place in about:
        end = begin + length
        samples.append(Sample(tokens[begin:end], weights[begin:end], *place))
        begin = end
    left = iter(samples)
    return [EncodedRow(source, row, [*islice(left, n)], error) for source, row, error, n in heads]


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C, which goes to every process of a terminal, is this process's alone to answer."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
