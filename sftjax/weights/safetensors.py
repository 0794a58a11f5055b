"""The safetensors format, read by ranges after its header has been checked, and written as a stream.

    8 bytes: length n of the header | n bytes of JSON {name: {dtype, shape, data_offsets}} | the tensors' bytes

The header is checked before anything is allocated: its size, every dtype, shape and offset, that tensors follow each
other without gap or overlap up to the end of the file, and that no name appears twice. There is no pickle path.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from sftjax.errors import ConfigError, StorageError
from sftjax.weights.files import Folder, RangeFile, copy_converted

INDEX = "model.safetensors.index.json"
_MAX_HEADER = 25 * 10**6
_MAX_TENSORS = 200_000
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file: its bytes are `file[start : start + size]`."""

    file: RangeFile
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def read(self, index: tuple[int | slice, ...], out: np.ndarray) -> None:
        """`out[...] = tensor[index]`, converted; reads only the bytes of `index`.

        Args:
          index: integers and slices, as many as there are axes or fewer.
        """
        block = _contiguous(index, self.shape)
        if block is None:
            self.file.read_strided(self.start, self.dtype, self.shape, index, out)
            return
        first = self.start + block[0] * self.dtype.itemsize
        direct = out.dtype == self.dtype and out.flags.c_contiguous
        buffer = out if direct else np.empty(out.shape, self.dtype)
        self.file.read_into(first, memoryview(buffer.reshape(-1).view(np.uint8)))
        if not direct:
            copy_converted(buffer, out)


def _contiguous(index: tuple[int | slice, ...], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(first element, count) where `index` selects consecutive elements, else None."""
    first, count, stride, whole = 0, 1, 1, True
    index = tuple(index) + (slice(None),) * (len(shape) - len(index))
    for at, size in zip(reversed(index), reversed(shape), strict=True):
        span = range(size)[at] if isinstance(at, slice) else range(at, at + 1)
        if len(span) > 1 and (span.step != 1 or not whole):
            return None  # something inside is cut, so rows aren't adjacent
        whole = whole and len(span) == size
        first += span.start * stride
        count *= len(span)
        stride *= size
    return first, count


# -------------------------------------------------------------------------------------------------------- reading


def read_header(file: RangeFile) -> dict[str, Stored]:
    """The tensors of one file.

    Raises:
      StorageError: the file is damaged, cut short, or not safetensors.
      ConfigError: it is a pickle, which is never loaded.
    """

    def damaged(what: str) -> StorageError:
        return StorageError(f"{file.path}: not a sound safetensors file: {what}; download or export it again")

    if file.size < 10:
        raise damaged(f"it has {file.size} bytes")
    start, first = file.read(0, 8), file.read(8, 1)
    if start.startswith(_PICKLES) and first != b"{":  # else a header of 640 bytes, say, which begins so too
        raise ConfigError(f"{file.path}: holds a pickle, which can run code when loaded; convert it to safetensors")
    (length,) = struct.unpack("<Q", start)
    if length > min(_MAX_HEADER, file.size - 8):
        raise damaged(f"its header claims {length:,} bytes of {file.size:,}")
    try:
        header = json.loads(file.read(8, length).decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("the header isn't an object")
        header.pop("__metadata__", None)
        if len(header) > _MAX_TENSORS:
            raise ValueError(f"{len(header):,} tensors")
        return _check_entries(header, file, 8 + length)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(str(error)) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice in the header")
    return found


def _check_entries(header: Mapping[str, Any], file: RangeFile, data: int) -> dict[str, Stored]:
    found, spans = {}, []
    for name, entry in header.items():
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in DTYPES:
            raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
        for number in (*shape, begin, end):
            if type(number) is not int or number < 0:
                raise ValueError(f"{name!r} has {number!r} among its shape and offsets")
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{name!r} has {end - begin:,} bytes, which isn't {dtype} x {shape}")
        spans.append((begin, end, name))
        found[name] = Stored(file, DTYPES[dtype], tuple(shape), data + begin)
    expected = 0
    for begin, end, name in sorted(spans):
        if begin != expected:
            raise ValueError(f"{name!r} starts at {begin:,}, not at {expected:,}, where the tensor before it ends")
        expected = end
    if data + expected != file.size:
        raise ValueError(f"its tensors end at byte {data + expected:,}, the file at {file.size:,}")
    return found


def open_folder(folder: Folder) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder, single or sharded.

    Raises:
      ConfigError: there are no safetensors, or the index names files outside the folder or tensors that aren't there.
      StorageError: a file is missing or damaged.
    """
    names = folder.names()
    if INDEX in names:
        return _open_sharded(folder)
    files = weight_files(names)
    if not files:
        pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
        hint = f"; {pickles[0]} is a pickle, which is never loaded: convert it to safetensors" if pickles else ""
        raise ConfigError(f"{folder.path}: no .safetensors files{hint}")
    found: dict[str, Stored] = {}
    for name in files:
        tensors = read_header(folder.open(name))
        twice = sorted(set(tensors) & set(found))
        if twice:
            raise ConfigError(f"{folder.path}: the tensor {twice[0]!r} is in {name} and in another file too")
        found |= tensors
    return found


def weight_files(names: Iterable[str]) -> list[str]:
    """Which of a folder's files hold the weights, where there is no index.

    `consolidated*.safetensors` holds them again under Mistral's own names.
    """
    files = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if "model.safetensors" in files:
        return ["model.safetensors"]
    parts = [name for name in files if name.startswith("model")]
    return parts or [name for name in files if not name.startswith("consolidated")] or files


def files_of_index(folder: Folder) -> list[str]:
    """The weight files that the folder's index names. Raises ConfigError."""
    return sorted(set(_weight_map(folder).values()))


def _weight_map(folder: Folder) -> dict[str, str]:
    """`{tensor: file}` of the index."""
    where = f"{folder.path}/{INDEX}"
    try:
        weight_map = json.loads(folder.read_bytes(INDEX, _MAX_HEADER), object_pairs_hook=_unique)["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{where}: not a sound index ({error})") from error
    for name in files:
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise ConfigError(f"{where}: names {str(name)[:80]!r}, which isn't a .safetensors file")
    return weight_map


def _open_sharded(folder: Folder) -> dict[str, Stored]:
    where, weight_map = f"{folder.path}/{INDEX}", _weight_map(folder)
    files = sorted(set(weight_map.values()))
    opened = {name: read_header(folder.open(name)) for name in files}
    problems = [f"{tensor!r} isn't in {name}" for tensor, name in weight_map.items() if tensor not in opened[name]]
    problems += [
        f"{tensor!r} is in {name} but not in the index, or in two files"
        for name, tensors in opened.items()
        for tensor in tensors
        if weight_map.get(tensor) != name
    ]
    if problems:
        raise ConfigError(f"{where}: doesn't agree with the files: {'; '.join(problems[:100])}")
    return {tensor: opened[name][tensor] for tensor, name in weight_map.items()}


# -------------------------------------------------------------------------------------------------------- writing


def header_bytes(tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The start of a file whose tensors follow in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start aligned
    return struct.pack("<Q", len(encoded)) + encoded


def write_array(out: BinaryIO, array: np.ndarray) -> None:
    """The bytes of one tensor."""
    contiguous = np.ascontiguousarray(array)
    out.write(memoryview(contiguous.reshape(-1).view(np.uint8)))
