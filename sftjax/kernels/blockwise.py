"""8-bit block-wise numbers: the dynamic-tree map of the 8-bit optimizers paper (arXiv:2110.02861).

A block is divided by its largest magnitude; what is left lies in [-1, 1] (or [0, 1]) and is rounded to one of 256
values whose spacing grows with magnitude: seven decades, with twice as many values in each as in the one below.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@functools.cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """The 256 values, ascending, float32; 0 and 1 are among them.

    The same numbers as bitsandbytes' `create_dynamic_map`, to the bit.
    """
    values: list[float] = [0.0, 1.0]
    for decade in range(7):
        count = 2 ** (decade if signed else decade + 1)
        edges = _linspace(0.1, 1.0, count + 1)
        middles = ((edges[:-1] + edges[1:]) / np.float32(2)).astype(np.float32)
        decade_values = (np.float32(10.0 ** (decade - 6)) * middles).astype(np.float32).tolist()
        values += decade_values
        if signed:
            values += [-value for value in decade_values]
    values += [0.0] * (256 - len(values))
    return np.sort(np.asarray(values, np.float32))


def _linspace(first: float, last: float, count: int) -> np.ndarray:
    """torch's float32 linspace: a fused multiply-add from the nearer end."""
    low, high = np.float64(np.float32(first)), np.float64(np.float32(last))
    step = np.float64((np.float32(last) - np.float32(first)) / np.float32(count - 1))
    index = np.arange(count)
    return np.where(index < count // 2, low + step * index, high - step * (count - 1 - index)).astype(np.float32)


@functools.cache
def thresholds(signed: bool = True) -> np.ndarray:
    """`[255]`: the midpoints of the map; a value's code is how many of them lie below it."""
    values = dynamic_map(signed)
    return ((values[:-1] + values[1:]) / 2).astype(np.float32)


def count_below(x: Array, edges: np.ndarray, *, inclusive: bool = False) -> Array:
    """How many `edges` lie below each x, u8; with `inclusive`, those equal to it count too.

    `edges` ascend; there are 2**bits - 1 of them. A binary search whose table look-ups are selections from few
    constants: no gather, and no array larger than x.
    """
    code = jnp.zeros(x.shape, jnp.int32)
    size = len(edges) + 1
    while size > 1:
        size //= 2
        edge = select(code // (2 * size), edges[size - 1 :: 2 * size])
        code = code + jnp.where(x >= edge if inclusive else x > edge, size, 0)
    return code.astype(jnp.uint8)


def select(index: Array, table: np.ndarray) -> Array:
    """`table[index]` for a constant table of 2**bits entries, as a tree of selections up to 16 entries.

    Gathers run one element at a time on CPUs and are slow on TPUs.
    """
    if len(table) > 16:
        return jnp.take(jnp.asarray(table), index, mode="clip")
    values = [jnp.asarray(value, table.dtype) for value in table]
    bit = 0
    while len(values) > 1:
        odd = ((index >> bit) & 1) == 1
        values = [jnp.where(odd, values[i + 1], values[i]) for i in range(0, len(values), 2)]
        bit += 1
    return jnp.broadcast_to(values[0], index.shape)


def block_size(last_axis: int, shards: int = 1, largest: int = 256) -> int:
    """The largest divisor, up to 256, of one shard's part of the last axis."""
    part = last_axis // shards if last_axis % shards == 0 else last_axis
    return max(size for size in range(1, min(largest, part) + 1) if part % size == 0)


def quantise(x: Array, block: int, *, signed: bool = True, noise: Array | None = None) -> tuple[Array, Array]:
    """Codes u8 like x, and each block's largest magnitude, float32 `[..., last / block]`.

        x [..., 512], block 256  ->  codes [..., 512], scales [..., 2]

    Args:
      noise: like x, uniform in [0, 1): rounds up or down with probabilities that make the expectation exact. None: to
        the nearest.
    """
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, block)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    unit = (blocks / jnp.where(scales == 0, 1.0, scales)[..., None]).reshape(x.shape)
    return encode(unit, signed=signed, noise=noise), scales


def dequantise(codes: Array, scales: Array, *, signed: bool = True) -> Array:
    """The inverse of `quantise`, float32."""
    block = codes.shape[-1] // scales.shape[-1]
    blocks = decode(codes, signed=signed).reshape(*codes.shape[:-1], -1, block) * scales[..., None]
    return blocks.reshape(codes.shape)


# The map as arithmetic, for millions of numbers a step: a look-up is a gather, which runs one element at a time on
# CPUs. Magnitude code c > 0 is a float with a binary exponent (the decade) and a linear fraction:
#
#     signed   decade e = floor(log2 c),         2**e values   unsigned   e = floor(log2(c + 1)) - 1, 2**(e + 1) values
#     value = 10**(e - 6) * (0.1 + 0.9 * (fraction + half a step))


def decode(codes: Array, *, signed: bool = True) -> Array:
    """The map's value of each code, float32; equal to the table to 1e-6."""
    if signed:
        number = codes.astype(jnp.int32) - 127
        magnitude = jnp.abs(number).astype(jnp.float32)
    else:
        number = codes.astype(jnp.int32)
        magnitude = number.astype(jnp.float32) + 1.0
    bits = jax.lax.bitcast_convert_type(jnp.maximum(magnitude, 1.0), jnp.int32)
    decade = (bits >> 23) - (127 if signed else 128)
    # mantissa - 1 + half of 1 / 2**exponent, all by the bits of the float
    fraction = (magnitude + 0.5) / jax.lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32) - 1.0
    value = select(jnp.maximum(decade, 0), _DECADES) * (0.1 + 0.9 * fraction)
    top = number == (128 if signed else 255)
    value = jnp.where(top, 1.0, jnp.where(number == 0, 0.0, value))
    return jnp.where(number < 0, -value, value)


def encode(unit: Array, *, signed: bool = True, noise: Array | None = None) -> Array:
    """Codes u8 of numbers in [-1, 1] (or [0, 1]), as `quantise` says.

    A number's place among the codes is linear between neighbouring values: within a decade, which in units of its
    upper edge starts at 0.1 + 0.45 / n and goes on in n steps of 0.9 / n, and across the wider gaps between decades.
    """
    size = jnp.abs(unit)
    decade = sum((size >= edge).astype(jnp.int32) for edge in _DECADES[:6])
    n = jax.lax.bitcast_convert_type((decade + (127 if signed else 128)) << 23, jnp.float32)  # 2**e or 2**(e + 1)
    y = size * select(decade, _INVERSE)
    place = (y - 0.1) / 0.9 * n - 0.5
    below = jnp.where(decade == 0, y / (0.1 + 0.45 / n) - 1.0, (y - 0.1 + 0.09 / n) * (n / 0.54) - 1.0)
    above = n - 1.0 + (y - 1.0 + 0.45 / n) * n / jnp.where(decade == 6, 0.45, 2.7)
    place = jnp.where(place < 0, below, jnp.where(place > n - 1, above, place))
    place = place + n - (0.0 if signed else 1.0)  # the decade's first code
    code = jnp.round(place) if noise is None else jnp.floor(place + noise)
    code = jnp.clip(code, 0, 128 if signed else 255).astype(jnp.int32)
    if not signed:
        return code.astype(jnp.uint8)
    return (127 + jnp.where(unit < 0, -jnp.minimum(code, 127), code)).astype(jnp.uint8)  # there is no -1


_DECADES = np.asarray([10.0 ** (e - 6) for e in range(7)] + [10.0], np.float32)  # upper edges, the eighth unused
_INVERSE = np.asarray([10.0 ** (6 - e) for e in range(7)] + [1.0], np.float32)


def hash_noise(shape: tuple[int, ...], seed: Array) -> Array:
    """Uniform [0, 1) float32 from each element's index and a seed (u32): a few integer operations, no state.

    Good enough to round with, not to sample with; the same on any sharding.
    """
    bits = jnp.full(shape, seed.astype(jnp.uint32))
    for axis in range(len(shape)):
        bits = _mix(bits ^ (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(0x9E3779B1)))
    return (bits >> 8).astype(jnp.float32) * np.float32(2.0**-24)


def _mix(bits: Array) -> Array:
    """The finaliser of MurmurHash3."""
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
