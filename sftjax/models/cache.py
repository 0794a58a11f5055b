"""Keys and values of what was read before: how they are kept, and attention of new tokens over them.

Shapes: `B` batch, `T` new tokens, `H` heads, `G` key/value heads, `K` head size, `S` cache slots, `R` stacked layers.
A layer's part of the cache is `{"k", "v": [R, B, G, S, K]}`; slot `s` of a row holds its position `s`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sftjax.kernels import cpu
from sftjax.models import ops

Array = jax.Array
_FEW_SLOTS = 64  # so many a CPU reads faster than it decides how many are needed


def kept_as(dtype: Any) -> jnp.dtype:
    """How keys and values of this type are kept: 16-bit floats as their bits.

    XLA:CPU would widen a whole bfloat16 cache to float32 and back for each scatter (190 ms against 0.2).
    """
    return jnp.dtype(jnp.uint16) if jnp.dtype(dtype).itemsize == 2 else jnp.dtype(dtype)


def write(cache: dict[str, Array], k: Array, v: Array, positions_BxT: Array, repeat: Array) -> dict[str, Array]:
    """Puts new keys and values `[B, T, G, K]` into layer `repeat`'s slots; positions past the end are dropped."""
    rows = jnp.arange(k.shape[0])[:, None]

    def write_one(old: Array, new: Array) -> Array:
        bits = new if new.dtype == old.dtype else jax.lax.bitcast_convert_type(new, old.dtype)
        return old.at[repeat, rows, :, positions_BxT].set(bits, mode="drop")

    return {"k": write_one(cache["k"], k), "v": write_one(cache["v"], v)}


def attention(
    q_BxTxHxK: Array,
    cache: dict[str, Array],
    repeat: Array,
    positions_BxT: Array,
    *,
    window: int | None,
    soft_cap: float | None,
    scale: float,
    sinks_H: Array | None = None,
) -> Array:
    """Attention of a few new tokens over layer `repeat` of the cache, which holds them already: `[B, T, H, K]`.

    A slot is seen if it is not after the query and within its window; slots not written yet are always after it.
    """
    attend = functools.partial(_attend, window=window, soft_cap=soft_cap, scale=scale, sinks_H=sinks_H)
    if q_BxTxHxK.shape[1] > 1 or cache["k"].shape[3] <= _FEW_SLOTS:
        return _together(attend, q_BxTxHxK, cache, repeat, positions_BxT)
    return cpu.choose(
        functools.partial(_row_by_row, attend),
        functools.partial(_together, attend),
        q_BxTxHxK,
        cache,
        repeat,
        positions_BxT,
    )


def _together(attend, q_BxTxHxK: Array, cache: dict[str, Array], repeat: Array, positions_BxT: Array) -> Array:
    """All rows over all slots."""

    def read(old: Array) -> Array:
        return _as_floats(jax.lax.dynamic_index_in_dim(old, repeat, keepdims=False), q_BxTxHxK.dtype)

    return attend(q_BxTxHxK, read(cache["k"]), read(cache["v"]), positions_BxT)


def _row_by_row(attend, q_Bx1xHxK: Array, cache: dict[str, Array], repeat: Array, positions_Bx1: Array) -> Array:
    """Each row over as many slots as it has filled, in powers of two.

    XLA:CPU is fast neither at many small products at once nor at skipping: 64 rows over 512 slots take 14 ms a layer
    together, 6 one by one, and 3.5 where they have filled 100 (3 key/value heads of 64, two cores).
    """
    batch, groups, slots, size = cache["k"].shape[1:]
    sizes = [slots]
    while sizes[0] > _FEW_SLOTS:
        sizes.insert(0, -(-sizes[0] // 2))

    def over(count: int):
        def read(old: Array, row: Array) -> Array:
            part = jax.lax.dynamic_slice(old, (repeat, row, 0, 0, 0), (1, 1, groups, count, size))
            return _as_floats(part[0], q_Bx1xHxK.dtype)

        def one_row(row: Array, q: Array, at: Array) -> Array:
            return attend(q[None], read(cache["k"], row), read(cache["v"], row), at[None])[0]

        return one_row

    def one(inputs):
        row, q, at = inputs
        # a row at rest stands past the end: whatever it reads is of no use
        needed = jnp.where(at[0] < slots, jnp.sum(at[0] >= jnp.asarray(sizes[:-1], jnp.int32)), 0)
        return jax.lax.switch(needed, [over(count) for count in sizes], row, q, at)

    return jax.lax.map(one, (jnp.arange(batch, dtype=jnp.int32), q_Bx1xHxK, positions_Bx1))


def _as_floats(kept: Array, dtype: Any) -> Array:
    return kept if kept.dtype == dtype else jax.lax.bitcast_convert_type(kept, dtype)


def _attend(
    q_BxTxHxK: Array,
    k_BxGxSxK: Array,
    v_BxGxSxK: Array,
    positions_BxT: Array,
    *,
    window: int | None,
    soft_cap: float | None,
    scale: float,
    sinks_H: Array | None,
) -> Array:
    batch, length, heads, size = q_BxTxHxK.shape
    groups, slots = k_BxGxSxK.shape[1:3]
    q = q_BxTxHxK.reshape(batch, length, groups, heads // groups, size)
    scores = jnp.einsum("btgnk,bgsk->bgnts", q, k_BxGxSxK, preferred_element_type=jnp.float32)
    scores = ops.soft_cap(scores * scale, soft_cap)
    distance = positions_BxT[:, :, None] - jnp.arange(slots, dtype=jnp.int32)[None, None, :]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    scores = jnp.where(seen[:, None, None], scores, -1e30)
    if sinks_H is None:
        shares = jax.nn.softmax(scores, axis=-1)
    else:
        sinks = sinks_H.astype(jnp.float32).reshape(1, groups, heads // groups, 1, 1)
        largest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
        shares = jnp.exp(scores - largest)
        shares = shares / (jnp.sum(shares, axis=-1, keepdims=True) + jnp.exp(sinks - largest))
    out = jnp.einsum("bgnts,bgsk->btgnk", shares.astype(v_BxGxSxK.dtype), v_BxGxSxK)
    return out.reshape(batch, length, heads, size).astype(q_BxTxHxK.dtype)
