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


def quantise(x: Array, block: int, *, signed: bool = True) -> tuple[Array, Array]:
    """Codes u8 like x, and each block's largest magnitude, float32 `[..., last / block]`.

    x [..., 512], block 256  ->  codes [..., 512], scales [..., 2]
    """
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, block)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    unit = blocks / jnp.where(scales == 0, 1.0, scales)[..., None]
    return count_below(unit, thresholds(signed)).reshape(x.shape), scales


def dequantise(codes: Array, scales: Array, *, signed: bool = True) -> Array:
    """The inverse of `quantise`, float32."""
    block = codes.shape[-1] // scales.shape[-1]
    values = jnp.take(jnp.asarray(dynamic_map(signed)), codes, mode="clip")
    blocks = values.reshape(*codes.shape[:-1], -1, block) * scales[..., None]
    return blocks.reshape(codes.shape)
