"""Weights in four or eight bits: NF4 with double quantisation (QLoRA, arXiv:2305.14314), and int8 per output.

NF4 of a weight `[out, in]`, as bitsandbytes computes it on the CPU, to the bit:

    weight      blocks of 64 in a row     codes, two a byte        [out, in // 2]   u8, the first in the high half
    block max   minus its mean, in
                blocks of 256             absmax                   [out, in // 64]  u8, codes of the dynamic map
    its max     of each such block        absmax_scale             [ceil(out * in / 64 / 256)]  f32
    the mean                              absmax_offset            []  f32

A base that comes from bitsandbytes without double quantisation has the block maxima themselves: absmax f32, and no
leaves for its scale and offset.

A stored form is a dict of these leaves (int8: `codes` i8 `[out, in]`, `scale` f32 `[out]`), behind any leading axes.
Values are found by comparisons with constants: no 16-fold temporary, nothing that would gather a sharded array.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sftjax import tree
from sftjax.errors import ConfigError
from sftjax.kernels import blockwise
from sftjax.kernels.linear import stored_linear

Array = jax.Array
Stored = Mapping[str, Array]

BLOCK, SCALE_BLOCK = 64, 256
# Quantiles of the normal distribution, appendix E of the paper.
NF4 = np.asarray(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
_NF4_EDGES = ((NF4[:-1] + NF4[1:]) / 2).astype(np.float32)


def linear_quant(x: Array, stored: Stored) -> Array:
    """`x[..., in]` times the transpose of the stored weight, `[..., out]` in x's dtype; only the codes are kept for
    the backward pass."""
    return stored_linear(dequantise, x, dict(stored))


def dequantise(stored: Stored, dtype: jnp.dtype = jnp.float32) -> Array:
    """A stored weight as `[..., out, in]`."""
    if stored["codes"].dtype == jnp.int8:
        return (stored["codes"].astype(jnp.float32) * stored["scale"][..., None]).astype(dtype)
    function = functools.partial(_dequantise_nf4, dtype=dtype)
    for _ in range(stored["codes"].ndim - 2):
        function = jax.vmap(function)
    return function(dict(stored))


def quantise(weight: Array, kind: str = "nf4") -> dict[str, Array]:
    """A weight `[..., out, in]` as stored leaves.

    Args:
      kind: "nf4" or "int8".

    Raises:
      ConfigError: NF4 of rows that aren't whole blocks of 64.
    """
    if kind not in ("nf4", "int8"):
        raise ConfigError(f"peft.quantization={kind!r}: use nf4 or int8")
    if kind == "nf4" and weight.shape[-1] % BLOCK:
        raise ConfigError(
            f"peft.quantization=nf4 needs rows of whole blocks of {BLOCK}; there is a weight {tuple(weight.shape)}: "
            "use int8"
        )
    function = {"nf4": _quantise_nf4, "int8": _quantise_int8}[kind]
    for _ in range(weight.ndim - 2):
        function = jax.vmap(function)
    return function(weight)


def make_transform(kind: str, targets: Callable[[str], bool]) -> Callable[[str, Array], dict[str, Array] | None]:
    """A hook for loading: `(path of a weight, its [out, in] tensor) -> stored leaves`, or None to keep it as it is.

    Args:
      targets: which module paths are quantised, e.g. `is_projection`.
    """
    compiled = jax.jit(functools.partial(quantise, kind=kind))

    def transform(path: str, weight: Array) -> dict[str, Array] | None:
        module, _, name = path.rpartition("/")
        return dict(compiled(weight)) if name == "weight" and targets(module) else None

    return transform


def is_projection(module: str) -> bool:
    """QLoRA's choice: the projections of blocks; not embedding, head, router, norms."""
    return module.endswith("_proj")


def stored_shapes(shape: tuple[int, ...], kind: str = "nf4", *, double: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
    """What `quantise` gives for a weight of this shape, without computing it; `double`: block maxima in 8 bits."""
    found = jax.eval_shape(functools.partial(quantise, kind=kind), jax.ShapeDtypeStruct(shape, jnp.float32))
    if kind == "nf4" and not double:
        return {"codes": found["codes"], "absmax": jax.ShapeDtypeStruct(found["absmax"].shape, jnp.float32)}
    return found


def abstract_split(
    params: Mapping, kind: str, targets: Callable[[str], bool], given: Mapping[str, str] | None = None
) -> tuple[dict, dict]:
    """A tree of shapes as (what loading with `make_transform` keeps, what it makes).

    Args:
      given: `{path: form}` of weights that come quantised: "double", "single" (block maxima in float32), or "kept"
        where the checkpoint itself left some as they were.
    """
    kept, made = {}, {}
    for path, leaf in tree.flatten(params).items():
        module, _, name = path.rpartition("/")
        form = (given or {}).get(path, "double")
        if name == "weight" and targets(module) and form != "kept":
            shapes = stored_shapes(leaf.shape, kind, double=form == "double")
            made |= {f"{module}/{part}": shape for part, shape in shapes.items()}
        else:
            kept[path] = leaf
    return tree.unflatten(kept), tree.unflatten(made)


def count_weights(quant: Mapping) -> int:
    """How many weights a tree of stored forms stands for (two to a byte in NF4)."""
    codes = [leaf for path, leaf in tree.flatten(quant).items() if path.endswith("/codes")]
    return sum(leaf.size * (1 if leaf.dtype == jnp.int8 else 2) for leaf in codes)


# ------------------------------------------------------------------------------------------------------------- NF4


def _quantise_nf4(weight: Array) -> dict[str, Array]:
    rows, width = weight.shape
    blocks = weight.astype(jnp.float32).reshape(rows, width // BLOCK, BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=-1)
    # a reciprocal and a product, as bitsandbytes: a division would round some values to the neighbouring code
    unit = blocks * (1.0 / jnp.maximum(largest, jnp.finfo(jnp.float32).tiny))[..., None]
    codes = blockwise.count_below(jnp.clip(unit, -1.0, 1.0), _NF4_EDGES).reshape(rows, width // 2, 2)
    return {"codes": (codes[..., 0] << 4) | codes[..., 1]} | quantise_scales(largest)


def quantise_scales(largest: Array, offset: Array | None = None) -> dict[str, Array]:
    """The second quantisation: block maxima f32 `[out, in // 64]` to 8 bits, less their mean (or `offset`)."""
    count = largest.size
    offset = tree_sum(largest.reshape(-1)) / count if offset is None else offset
    flat = jnp.pad((largest - offset).reshape(-1), (0, -count % SCALE_BLOCK)).reshape(-1, SCALE_BLOCK)
    scale = jnp.max(jnp.abs(flat), axis=-1)
    unit = jnp.clip(flat * (1.0 / jnp.where(scale == 0, 1.0, scale))[:, None], -1.0, 1.0)
    codes = blockwise.count_below(unit, _scale_edges(), inclusive=True)
    codes = jnp.where(scale[:, None] == 0, 0, codes).astype(jnp.uint8)
    return {
        "absmax": codes.reshape(-1)[:count].reshape(largest.shape),
        "absmax_scale": scale,
        "absmax_offset": offset,
    }


def dequantise_scales(stored: Stored) -> Array:
    """Block maxima, float32 `[out, in // 64]`."""
    codes = stored["absmax"]
    if codes.dtype == jnp.float32:
        return codes
    values = jnp.take(jnp.asarray(blockwise.dynamic_map()), codes, mode="clip")
    block = jnp.arange(codes.size).reshape(codes.shape) // SCALE_BLOCK
    return values * stored["absmax_scale"][block] + stored["absmax_offset"]


def tree_sum(x: Array) -> Array:
    """A sum whose order doesn't depend on the platform or on sharding: halves are added, again and again."""
    size = 1 << max(0, x.size - 1).bit_length()
    x = jnp.pad(x, (0, size - x.size))
    while x.size > 1:
        x = x[: x.size // 2] + x[x.size // 2 :]
    return x[0]


def _dequantise_nf4(stored: Stored, dtype: jnp.dtype) -> Array:
    packed = stored["codes"]
    rows, half = packed.shape
    codes = jnp.stack([packed >> 4, packed & 15], axis=-1).reshape(rows, -1, BLOCK)
    values = blockwise.select(codes, NF4) * dequantise_scales(stored)[..., None]
    return values.reshape(rows, 2 * half).astype(dtype)


@functools.cache
def _scale_edges() -> np.ndarray:
    """`[255]`: the smallest float32 that bitsandbytes' CPU code gives code 1, 2, ...

    It rounds a value to a grid of 65,536 points first and takes the code nearest to the grid point, so that codes
    next to 0 are never used. Codes ascend with the value, so one threshold each says the same.
    """
    values = blockwise.dynamic_map()
    grid = (-1.0 + 2.0 * np.arange(65536) / 65535).astype(np.float32)
    right = np.clip(np.searchsorted(values, grid), 1, 255)
    nearer = np.abs(values[right] - grid) < np.abs(grid - values[right - 1])
    code_of_point = np.where(nearer, right, right - 1)

    def code(x: np.ndarray) -> np.ndarray:
        point = (x + np.float32(1)) * np.float32(0.5)
        return code_of_point[(point.astype(np.float64) * 65535 + 0.5).astype(np.float32).astype(np.int64)]

    # bisect over the float32 numbers themselves, as ordered integers
    low, high = np.full(255, _ordered(np.float32(-1)) - 1), np.full(255, _ordered(np.float32(1)))
    wanted = np.arange(1, 256)
    while np.any(high - low > 1):
        middle = (low + high) // 2
        reached = code(_from_ordered(middle)) >= wanted
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return _from_ordered(high)


def _ordered(x: np.ndarray) -> np.ndarray:
    """float32 to integers in the same order."""
    bits = np.asarray(x, np.float32).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _from_ordered(index: np.ndarray) -> np.ndarray:
    bits = np.where(index < 0, -index + 0x80000000, index)
    return bits.astype(np.uint32).view(np.float32)


# ------------------------------------------------------------------------------------------------------------ int8


def _quantise_int8(weight: Array) -> dict[str, Array]:
    weight = weight.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(weight), axis=-1), jnp.finfo(jnp.float32).tiny) / 127
    return {"codes": jnp.round(weight / scale[:, None]).astype(jnp.int8), "scale": scale}
