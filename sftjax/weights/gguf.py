"""GGUF files in: configuration, tensors under their Hugging Face names, tokenizer.

    config = families.read_config(gguf.read_config("model.gguf"))
    gguf.tokenizer_files("model.gguf")

llama.cpp stores some tensors otherwise than HF does, which is undone here: rows of q and k are permuted in Llama-like
models (its RoPE rotates neighbours, HF's rotates halves), and Gemma's norms have 1 added.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import gguf
import numpy as np

from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig
from sftjax.weights import gguf_config, gguf_file
from sftjax.weights.files import RangeFile, copy_converted
from sftjax.weights.gguf_tokenizer import build_tokenizer, tokenizer_data, tokenizer_files

__all__ = [
    "GgufSource",
    "build_tokenizer",
    "read_config",
    "read_generation",
    "tokenizer_data",
    "tokenizer_files",
]

_NOT_PARAMETERS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_ONE_ROW = "shared_expert_gate.weight"
_USABLE = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def read_config(path: str) -> dict[str, Any]:
    """The config.json that transformers would write for this model; see `gguf_config.read`."""
    file = gguf_file.read(path)
    return gguf_config.read(file, lambda name: _vector(file, name))


def _vector(file: gguf_file.GgufFile, name: str) -> np.ndarray:
    tensor = file.tensors[name]
    out = np.empty(tensor.shape, np.float32)
    with RangeFile(file.path) as opened:
        _read_rows(opened, tensor, slice(None), out)
    return out


def read_generation(path: str) -> dict[str, Any]:
    """generation_config.json: the special tokens, and the end of a turn as a further stop."""
    metadata = gguf_file.read(path).metadata
    ids = {name: value for name, value in gguf_config.token_ids(metadata).items() if value is not None}
    turn = metadata.get("tokenizer.ggml.eot_token_id")
    if turn is not None and turn != ids.get("eos_token_id"):
        ids["eos_token_id"] = [ids["eos_token_id"], turn] if "eos_token_id" in ids else turn
    return ids


# -------------------------------------------------------------------------------------------------------- tensors


class GgufSource:
    """The tensors of a GGUF file as a `load.Source` under HF names, dequantised by rows as they are read."""

    def __init__(self, path: str, config: ModelConfig):
        self.where, self._config = path, config
        file = gguf_file.read(path)
        architecture = file.metadata["general.architecture"]
        self._permuted = gguf_config.BY_NAME[architecture].permuted
        names = gguf_config.hf_names(config, architecture)
        # a tensor without an HF name keeps its own, and is reported as unexpected
        self._tensors = {
            names.get(name, name): tensor for name, tensor in file.tensors.items() if name not in _NOT_PARAMETERS
        }
        self._file = RangeFile(path)
        for name, tensor in self._tensors.items():
            if tensor.kind.name not in _USABLE:
                raise ConfigError(f"{path}: {name} is quantised as {tensor.kind.name}; known are {', '.join(_USABLE)}")

    @property
    def bytes_read(self) -> int:
        return self._file.bytes_read

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        # a matrix of one row is a vector in GGUF
        wide = {name: (1, *tensor.shape) for name, tensor in self._tensors.items() if name.endswith(_ONE_ROW)}
        return {name: (wide.get(name, tensor.shape), "float32") for name, tensor in self._tensors.items()}

    def read(self, name: str, index: tuple[int | slice, ...], out: np.ndarray) -> None:
        tensor = self._tensors[name]
        if name.endswith(_ONE_ROW):
            tensor = dataclasses.replace(tensor, shape=(1, *tensor.shape))
        if len(tensor.shape) == 3:  # stacked experts: each a matrix of its own
            self._read_experts(tensor, index, out)
            return
        if len(tensor.shape) == 1:
            whole = np.empty(tensor.shape, np.float32)
            _read_rows(self._file, tensor, slice(None), whole)
            is_norm = name.endswith("norm.weight")
            whole = whole - np.float32(1) if self._config.norm_plus_one and is_norm else whole
            rows = self._rows_of(name, tensor.shape[0])
            copy_converted((whole if rows is None else whole[rows])[index], out)
            return
        index = list(index) + [slice(None)] * (2 - len(index))
        for axis, at in enumerate(index):
            if not isinstance(at, slice):
                index[axis], out = slice(at, at + 1), np.expand_dims(out, axis)
        span = range(tensor.shape[0])[index[0]]
        rows = self._rows_of(name, tensor.shape[0])
        step = max(1, 2**22 // tensor.shape[1])  # rows at a time, so that scratch memory stays small
        if rows is not None:
            step = self._config.head_dim * max(1, step // self._config.head_dim)
        for first in range(0, len(span), step):
            part = span[first : first + step]
            if rows is None:
                block = np.empty((len(part), tensor.shape[1]), np.float32)
                _read_rows(self._file, tensor, slice(part.start, part.stop), block)
            else:
                wanted = rows[part.start : part.stop]
                low, high = int(wanted.min()), int(wanted.max()) + 1
                block = np.empty((high - low, tensor.shape[1]), np.float32)
                _read_rows(self._file, tensor, slice(low, high), block)
                block = block[wanted - low]
            copy_converted(block[:, index[1]], out[first : first + len(part)])

    def _read_experts(self, tensor: gguf_file.GgufTensor, index: tuple[int | slice, ...], out: np.ndarray) -> None:
        first, *rest = index or (slice(None),)
        experts = [first] if not isinstance(first, slice) else range(tensor.shape[0])[first]
        targets = [out] if not isinstance(first, slice) else out
        _, rows, columns = tensor.shape
        for expert, target in zip(experts, targets, strict=True):
            block = np.empty((rows, columns), np.float32)
            _read_rows(self._file, tensor, slice(expert * rows, (expert + 1) * rows), block)
            copy_converted(block[tuple(rest)], target)

    def _rows_of(self, name: str, count: int) -> np.ndarray | None:
        if self._permuted and re.search(r"self_attn\.[qk]_proj\.(weight|bias)$", name):
            return gguf_config.unpermuted_rows(count // self._config.head_dim, self._config.head_dim)
        return None


def _read_rows(file: RangeFile, tensor: gguf_file.GgufTensor, rows: slice, out: np.ndarray) -> None:
    """Dequantises rows of a tensor (a vector is one row) into float32."""
    count = 1 if len(tensor.shape) == 1 else math.prod(tensor.shape[:-1])
    span = range(count)[rows] if len(tensor.shape) > 1 else range(1)
    raw = np.empty((len(span), tensor.row_bytes), np.uint8)
    file.read_into(tensor.start + span.start * tensor.row_bytes, memoryview(raw.reshape(-1)))
    out[...] = gguf.quants.dequantize(raw, tensor.kind).reshape(out.shape)
