"""Shows samples with their trained tokens marked: as JSONL and in the terminal. (As a page: `curate/preview.py`.)"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import orjson

from sftjax.data.encode import RowEncoder
from sftjax.data.tokenizer import Tokenizer
from sftjax.data.types import RowError, Sample

_CHUNK = 64  # rows encoded at once
_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # data must not steer the terminal


@dataclass(frozen=True)
class Row:
    """One row of the file: its samples, or why there are none."""

    index: int
    location: str
    samples: tuple[Sample, ...] = ()
    error: RowError | None = None
    record: Mapping[str, Any] | None = None  # as it stands in the file; None: unreadable


def rows(source, encoder: RowEncoder, limit: int | None = None) -> Iterator[Row]:
    """Encodes the first `limit` rows of a source, in order; errors are yielded in their place."""
    total = len(source) if limit is None else min(limit, len(source))
    for start in range(0, total, _CHUNK):
        numbers, records, failed = range(start, min(start + _CHUNK, total)), {}, {}
        for index in numbers:
            try:
                records[index] = source[index]
            except RowError as error:
                failed[index] = error
        encoded = encoder.encode_batch(list(records.values()), list(records))
        results = dict(zip(records, encoded, strict=True)) | failed
        for index in numbers:
            result, place, record = results[index], source.location(index), records.get(index)
            if isinstance(result, RowError):
                yield Row(index, place, error=result, record=record)
            else:
                yield Row(index, place, tuple(result), record=record)


def json_lines(tokenizer: Tokenizer, row: Row) -> Iterator[bytes]:
    """A line for each sample: row (its place), index, sample, tokens, weights, text, and `lost` where parts of the row
    are; or one with row, index and error."""
    if row.error is not None:
        yield orjson.dumps({"row": row.location, "index": row.index, "error": str(row.error)}) + b"\n"
    for sample in row.samples:
        yield (
            orjson.dumps(
                {
                    "row": row.location,
                    "index": sample.index,
                    "sample": sample.sample,
                    "tokens": sample.tokens.tolist(),
                    "weights": sample.weights.tolist(),
                    "text": tokenizer.decode(sample.tokens),
                    **({"lost": sample.lost} if sample.lost else {}),
                }
            )
            + b"\n"
        )


def runs(tokenizer: Tokenizer, sample: Sample) -> list[tuple[str, float]]:
    """Stretches of equal weight as text."""
    cuts = np.flatnonzero(np.diff(sample.weights)) + 1
    bounds = [0, *cuts.tolist(), len(sample.tokens)]
    return [(tokenizer.decode(sample.tokens[a:b]), float(sample.weights[a])) for a, b in pairwise(bounds)]


def visible(text: str) -> str:
    """`text` with control characters, which could steer a terminal, as symbols."""
    return _INVISIBLE.sub(lambda match: chr(0x2400 + ord(match[0])) if ord(match[0]) < 32 else "�", text)


def marked(text: str, weight: float) -> str:
    """Trained text between marks: «said», or «0.5: said» where its weight isn't 1."""
    return f"«{text}»" if weight == 1 else f"«{weight:g}: {text}»"


def show(console, tokenizer: Tokenizer, row: Row) -> None:
    """Prints a row on a rich console: trained text green (other weights than 1 yellow), the rest dim. Without colours
    (a pipe, a file, NO_COLOR) trained text stands in «», with its weight in front where that isn't 1: «0.5: text»."""
    from rich.text import Text

    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    if row.error is not None:
        console.print(Text(visible(f"{row.location}  not used: {row.error}"), style="red"), soft_wrap=True)
        return
    for sample in row.samples:
        head = Text(_summary(row, sample), style="bold")
        console.print(head, soft_wrap=True)
        for note in sample.lost:
            console.print(Text(f"  {visible(note)}", style="yellow"), soft_wrap=True)
        text = Text()
        for part, weight in runs(tokenizer, sample):
            style = "dim" if not weight else "green" if weight == 1 else "yellow"
            text.append(visible(part) if coloured or not weight else marked(visible(part), weight), style=style)
        console.print(text, soft_wrap=True)
        console.print()


def _summary(row: Row, sample: Sample) -> str:
    trained = int(np.count_nonzero(sample.weights[1:]))
    flags = f"  [{', '.join(sample.flags)}]" if sample.flags else ""
    return f"{row.location}  sample {sample.sample}: {trained} of {len(sample.tokens)} tokens trained{flags}"
