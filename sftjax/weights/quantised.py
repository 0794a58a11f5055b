"""Checkpoints whose weights are stored in fewer bits, read as if they weren't: each weight under its own name again.

    fp8     X.weight f8_e4m3 [out, in]; X.weight_scale_inv f32 [out / 128, in / 128], or one number
            DeepSeek-V3, the Qwen3 files named FP8. Blocks at the edges are cut
    nf4,    X.weight u8 [out * in / 2, 1], two codes a byte, the first in the high half; a scale for 64 in a row of the
    fp4     flat weight: X.weight.absmax f32, or in 8 bits with scales of its own (.nested_*); .quant_map [16];
            .quant_state.bitsandbytes__nf4, JSON as bytes. bitsandbytes
    int8    X.weight i8 [out, in], X.SCB f32 [out]: w = code * SCB / 127. bitsandbytes
    mxfp4   X_blocks u8 [E, rows, columns / 32, 16], two codes a byte, the first in the low half; X_scales u8
            [E, rows, columns / 32], powers of two. GPT-OSS

Only the rows that are asked for are read. Sources: `transformers.integrations`, bitsandbytes' `functional.py`, the OCP
Microscaling specification.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from sftjax.errors import ConfigError
from sftjax.kernels import blockwise, nf4
from sftjax.weights import mxfp4
from sftjax.weights.load import Source
from sftjax.weights.rules import Tensor

Index = tuple[int | slice, ...]
Shapes = Mapping[str, tuple[tuple[int, ...], str]]

_STATE = re.compile(r"(.*)\.quant_state\.bitsandbytes__(nf4|fp4)")
_UNUSED = re.compile(r".*\.(activation_scale|input_scale|weight_format)")


class Stored(Protocol):
    """A weight in its stored form."""

    shape: tuple[int, ...]
    dtype: str  # what it counts as: that of the model it was made from
    parts: tuple[str, ...]  # names of the tensors that it is made of

    def read(self, source: Source, index: Index) -> np.ndarray:
        """float32 `weight[index]`."""


class DequantisedSource:
    """A source in which stored forms are weights. Unchanged where there are none.

    Attributes:
      stored: `{name of the weight: its stored form}`.
    """

    def __init__(self, source: Source, settings: Mapping[str, Any] | None):
        """`settings`: the `quantization_config`, or None."""
        self.where, self.plain = source.where, source
        shapes = dict(source.shapes())
        self.stored: dict[str, Stored] = {**_mxfp4(shapes), **_bnb4(source, shapes), **_int8(shapes)}
        self.stored |= _fp8(shapes, settings or {})
        parts = {part for stored in self.stored.values() for part in stored.parts}
        rest = {name: kind for name, kind in shapes.items() if name not in parts and not _UNUSED.fullmatch(name)}
        self._shapes = rest | {name: (stored.shape, stored.dtype) for name, stored in self.stored.items()}

    @property
    def bytes_read(self) -> int:
        return self.plain.bytes_read  # type: ignore[attr-defined]

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return self._shapes

    def read(self, name: str, index: Index, out: np.ndarray) -> None:
        if name in self.stored:
            out[...] = self.stored[name].read(self.plain, index)
        else:
            self.plain.read(name, index, out)


def _span(at: int | slice, size: int) -> range:
    return range(size)[at] if isinstance(at, slice) else range(at, at + 1)


def _full(index: Index, count: int) -> Index:
    return tuple(index) + (slice(None),) * (count - len(index))


def _read(source: Source, name: str, index: Index, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    out = np.empty(shape, dtype)
    source.read(name, index, out)
    return out


# ------------------------------------------------------------------------------------------------------------- fp8


@dataclasses.dataclass(frozen=True)
class _Fp8:
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    code_dtype: np.dtype
    scale_shape: tuple[int, ...]
    scale_dtype: np.dtype
    block: tuple[int, int]
    dtype: str = "bfloat16"

    def read(self, source: Source, index: Index) -> np.ndarray:
        *first, rows, columns = _full(index, len(self.shape))
        spans = _span(rows, self.shape[-2]), _span(columns, self.shape[-1])
        shape = tuple(
            len(range(size)[at]) for at, size in zip(first, self.shape, strict=False) if isinstance(at, slice)
        )
        codes = _read(source, self.parts[0], index_of(first, spans), (*shape, *map(len, spans)), self.code_dtype)
        values = codes.astype(np.float32)
        scales = _read(source, self.parts[1], (), self.scale_shape, self.scale_dtype)
        if scales.dtype == np.uint8:
            scales = np.exp2(scales.astype(np.float32) - 127)
        scales = scales.astype(np.float32)
        if scales.size == 1:
            values *= scales.reshape(())
        else:
            at = [np.asarray(span) // block for span, block in zip(spans, self.block, strict=True)]
            values *= scales[tuple(first)][..., at[0][:, None], at[1][None, :]]
        dropped = tuple(0 if isinstance(each, int) else slice(None) for each in (rows, columns))
        return values[(..., *dropped)]


def index_of(first: list, spans: tuple[range, ...]) -> Index:
    return (*first, *(slice(span.start, span.stop, span.step) for span in spans))


def _fp8(shapes: Shapes, settings: Mapping[str, Any]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    sizes = settings.get("weight_block_size")
    for name, (shape, dtype) in shapes.items():
        if not dtype.startswith("float8_e4m3") or len(shape) < 2:
            continue
        scale = next((f"{name}{end}" for end in ("_scale_inv", "_scale") if f"{name}{end}" in shapes), None)
        if scale is None:
            continue  # then it is no float that can be used, and is refused as that
        scale_shape, scale_dtype = shapes[scale]
        grid = scale_shape[-2:] if len(scale_shape) >= 2 else (1, 1)
        block = tuple(sizes or (-(-size // count) for size, count in zip(shape[-2:], grid, strict=True)))
        count = int(np.prod(scale_shape))
        if count > 1 and scale_shape != (
            *shape[:-2],
            *(-(-size // b) for size, b in zip(shape[-2:], block, strict=True)),
        ):
            raise ConfigError(
                f"{scale} is {list(scale_shape)}, which doesn't fit {name} {list(shape)} in blocks of {block}"
            )
        found[name] = _Fp8(
            (name, scale), shape, np.dtype(_dtype(dtype)), scale_shape, np.dtype(_dtype(scale_dtype)), block
        )
    return found


def _dtype(name: str) -> Any:
    return getattr(ml_dtypes, name, name)


# ----------------------------------------------------------------------------------------------------- bitsandbytes


@dataclasses.dataclass(frozen=True)
class Bnb4:
    """A weight in bitsandbytes' 4-bit form.

    Attributes:
      codes: values of the 16 codes, float32.
      nested: (values of the 256 codes of the scales, the offset added to each scale), or None: scales are float32.
    """

    name: str
    kind: str  # "nf4" or "fp4"
    shape: tuple[int, int]
    dtype: str
    parts: tuple[str, ...]
    codes: np.ndarray
    block: int
    nested: tuple[np.ndarray, np.float32] | None
    nested_block: int

    def packed(self, source: Source, rows: range) -> np.ndarray:
        """u8 `[rows, in / 2]`, for rows of whole bytes."""
        width = self.shape[1] // 2
        flat = self._flat(source, self.name, rows.start * width, rows.stop * width, np.uint8)
        return flat.reshape(len(rows), width)

    def is_ours(self) -> bool:
        """Whether it is what `kernels.nf4` computes with: NF4 in blocks of 64 within rows."""
        if self.kind != "nf4" or self.block != nf4.BLOCK or self.shape[1] % nf4.BLOCK:
            return False
        usual = self.nested is None or (
            self.nested_block == nf4.SCALE_BLOCK and np.array_equal(self.nested[0], blockwise.dynamic_map())
        )
        return usual and np.array_equal(self.codes, nf4.NF4)

    def double(self, source: Source) -> dict[str, np.ndarray]:
        """The scales of all blocks in their 8-bit form, as leaves of `kernels.nf4`."""
        rows, blocks = self.shape[0], self.shape[0] * self.shape[1] // self.block
        coarse = f"{self.name}.nested_absmax"
        return {
            "absmax": self._flat(source, f"{self.name}.absmax", 0, blocks, np.uint8).reshape(rows, -1),
            "absmax_scale": self._flat(source, coarse, 0, source.shapes()[coarse][0][0], np.float32),
            "absmax_offset": np.asarray(self.nested[1], np.float32),
        }

    def scales(self, source: Source, first: int, last: int) -> np.ndarray:
        """float32: the scales of blocks `first` to `last`."""
        if self.nested is None:
            return self._flat(source, f"{self.name}.absmax", first, last, np.float32)
        codes = self._flat(source, f"{self.name}.absmax", first, last, np.uint8)
        outer = np.arange(first, last) // self.nested_block
        coarse = self._flat(source, f"{self.name}.nested_absmax", outer[0], outer[-1] + 1, np.float32)
        values, offset = self.nested
        return values[codes] * coarse[outer - outer[0]] + offset

    def _flat(self, source: Source, name: str, first: int, last: int, dtype: Any) -> np.ndarray:
        shape = source.shapes()[name][0]  # [n], or [n, 1]
        return _read(source, name, (slice(first, last),), (last - first, *shape[1:]), dtype).reshape(-1)

    def read(self, source: Source, index: Index) -> np.ndarray:
        rows, columns = _full(index, 2)
        span = _span(rows, self.shape[0])
        width, lowest, highest = self.shape[1], min(span), max(span) + 1
        first, last = lowest * width // self.block, -(-highest * width // self.block)
        begin = first * self.block
        count = min(last * self.block, self.shape[0] * width) - begin
        packed = self._flat(source, self.name, begin // 2, (begin + count + 1) // 2, np.uint8)
        values = self.codes[np.stack([packed >> 4, packed & 15], axis=-1)].reshape(-1)[:count]
        values = values * np.repeat(self.scales(source, first, last), self.block)[:count]
        values = values.astype(_dtype(self.dtype)).astype(np.float32)  # as bitsandbytes hands them out
        whole = values[lowest * width - begin :][: (highest - lowest) * width].reshape(-1, width)
        chosen = whole[[number - lowest for number in span]] if isinstance(rows, slice) else whole[0]
        return chosen[..., columns]


def _bnb4(source: Source, shapes: Shapes) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for state_name in shapes:
        match = _STATE.fullmatch(state_name)
        if match is None:
            continue
        name, kind = match.groups()
        parts = tuple(part for part in shapes if part == name or part.startswith(f"{name}."))
        try:
            found[name] = _bnb4_of(source, name, kind, parts, state_name, shapes)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{source.where}: {state_name} isn't a sound 4-bit state ({error})") from error
    return found


def _bnb4_of(source: Source, name: str, kind: str, parts: tuple[str, ...], state_name: str, shapes: Shapes) -> Bnb4:
    def whole(part: str, dtype: Any) -> np.ndarray:
        return _read(source, part, (), shapes[part][0], dtype).reshape(-1)

    state = json.loads(whole(state_name, np.uint8).tobytes())
    rows, columns = (int(size) for size in state["shape"])
    nested = None
    if "nested_blocksize" in state:
        values = whole(f"{name}.nested_quant_map", np.float32)
        nested = values, np.float32(state["nested_offset"])
    block = int(state["blocksize"])
    blocks = -(-rows * columns // block)
    if int(np.prod(shapes[name][0])) != -(-rows * columns // 2) or shapes[f"{name}.absmax"][0] != (blocks,):
        raise ValueError(f"its shape {[rows, columns]} doesn't fit the codes")
    return Bnb4(
        name,
        kind,
        (rows, columns),
        str(state["dtype"]),
        parts,
        whole(f"{name}.quant_map", np.float32),
        block,
        nested,
        int(state.get("nested_blocksize", 0)),
    )


def given_nf4(source: Source, table: Iterable[Tensor]) -> dict[str, GivenNf4]:
    """`{path: its stored form}` of the projections of a checkpoint that has some in NF4; others stay as they are."""
    if not isinstance(source, DequantisedSource):
        return {}
    pieces: dict[str, dict[tuple[int, ...], tuple[Bnb4 | None, range]]] = {}
    for tensor in table:
        for part in tensor.parts:
            module, _, name = part.path.rpartition("/")
            if name == "weight" and nf4.is_projection(module):
                stored, rows = source.stored.get(tensor.name), range(part.shape[0])
                if part.select:
                    rows = range(tensor.shape[0])[part.select[0]]
                fits = isinstance(stored, Bnb4) and stored.is_ours() and len(part.select) < 2
                pieces.setdefault(part.path, {})[part.index] = (stored if fits else None, rows)
    found = {path: GivenNf4(source.plain, of_path) for path, of_path in pieces.items()}
    return found if any(given.form != "kept" for given in found.values()) else {}


class GivenNf4:
    """One parameter's layers, and experts, in NF4 as bitsandbytes stored them; a `load.Given`.

    Attributes:
      form: "double", "single", or "kept"; see `kernels.nf4.abstract_split`.
    """

    def __init__(self, source: Source, pieces: Mapping[tuple[int, ...], tuple[Bnb4 | None, range]]):
        self._source, self._pieces = source, pieces
        stored = [(one, rows) for one, rows in pieces.values() if one is not None]
        doubly = all(one.nested is not None and len(rows) == one.shape[0] for one, rows in stored)
        self.form = "kept" if len(stored) < len(pieces) else "double" if doubly else "single"

    def layer(self, repeat: int) -> dict[str, np.ndarray] | None:
        if self.form == "kept":
            return None
        at = sorted(index for index in self._pieces if index[0] == repeat)
        leaves = [self._leaves(*self._pieces[index]) for index in at]
        if len(at[0]) == 1:
            return leaves[0]
        return {name: np.stack([one[name] for one in leaves]) for name in leaves[0]}

    def _leaves(self, stored: Bnb4, rows: range) -> dict[str, np.ndarray]:
        per_row = stored.shape[1] // nf4.BLOCK
        codes = stored.packed(self._source, rows)
        if self.form == "double":
            return {"codes": codes, **stored.double(self._source)}
        scales = stored.scales(self._source, rows.start * per_row, rows.stop * per_row)
        return {"codes": codes, "absmax": scales.astype(np.float32).reshape(len(rows), per_row)}


@dataclasses.dataclass(frozen=True)
class _Int8:
    parts: tuple[str, ...]
    shape: tuple[int, int]
    dtype: str = "float16"

    def read(self, source: Source, index: Index) -> np.ndarray:
        rows, columns = _full(index, 2)
        shape = tuple(
            len(range(size)[at]) for at, size in zip((rows, columns), self.shape, strict=True) if isinstance(at, slice)
        )
        codes = _read(source, self.parts[0], (rows, columns), shape, np.int8)
        scales = _read(source, self.parts[1], (), self.shape[:1], np.float32)[rows]
        scales = scales if isinstance(columns, int) or isinstance(rows, int) else scales[:, None]
        return codes.astype(np.float32) * scales * np.float32(1 / 127)


def _int8(shapes: Shapes) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for name, (shape, dtype) in shapes.items():
        scale = f"{name.removesuffix('weight')}SCB"
        if name.endswith(".weight") and dtype == "int8" and scale in shapes and len(shape) == 2:
            found[name] = _Int8((name, scale), shape)
    return found


# ----------------------------------------------------------------------------------------------------------- MXFP4


@dataclasses.dataclass(frozen=True)
class _Mxfp4:
    parts: tuple[str, ...]
    shape: tuple[int, int, int]
    dtype: str

    def read(self, source: Source, index: Index) -> np.ndarray:
        expert, rows, columns = _full(index, 3)
        count, blocks = len(range(self.shape[1])[rows]), self.shape[2] // 32
        codes = _read(source, self.parts[0], (expert, rows), (count, blocks, 16), np.uint8)
        scales = _read(source, self.parts[1], (expert, rows), (count, blocks), np.uint8)
        return mxfp4.dequantise(codes, scales)[:, columns]


def _mxfp4(shapes: Shapes) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for blocks_name, (shape, dtype) in shapes.items():
        if not blocks_name.endswith("_blocks"):
            continue
        name = blocks_name.removesuffix("_blocks")
        count, rows, blocks, size = shape
        sound = dtype == "uint8" and shapes.get(f"{name}_scales") == ((count, rows, blocks), "uint8")
        parts = (blocks_name, f"{name}_scales")
        found[name] = _Mxfp4(parts, (count, rows, blocks * size * 2), "bfloat16" if sound else "broken MXFP4")
    return found
