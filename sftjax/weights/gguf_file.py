"""The GGUF container: metadata and tensor directory, parsed and checked before any tensor is touched.

Source: the GGUF specification, version 3 (ggml/docs/gguf.md); version 2 is the same on disk. The parser is our own
because the `gguf` package's takes 20 s for a vocabulary of 262,144 tokens; its tables and dequantisation are used.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import struct
from typing import Any

import gguf
import numpy as np

from sftjax.errors import StorageError
from sftjax.weights.files import RangeFile

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_METADATA = 256 * 2**20
_MAX_COUNT = 4_000_000  # entries of one array


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor; `shape` in numpy's order, rows are stored one after another in blocks of `kind`."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int  # absolute

    @property
    def row_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """What a file says about itself."""

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read(path: str | os.PathLike) -> GgufFile:
    """Parses a local file; remembered while it doesn't change.

    Raises:
      StorageError: it can't be read or is damaged.
    """
    try:
        state = os.stat(path)
    except OSError as error:
        raise StorageError(f"{path}: can't be read ({error.strerror})") from error
    return _read(os.fspath(path), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _read(path: str, size: int, _: int) -> GgufFile:
    with RangeFile(path) as file:
        count = min(size, _MAX_METADATA)
        head = np.memmap(path, np.uint8, "r", shape=(count,)) if count else b""
        try:
            return _Parser(memoryview(head), file).parse()
        except (struct.error, ValueError, IndexError, KeyError, OverflowError, RecursionError) as error:
            raise StorageError(f"{path}: not a sound GGUF file ({error}); download it again") from error


class _Parser:
    def __init__(self, head: memoryview, file: RangeFile):
        self.head, self.file, self.at = head, file, 0

    def parse(self) -> GgufFile:
        if bytes(self.head[:4]) != b"GGUF":
            raise ValueError("it doesn't start with GGUF")
        self.at = 4
        version, tensor_count, field_count = self.scalar("I"), self.scalar("Q"), self.scalar("Q")
        if version not in (2, 3):
            raise ValueError(f"version {version}; 2 and 3 are known")
        if max(tensor_count, field_count) > _MAX_COUNT:
            raise ValueError(f"{tensor_count:,} tensors, {field_count:,} fields")
        metadata: dict[str, Any] = {}
        for _ in range(field_count):
            name = self.string()
            if name in metadata:
                raise ValueError(f"{name!r} appears twice")
            metadata[name] = self.value(self.scalar("I"))
        if metadata.get("split.count", 1) > 1:
            raise ValueError("it is one of several parts; join them with llama-gguf-split --merge first")
        entries = [self.entry() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        data = self.at + (-self.at) % alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise ValueError(f"the tensor {name!r} appears twice")
            tensors[name] = self.checked(GgufTensor(name, shape, kind, data + offset))
        return GgufFile(self.file.path, metadata, tensors)

    def entry(self) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
        name, axes = self.string(), self.scalar("I")
        if axes > 4:
            raise ValueError(f"{name!r} has {axes} axes")
        shape = tuple(self.scalar("Q") for _ in range(axes))[::-1]
        return name, shape, gguf.GGMLQuantizationType(self.scalar("I")), self.scalar("Q")

    def checked(self, tensor: GgufTensor) -> GgufTensor:
        block, _ = gguf.GGML_QUANT_SIZES[tensor.kind]
        if not tensor.shape or tensor.shape[-1] % block:
            raise ValueError(f"{tensor.name!r} has the shape {tensor.shape}, in blocks of {block}")
        if tensor.start + math.prod(tensor.shape[:-1]) * tensor.row_bytes > self.file.size:
            raise ValueError(f"{tensor.name!r} lies beyond the end of the file; truncated?")
        return tensor

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.head, self.at)[0]
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        if self.at + length > len(self.head):
            raise ValueError("a text lies beyond the end")
        text = str(self.head[self.at : self.at + length], "utf-8", "replace")
        self.at += length
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > _MAX_COUNT:
            raise ValueError(f"an array of {count:,} entries")
        if kind in (_STRING, _ARRAY):
            return [self.value(kind) for _ in range(count)]
        values = list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.head, self.at))
        self.at += struct.calcsize(f"<{count}{_SCALARS[kind]}")
        return values
