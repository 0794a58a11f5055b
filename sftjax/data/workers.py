"""Rows of the stream, read and encoded in this process or ahead of it in others.

A worker process turns chunks of rows into lists of samples (1:1), in the order in which they were asked for; which rows
they are is settled here. It imports what encoding needs and neither jax nor Grain, so that it begins within half a
second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from sftjax.data import processes
from sftjax.data.types import RowError, Sample
from sftjax.errors import ConfigError

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
      ConfigError: a source or an encoder can't go to another process.
      concurrent.futures.BrokenExecutor: a worker was killed.
    """
    begins = range(start, len(mixture), CHUNK)
    chunks = (range(begin, min(begin + CHUNK, len(mixture))) for begin in begins)
    workers = min(workers, len(begins))
    if not workers:
        for places in chunks:
            yield from encode_rows(mixture, places)
        return
    try:
        shared = processes.packed(_parts_of(mixture), "a source or its encoder")
    except ConfigError as error:
        raise ConfigError(f"{error}; data.workers=0 encodes in this one") from error.__cause__
    located = ([mixture.locate(place)[1:] for place in places] for places in chunks)
    with processes.pool(workers, _use, shared) as pool:
        ahead = deque(pool.submit(_work, rows) for rows in islice(located, workers * _CHUNKS_AHEAD))
        while ahead:
            chunk = ahead.popleft().result()
            ahead.extend(pool.submit(_work, rows) for rows in islice(located, 1))
            yield from _unpacked(*chunk)


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


def _use(parts: Sequence[tuple[Any, Any]]) -> None:
    global _parts
    _parts = parts


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
