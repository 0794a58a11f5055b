"""Readers of local files: JSONL, JSON lists, Parquet, CSV, text. Each gives rows by number, and their places."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from sftjax.data.types import RowError
from sftjax.errors import DataError, StorageError

CHUNK = 16 * 2**20  # bytes read at once
_LISTS = ("data", "rows", "examples", "items", "instances", "records", "train")  # of rows, in an object that is a file
_LARGEST_OBJECT = 2**31  # bytes


def digest(*texts: str) -> str:
    """Hex digest of several texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _loads(line: bytes) -> dict[str, Any]:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as wrong:
            raise RowError("not_utf8", f"byte {wrong.start} of the line is not UTF-8: save the file as UTF-8") from None
        raise RowError("broken_json", f"the line is not JSON: {error}") from None


class JsonLines:
    """One JSON object a line. Holds where lines start (8 bytes a row), not the lines."""

    def __init__(self, path: str, local: str):
        self.name, self._local = path, local
        self._handle: int | None = None
        self._starts, self._ends, self._numbers, self._hash = _scan_lines(local)
        if not len(self._starts):
            raise DataError(f"{path} is empty")
        self._check_the_end(os.path.getsize(local))

    def _check_the_end(self, size: int) -> None:
        """A last line without an end that is no JSON was cut off, and who knows how many behind it."""
        if int(self._ends[-1]) < size:
            return
        try:
            self[len(self) - 1]
        except RowError as error:
            if error.reason in ("broken_json", "not_utf8"):
                raise DataError(
                    f"{self.location(len(self) - 1)}: the file ends in the middle of a row, so others may be missing: "
                    "fetch it again, or take the line out"
                ) from None

    def __getstate__(self):
        return {**self.__dict__, "_handle": None}

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._handle is None:
            try:
                self._handle = os.open(self._local, os.O_RDONLY)
            except OSError as error:
                raise StorageError(f"{self.name} can't be read any more: {error.strerror}") from None
        start = int(self._starts[index])
        row = _loads(_read(self._handle, start, int(self._ends[index]) - start))
        if not isinstance(row, dict):
            raise RowError("not_an_object", f"the line holds {type(row).__name__}, not an object with keys")
        return row

    def location(self, index: int) -> str:
        return f"{self.name}:{int(self._numbers[index])}"

    def fingerprint(self) -> str:
        return self._hash


def _read(handle: int, start: int, size: int) -> bytes:
    """`os.pread`, which leaves no shared position between threads, to the end (it may stop at 2 GiB)."""
    parts = []
    while size > 0 and (block := os.pread(handle, size, start)):
        parts.append(block)
        start, size = start + len(block), size - len(block)
    return b"".join(parts)


def _scan_lines(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Starts, ends and numbers (from 1) of the lines that aren't blank, and the digest of the content."""
    digest, offset, newlines = hashlib.sha256(), 0, []
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
            newlines.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + offset)
            offset += len(block)
        breaks = np.concatenate(newlines) if newlines else np.zeros(0, np.int64)
        starts, ends = np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [offset]])
        file.seek(0)
        if file.read(3) == b"\xef\xbb\xbf":
            starts[0] = 3
        keep = ends > starts
        for i in np.flatnonzero(keep & (ends - starts < 64)):  # a short line may be blanks, or a lone \r
            file.seek(starts[i])
            keep[i] = bool(file.read(ends[i] - starts[i]).strip())
    return starts[keep], ends[keep], np.flatnonzero(keep) + 1, digest.hexdigest()


class _InMemory:
    """Rows that are read all at once, again in each process."""

    def __init__(self, path: str, local: str):
        self.name, self._local = path, local
        self._hash = hash_file(local)
        self._rows: Any = None
        self._length = len(self._loaded())
        if not self._length:
            raise DataError(f"{path} has no rows")

    def _load(self) -> Any:
        raise NotImplementedError

    def _loaded(self):
        if self._rows is None:
            self._rows = self._load()
        return self._rows

    def __getstate__(self):
        return {**self.__dict__, "_rows": None}

    def __len__(self) -> int:
        return self._length

    def location(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def fingerprint(self) -> str:
        return self._hash


def hash_file(path: str) -> str:
    """Hex digest of a local file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_one_object(path: str) -> bool:
    """Whether a file that begins with a brace is one object over several lines, or one that holds a list of rows."""
    if os.path.getsize(path) > _LARGEST_OBJECT:
        return False
    with open(path, "rb") as file:
        first, more = file.readline(), file.read(64).strip()
    try:
        found = orjson.loads(first.removeprefix(b"\xef\xbb\xbf"))
        return not more and _rows_in(found) is not None
    except orjson.JSONDecodeError:
        pass
    try:
        return isinstance(orjson.loads(_content(path)), dict)
    except orjson.JSONDecodeError:
        return False


def _content(path: str) -> bytes:
    return Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")


def _rows_in(content: Any) -> list | None:
    """The rows in an object that is a whole file; None where it is a row itself."""
    found = [content[key] for key in _LISTS if isinstance(content.get(key), list)] if isinstance(content, dict) else []
    if len(found) != 1 or not found[0] or not all(isinstance(row, dict) for row in found[0]):
        return None
    return None if found[0][0].keys() & {"role", "from", "speaker"} else found[0]  # turns: a row


class JsonList(_InMemory):
    """A JSON list of objects; or one object that holds such a list ({"version": 1, "data": [...]}), or is one row."""

    def _load(self) -> list:
        content = _content(self._local)
        try:
            found = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            try:
                content.decode()
            except UnicodeDecodeError as wrong:
                raise DataError(f"{self.name}: byte {wrong.start} is not UTF-8: save the file as UTF-8") from None
            raise DataError(f"{self.name}:{error.lineno}: not JSON: {error.msg}") from None
        return found if isinstance(found, list) else (_rows_in(found) or [found])

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._loaded()[index]
        if not isinstance(row, dict):
            raise RowError("not_an_object", f"the entry is {type(row).__name__}, not an object with keys")
        return row


class Parquet(_InMemory):
    """Parquet, memory-mapped. Keys that Arrow filled in with nulls (a struct has all keys in every row) go away."""

    def _load(self):
        import pyarrow

        try:
            return self._table()
        except (pyarrow.ArrowException, OSError) as error:
            first = str(error).splitlines()[0]
            raise DataError(f"{self.name} is not a {type(self).__name__} file, or is cut short: {first}") from None

    def _table(self):
        from pyarrow import parquet

        return parquet.read_table(self._local, memory_map=True)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return drop_none(self._loaded().slice(index, 1).to_pylist()[0])


class Arrow(Parquet):
    """Arrow, as a stream (what `datasets` saves) or a file with random access; memory-mapped."""

    def _table(self):
        import pyarrow
        from pyarrow import ipc

        mapped = pyarrow.memory_map(self._local)
        if mapped.read(6) == b"ARROW1":
            mapped.seek(0)
            return ipc.open_file(mapped).read_all()
        mapped.seek(max(0, mapped.size() - 8))
        if mapped.read(8) != b"\xff\xff\xff\xff" + bytes(4):  # a stream says that it has ended
            raise pyarrow.ArrowInvalid("the stream has no end")
        mapped.seek(0)
        return ipc.open_stream(mapped).read_all()


def drop_none(value):
    """`value` without keys whose value is None, at every depth."""
    if isinstance(value, dict):
        return {key: drop_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_none(item) for item in value]
    return value


def _decoded_text(path: str, name: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: byte {error.start} is not UTF-8: save the file as UTF-8") from None


class Csv(_InMemory):
    """A table with a header line, separated by commas, tabs (.tsv) or semicolons."""

    def _load(self) -> list:
        text = io.StringIO(_decoded_text(self._local, self.name), newline="")
        first = text.readline()
        text.seek(0)
        delimiter = "\t" if ".tsv" in self.name.lower() else next((d for d in ",;\t" if d in first), ",")
        csv.field_size_limit(2**30)
        lines: list[str] = []  # of the row at hand
        reader = csv.reader(_kept(text, lines), delimiter=delimiter, strict=True)
        begin, rows = 1, []
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise DataError(f"{self.name}: two columns have the same name")
            lines.clear()
            begin = reader.line_num + 1
            for cells in reader:
                if cells:
                    rows.append((reader.line_num, cells))
                lines.clear()
                begin = reader.line_num + 1
        except csv.Error as error:
            place = f"{self.name}:{begin + _opening_line(lines, delimiter)}"
            if "field" in str(error):
                raise DataError(f"{place}: {error}") from None
            raise DataError(
                f"{place}: a quote opens here and isn't closed (or text follows the closing one), so that the rows "
                'behind it can\'t be told: close it, and write a quote inside of quotes twice ("")'
            ) from None
        self._header = header
        return rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        _, cells = self._loaded()[index]
        if len(cells) != len(self._header):
            raise RowError("broken_csv", f"the line has {len(cells)} cells, and the header {len(self._header)}")
        return dict(zip(self._header, cells, strict=True))

    def location(self, index: int) -> str:
        return f"{self.name}:{self._loaded()[index][0]}"


def _kept(lines: Iterator[str], last: list[str]) -> Iterator[str]:
    for line in lines:
        last.append(line)
        yield line


def _opening_line(lines: Sequence[str], delimiter: str) -> int:
    """Number, from 0, of the line of a row on which its last quoted cell begins."""
    opened, inside, number, before = 0, False, 0, delimiter
    for character in "".join(lines):
        if character == '"':
            if not inside and before in (delimiter, "\n", "\r"):
                inside, opened = True, number
            elif inside:
                inside = False
            elif before == '"':  # a quote inside of quotes
                inside = True
        number += character == "\n"
        before = character
    return opened


class TextFile(_InMemory):
    """Plain text; a row is a line, a paragraph, or all of it."""

    def __init__(self, path: str, local: str, unit: str):
        self._unit = unit
        super().__init__(path, local)

    def _load(self) -> list[tuple[int, str]]:
        text = _decoded_text(self._local, self.name).replace("\r\n", "\n")
        if self._unit == "file":
            return [(1, text)] if text.strip() else []
        if self._unit == "line":
            return [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows, number = [], 1
        for block in re.split(r"(\n[ \t]*\n\s*)", text):
            if block.strip():
                rows.append((number, block.strip("\n")))
            number += block.count("\n")
        return rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text": self._loaded()[index][1]}

    def location(self, index: int) -> str:
        return f"{self.name}:{self._loaded()[index][0]}"

    def fingerprint(self) -> str:
        return digest(self._hash, self._unit)
