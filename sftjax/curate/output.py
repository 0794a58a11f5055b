"""What a curation leaves: kept rows, removed.jsonl, and files that appear whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from sftjax.errors import DataError
from sftjax.utils.storage import whole_file

BATCH = 1000  # rows of a Parquet row group

Row = dict[str, Any]


def write_lines(path: Path, rows: Iterable[Row]) -> int:
    """One JSON object a line; returns how many."""
    count = 0
    with whole_file(path) as file:
        for row in rows:
            file.write(orjson.dumps(row, default=str) + b"\n")
            count += 1
    return count


def write_parquet(path: Path, rows: Callable[[], Iterable[Row]]) -> int:
    """Rows as Parquet; goes through them twice, first for the schema that all of them fit.

    Raises:
      DataError: a field holds values of different kinds.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        schema = None
        for batch in _batches(rows()):
            found = pyarrow.Table.from_pylist(batch).schema
            schema = found if schema is None else pyarrow.unify_schemas([schema, found], promote_options="permissive")
        count = 0
        with (
            whole_file(path) as file,
            parquet.ParquetWriter(file, schema or pyarrow.schema([]), compression="zstd") as writer,
        ):
            for batch in _batches(rows()):
                writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
                count += len(batch)
        return count
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path.name}: the rows don't fit one table ({str(error).splitlines()[0]}): set output_format=jsonl"
        ) from None


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def row_hash(row: Row) -> str:
    """Hex digest of a row's content, whatever the order of its keys."""
    return hashlib.sha256(orjson.dumps(row, default=str, option=orjson.OPT_SORT_KEYS)).hexdigest()
