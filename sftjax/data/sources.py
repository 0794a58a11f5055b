"""Files of rows with random access: JSONL, JSON, Parquet, CSV, text, TFDS, hub data sets; local or remote alike.

Everything that is not a plain local file (gs://, s3://, a member of a zip or wheel, *.gz) is first copied into a local
cache, once for each content; then all readers deal with local files. A row that can't be read raises a RowError when it
is asked for, so that the ledger counts it with its place; a file that can't be read at all raises here.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sftjax.data import files, weighting
from sftjax.errors import ConfigError, DataError, StorageError

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".md": "text",
    ".text": "text",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_OWN_KEYS = {"path", "split", "config", "name", "unit", "data_dir", "revision"}
MIXTURE_KEYS = ("weight", "proportion", "max_epochs", "loss_weight")
_SPEC_KEYS = frozenset({*_OWN_KEYS, *MIXTURE_KEYS, "format", "fields"})


class Source(Protocol):
    """Rows of one file, by number. Picklable; opens its file again in another process."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index` (of the slice). Raises types.RowError when the row can't be read."""
        ...

    def location(self, index: int) -> str:
        """Where row `index` stands, such as "train.jsonl:17" (lines count from 1)."""
        ...

    def fingerprint(self) -> str:
        """Hex digest of the content and of the slice."""
        ...


def open_source(spec: Mapping[str, Any] | str) -> Source:
    """Opens a source.

    Args:
      spec: a path, or a mapping with `path` and optionally `split`, `name`, `unit`, `data_dir`. The path may be local
        or any address fsspec knows (gs://bucket/x.jsonl), a folder, a pattern (data/*.jsonl), a list of these, a member
        of a zip or wheel (x.whl!inner/y.json), "tfds:name" or "hub:owner/name". `split` is "train", "train[:1000]",
        "[10%:]", or several joined by "+"; `unit` says what a row of a text file is: "line" (default), "paragraph"
        (between empty lines) or "file". `data_dir` is where TFDS keeps its builds. The other keys are for the encoder
        and the mixture, and not read here.

    Raises:
      ConfigError: the spec says something that can't be.
      StorageError: a file isn't there or can't be read.
      DataError: a file can't be read as what it is said to be.
    """
    spec = {"path": spec} if isinstance(spec, (str, os.PathLike)) else dict(spec)
    check_spec(spec)
    path, split = spec["path"], spec.get("split") or ""
    paths = list(path) if isinstance(path, (list, tuple)) else [os.fspath(path)]
    if paths[0].startswith(("tfds:", "hub:")):
        from sftjax.data import datasets

        source, ranges = datasets.open_named(paths[0], split, spec.get("data_dir"), spec.get("revision"))
    else:
        parts = [_open_file(file, spec.get("unit") or "line") for path in paths for file in _expand(path)]
        source = parts[0] if len(parts) == 1 else Concatenated(parts, paths[0])
        ranges = parse_split(split)
    if ranges is not None:
        source = Sliced(source, _rows_of(ranges, len(source), split), split)
    if spec.get("name"):
        source.name = spec["name"]
    return source


def check_spec(spec: Mapping[str, Any]) -> None:
    """Raises ConfigError for what can't be in a source's dict, without looking at the disk."""
    if unknown := sorted(map(str, set(spec) - _SPEC_KEYS)):
        raise ConfigError(f"data source: unknown key {unknown[0]!r}; known are {', '.join(sorted(_SPEC_KEYS))}")
    path = spec.get("path")
    if not path:
        raise ConfigError("data source: no path")
    if not all(isinstance(one, (str, os.PathLike)) for one in (path if isinstance(path, (list, tuple)) else [path])):
        raise ConfigError(f"data source: path={path!r} is neither text nor a list of texts")
    for key in MIXTURE_KEYS:
        if (value := spec.get(key)) is not None and (problem := weighting.problem_with(value)):
            raise ConfigError(f"data source {path}: {key}={value!r} {problem}")
    for key in ("split", "name", "unit", "config", "data_dir", "revision", "format"):
        if not isinstance(spec.get(key) or "", (str, os.PathLike)):
            raise ConfigError(f"data source {path}: {key}={spec[key]!r} is not text")
    fields = spec.get("fields") or {}
    if not isinstance(fields, Mapping) or not all(isinstance(name, str) for pair in fields.items() for name in pair):
        raise ConfigError(f"data source {path}: fields={fields!r} is not a dict of names, as {{'question': 'column'}}")


# --- slices ------------------------------------------------------------------------------------------------------

_SPLIT = re.compile(r"(?P<name>\w*)\s*(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


def split_name(split: str) -> str:
    """The name before the bracket: "train" of "train[:1000]"."""
    return split.split("[")[0].strip()


def parse_split(split: str) -> list[tuple[str | None, str | None]] | None:
    """(start, stop) texts of each part; None for the whole. A file has no splits of its own but "train"."""
    if not split or split in ("train", "all"):
        return None
    ranges = []
    for part in split.split("+"):
        match = _SPLIT.fullmatch(part.strip())
        if match is None or match["name"] not in ("", "train", "all"):
            raise ConfigError(f"data source: split {split!r} is not of the form '[:1000]', 'train[10%:20%]'")
        ranges.append((match["start"], match["stop"]))
    return ranges


def _rows_of(ranges, length: int, split: str) -> np.ndarray:
    def place(text: str | None, default: int) -> int:
        if text is None:
            return default
        number = round(int(text[:-1]) * length / 100) if text.endswith("%") else int(text)
        return min(max(number + length if number < 0 else number, 0), length)

    rows = [np.arange(place(start, 0), place(stop, length)) for start, stop in ranges]
    rows = np.concatenate(rows)
    if not len(rows):
        raise DataError(f"split {split!r} of {length} rows leaves none")
    return rows


class Sliced:
    """Some rows of another source."""

    def __init__(self, source, rows: np.ndarray, split: str):
        self._source, self._rows, self._split = source, rows, split
        self.name = source.name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self._rows[index])]

    def location(self, index: int) -> str:
        return self._source.location(int(self._rows[index]))

    def fingerprint(self) -> str:
        return files.digest(self._source.fingerprint(), self._split)


class Concatenated:
    """Several files as one."""

    def __init__(self, parts: Sequence, name: str):
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.name = name

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[number], index - (int(self._ends[number - 1]) if number else 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, row = self._find(index)
        return part[row]

    def location(self, index: int) -> str:
        part, row = self._find(index)
        return part.location(row)

    def fingerprint(self) -> str:
        return files.digest(*(part.fingerprint() for part in self._parts))


# --- files -------------------------------------------------------------------------------------------------------


def _is_remote(path: str) -> bool:
    return "://" in path or "::" in path


def _expand(path: str) -> list[str]:
    """A folder or a pattern as the files in it, sorted."""
    path = os.fspath(path)
    if "!" in path:
        outer, inner = path.split("!", 1)
        return [f"zip://{inner.lstrip('/')}::{outer}"]
    if not _is_remote(path):
        local = Path(path).expanduser()
        if local.is_file():
            return [str(local)]
        if local.is_dir():
            found = sorted(str(file) for file in local.iterdir() if _kind_of(file.name) is not None)
        elif any(char in path for char in "*?["):
            found = sorted(str(file) for file in local.parent.glob(local.name))
        else:
            raise StorageError(f"{path}: no such file")
    elif any(char in path for char in "*?["):
        found = _remote(
            lambda fsspec: sorted(f"{f.fs.unstrip_protocol(f.path)}" for f in fsspec.open_files(path)), path
        )
    else:
        return [path]
    if not found:
        raise StorageError(f"{path}: no data files there ({', '.join(_SUFFIXES)})")
    return found


def _remote(action, path: str):
    """Runs `action(fsspec)` with its many kinds of errors as one."""
    import fsspec

    try:
        return action(fsspec)
    except ImportError as error:
        raise StorageError(f"{path}: {error}") from None  # "Please install gcsfs to access ..."
    except FileNotFoundError:
        raise StorageError(f"{path}: no such file") from None
    except (ValueError, KeyError) as error:
        raise StorageError(f"{path}: no such file, or no address that fsspec knows ({error})") from None
    except Exception as error:  # each storage has its own
        raise StorageError(f"{path} can't be read: {type(error).__name__}: {error}") from None


def _kind_of(name: str) -> str | None:
    name = name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return _SUFFIXES.get(os.path.splitext(name)[1])


def _local_copy(path: str) -> str:
    """The path itself if it is a plain local file; else a copy in the cache, decompressed."""
    if not _is_remote(path) and not path.lower().endswith(_COMPRESSED):
        return path
    import fsspec

    def stamp(fsspec) -> str:
        opened = fsspec.open(path)
        return f"{path} {opened.fs.ukey(opened.path)}"

    folder = Path(os.environ.get("SFTJAX_CACHE") or Path(tempfile.gettempdir()) / f"sftjax-{os.getuid()}")
    name = re.split(r"::", path)[0].rsplit("/", 1)[-1]
    target = folder / f"{files.digest(_remote(stamp, path))[:24]}-{name}"
    if target.is_file():
        return str(target)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = target.with_name(f"{target.name}.{os.getpid()}")
        with aside.open("wb") as output:

            def copy(_):
                with fsspec.open(path, "rb", compression="infer") as file:
                    while block := file.read(files.CHUNK):
                        output.write(block)

            _remote(copy, path)
        aside.rename(target)
    except OSError as error:
        raise StorageError(f"can't write a local copy of {path} to {folder}: {error}; set SFTJAX_CACHE") from None
    return str(target)


def _open_file(path: str, unit: str):
    name = re.split(r"::", path)[0].rsplit("/", 1)[-1]
    kind = _kind_of(name)
    local = _local_copy(path)
    try:
        with open(local, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise StorageError(f"{path} can't be read: {error.strerror}") from None
    if head[:4] == b"PAR1":
        kind = "parquet"
    elif head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16 text: save it as UTF-8")
    elif kind == "parquet":
        raise DataError(f"{path} is not a Parquet file, or is cut short: fetch it again")
    if not head.strip():
        raise DataError(f"{path} is empty")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if kind in ("json", "jsonl", None) and start in (b"{", b"["):
        # The content decides: many .json files hold one object a line, and some .jsonl files a list.
        kind = "json" if start == b"[" else "jsonl"
    if kind is None:
        raise DataError(f"{path}: neither its name nor its content tells what it is ({', '.join(_SUFFIXES)})")
    if kind == "json" and start != b"[":
        kind = "jsonl"
    if kind == "text":
        if unit not in ("line", "paragraph", "file"):
            raise ConfigError(f"data source: unit={unit!r} is not line, paragraph or file")
        return files.TextFile(path, local, unit)
    return {"jsonl": files.JsonLines, "json": files.JsonList, "parquet": files.Parquet, "csv": files.Csv}[kind](
        path, local
    )
