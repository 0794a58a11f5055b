"""Files of rows with random access: JSONL, JSON, Parquet, CSV, text, TFDS, hub data sets; local or remote alike.

Everything that is not a plain local file (gs://, s3://, a member of a zip or wheel, *.gz) is first copied into a local
cache, once for each content; then all readers deal with local files. A row that can't be read raises a RowError when it
is asked for, so that the ledger counts it with its place; a file that can't be read at all raises here.
"""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import lzma
import os
import re
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sftjax.data import files, folders, weighting
from sftjax.errors import ConfigError, DataError, StorageError, UserError

_OWN_KEYS = {"path", "split", "config", "name", "unit", "data_dir", "revision"}
MIXTURE_KEYS = ("weight", "proportion", "max_epochs", "loss_weight")
_FORMATS = {"parquet": "a Parquet", "arrow": "an Arrow"}
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
      spec: a path, or a mapping with `path` and optionally `split`, `config`, `name`, `unit`, `data_dir`, `revision`.
        The path may be local or any address fsspec knows (gs://bucket/x.jsonl), a folder (see `folders`), a pattern
        (data/**/*.jsonl), a list of these, a member of a zip or wheel (x.whl!inner/y.json), "tfds:name" or
        "hub:owner/name". `split` is "train", "test", "train[:1000]", "[10%:]", or several joined by "+"; `config`
        names a configuration of a folder whose dataset card has several; `unit` says what a row of a text file is:
        "line" (default), "paragraph" (between empty lines) or "file". `data_dir` is where TFDS keeps its builds. The
        other keys are for the encoder and the mixture, and not read here.

    Raises:
      ConfigError: the spec says something that can't be.
      StorageError: a file isn't there or can't be read.
      DataError: a file can't be read as what it is said to be.
    """
    spec = {"path": spec} if isinstance(spec, (str, os.PathLike)) else dict(spec)
    check_spec(spec)
    path, split = spec["path"], spec.get("split") or ""
    paths = [os.fspath(one) for one in (path if isinstance(path, (list, tuple)) else [path])]
    if paths[0].startswith(("tfds:", "hub:")):
        from sftjax.data import datasets

        options = {key: spec.get(key) for key in ("data_dir", "revision", "config")}
        source, ranges = datasets.open_named(paths[0], split, **options)
        if ranges is not None:
            source = Sliced(source, _rows_of(ranges, len(source), split), split)
    else:
        source = _open_paths(paths, split, spec.get("unit") or "line", spec.get("config") or "")
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


def _open_paths(paths: Sequence[str], split: str, unit: str, config: str):
    """Files and folders as one source: the rows of each part of the split, one behind the other."""
    ranges = parse_split(split)
    by_name: dict[str, list] = {}
    for name, start, stop in ranges:
        by_name.setdefault(name, []).append((start, stop))
    found = []
    for name, places in by_name.items():
        parts = [_open_file(file, unit) for path in paths for file in _expand(path, name, config)]
        source = parts[0] if len(parts) == 1 else Concatenated(parts, paths[0])
        if places != [(None, None)]:
            source = Sliced(source, _rows_of(places, len(source), split), split)
        found.append(source)
    return found[0] if len(found) == 1 else Concatenated(found, paths[0])


# --- slices ------------------------------------------------------------------------------------------------------

_SPLIT = re.compile(r"(?P<name>\w*)\s*(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


def split_name(split: str) -> str:
    """The name before the bracket: "train" of "train[:1000]"."""
    return split.split("[")[0].strip()


def parse_split(split: str) -> list[tuple[str, str | None, str | None]]:
    """(name, start, stop) of each part; ("", None, None) for the whole."""
    parts = []
    for part in split.split("+"):
        match = _SPLIT.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"data source: split {split!r} is not of the form 'test', '[:1000]', 'train[10%:20%]'")
        parts.append((match["name"], match["start"], match["stop"]))
    return parts


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


def _expand(path: str, split: str, config: str) -> list[str]:
    """A folder or a pattern as the files in it, sorted; a file as itself."""
    if "!" in path:
        outer, inner = path.split("!", 1)
        path = f"zip://{inner.lstrip('/')}::{outer}"
    remote = _is_remote(path)
    local = path if remote else str(Path(path).expanduser())
    if any(char in local for char in "*?[") and (remote or not Path(local).exists()):
        found = _matching(local)
    elif (folders.kind_of(local) is None if remote else Path(local).is_dir()) and (names := _below(local)):
        return [_joined(local, name) for name in folders.choose(path, names, _reader(local), split, config)]
    elif remote or Path(local).is_file():
        found = [local]
    else:
        raise StorageError(f"{path}: no such file" if not Path(local).is_dir() else _nothing_there(path))
    if not found:
        raise StorageError(_nothing_there(path))
    if split not in ("", "train", "all"):
        raise ConfigError(f"data source {path}: split {split!r}: a file has no splits (a folder does): name its file")
    return found


def _nothing_there(path: str) -> str:
    return f"{path}: no data files there ({', '.join(folders.KINDS)})"


def _matching(pattern: str) -> list[str]:
    """What fits a pattern, without cards, licences and what is hidden."""
    if _is_remote(pattern):
        found = _remote(
            lambda fsspec: sorted(f"{f.fs.unstrip_protocol(f.path)}" for f in fsspec.open_files(pattern)), pattern
        )
    else:
        found = [file for file in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(file)]
    if folders.kind_of(pattern) is not None:  # it says which
        return [file for file in found if not file.lower().endswith("readme.md")]
    return folders.data_files(found, pattern)


def _below(folder: str) -> list[str]:
    """All files below a folder, as paths from there; [] where a remote address is a file."""
    if _is_remote(folder):

        def find(fsspec) -> list[str]:
            system, root = fsspec.core.url_to_fs(folder)
            root = root.rstrip("/")
            return [name[len(root) :].lstrip("/") for name in system.find(root)] if system.isdir(root) else []

        return _remote(find, folder)
    names: list[str] = []
    for place, inner, found in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith((".", "__")))
        names += [os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/") for name in found]
    return names


def _joined(folder: str, name: str) -> str:
    inner, chain, outer = folder.partition("::")
    return f"{inner.rstrip('/')}/{name}{chain}{outer}"


def _reader(folder: str):
    def read(name: str) -> str:
        def opened(fsspec) -> bytes:
            with fsspec.open(_joined(folder, name), "rb") as file:
                return file.read()

        return _remote(opened, f"{folder}/{name}").decode("utf-8-sig", "replace")

    return read


def _remote(action, path: str):
    """Runs `action(fsspec)` with its many kinds of errors as one."""
    import fsspec

    try:
        return action(fsspec)
    except UserError:
        raise
    except ImportError as error:
        raise StorageError(f"{path}: {error}") from None  # "Please install gcsfs to access ..."
    except FileNotFoundError:
        raise StorageError(f"{path}: no such file") from None
    except (ValueError, KeyError) as error:
        raise StorageError(f"{path}: no such file, or no address that fsspec knows ({error})") from None
    except Exception as error:  # each storage has its own
        raise StorageError(f"{path} can't be read: {type(error).__name__}: {error}") from None


def _local_copy(path: str) -> str:
    """The path itself if it is a plain local file; else a copy in the cache, decompressed."""
    if not _is_remote(path) and not path.lower().endswith(folders.COMPRESSED):
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
    aside = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with aside.open("wb") as output:

            def copy(_):
                with fsspec.open(path, "rb", compression=None) as packed, _unpacked(packed, name) as file:
                    while block := _next_block(file, path):
                        output.write(block)

            _remote(copy, path)
        aside.rename(target)
    except OSError as error:
        raise StorageError(f"can't write a local copy of {path} to {folder}: {error}; set SFTJAX_CACHE") from None
    finally:
        aside.unlink(missing_ok=True)
    return str(target)


def _next_block(file, path: str) -> bytes:
    try:
        return file.read(files.CHUNK)
    except (EOFError, ValueError, zlib.error, lzma.LZMAError, OSError) as error:  # each format has its own
        if not path.lower().endswith(folders.COMPRESSED) or getattr(error, "errno", None):
            raise
        raise DataError(f"{path} is cut short or damaged ({str(error).splitlines()[0]}): fetch it again") from None


def _unpacked(file, name: str):
    """The content of a compressed file as a stream."""
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstandard}
    opener = openers.get(os.path.splitext(name.lower())[1])
    return contextlib.nullcontext(file) if opener is None else opener(file)


def _open_zstandard(file):
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")


def _open_file(path: str, unit: str):
    name = re.split(r"::", path)[0].rsplit("/", 1)[-1]
    kind = folders.kind_of(name)
    local = _local_copy(path)
    try:
        with open(local, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise StorageError(f"{path} can't be read: {error.strerror}") from None
    if head[:4] == b"PAR1":
        kind = "parquet"
    elif head[:6] == b"ARROW1" or (head[:4] == b"\xff\xff\xff\xff" and kind in ("arrow", None)):
        kind = "arrow"
    elif head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16 text: save it as UTF-8")
    elif kind in ("parquet", "arrow"):
        raise DataError(f"{path} is not {_FORMATS[kind]} file, or is cut short: fetch it again")
    if not head.strip():
        raise DataError(f"{path} is empty")
    if kind in ("json", None) and (start := head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]) in (b"{", b"["):
        # The content decides: many .json files hold one object a line, and some .jsonl files a list.
        return (files.JsonList if start == b"[" or files.is_one_object(local) else files.JsonLines)(path, local)
    if kind is None:
        raise DataError(f"{path}: neither its name nor its content tells what it is ({', '.join(folders.KINDS)})")
    if kind == "text":
        if unit not in ("line", "paragraph", "file"):
            raise ConfigError(f"data source: unit={unit!r} is not line, paragraph or file")
        return files.TextFile(path, local, unit)
    readers = {"json": files.JsonLines, "parquet": files.Parquet, "arrow": files.Arrow, "csv": files.Csv}
    return readers[kind](path, local)
