"""Attention by plain XLA operations, one block of queries at a time: the CPU's kernel, and the fallback elsewhere.

The scores of a block exist, those of the layer never do; the backward pass makes them again from `q`, `k` and the
saved log-sum-exp. Three things make it quick:

- Keys after a block's last query, or before its window, are never touched: with the packer's order that is static.
- On a CPU, keys of segments that ended before the block are skipped too: the first key that counts is looked up and a
  `switch` takes the smallest of a few static widths that reaches it.
- On a CPU, every product is in the form that is multiplied at full speed (`kernels/cpu.py`): the backward pass works
  on *transposed* scores, `[keys, queries]`, so that dK and dV need no transpose and dQ only that of a small matrix.

Letters: `G` key/value heads, `R` query heads for each of them, `L` queries, `S` keys, `K` head dimension; `M` is `R`
and a block of queries in one axis. Functions whose name starts with `row_` work on one row of the batch.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sftjax.kernels import cpu
from sftjax.kernels.linear import precision_for

Array = jax.Array
MASKED, NOTHING = -1e30, -1e29  # a masked score; the least maximum of a row, so that exp(MASKED - it) is 0
BLOCK = 256  # queries; with it the scores of a block stay in a CPU's cache


@dataclasses.dataclass(frozen=True)
class Options:
    window: int | None
    soft_cap: float | None
    scale: float
    in_order: bool
    block: int
    single_cpu: bool = False


def attention(q, k, v, info, *, window=None, soft_cap=None, scale, sinks=None, block: int = BLOCK) -> Array:
    """As `kernels.attention.attention`, without dropout."""
    B, L, H, K = q.shape
    G = k.shape[2]
    options = Options(window, soft_cap, scale, info.in_order, block)
    q_BxGxRxLxK = jnp.transpose(q.reshape(B, L, G, H // G, K), (0, 2, 3, 1, 4))
    k_BxGxSxK, v_BxGxSxK = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    ids = (info.segment_ids_q, info.positions_q, info.segment_ids_kv, info.positions_kv)
    sinks_GxR = None if sinks is None else sinks.astype(jnp.float32).reshape(G, H // G)
    out = _attend(options, q_BxGxRxLxK, k_BxGxSxK, v_BxGxSxK, sinks_GxR, ids)
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(B, L, H, K)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, sinks, ids):
    return _forward(options, q, k, v, sinks, ids)[0]


def _forward(options, q, k, v, sinks, ids):
    def by_row(options, mapped, q, k, v, ids):
        return mapped(lambda row: row_forward(options, *row[:3], sinks, row[3]), (q, k, v, ids))

    out, lse = _choose(options, by_row, q, k, v, ids)
    # Named here, inside the rule: a name put on the result outside would not reach the residuals.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, sinks, ids, out, lse)


def _backward(options, residuals, d_out):
    q, k, v, sinks, ids, out, lse = residuals
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def by_row(options, mapped, q, k, v, ids, lse, delta, d_out):
        return mapped(lambda row: row_backward(options, *row), (q, k, v, ids, lse, delta, d_out))

    dq, dk, dv = _choose(options, by_row, q, k, v, ids, lse, delta, d_out)
    d_sinks = None if sinks is None else -jnp.sum(jnp.exp(sinks[None, :, :, None] - lse) * delta, axis=(0, 3))
    return dq, dk, dv, d_sinks, None


_attend.defvjp(_forward, _backward)


def _choose(options, by_row, *args):
    """One row after the other on a single CPU (each fills it, and has its own widths); all at once elsewhere."""

    def one_by_one(function, rows):
        if jax.tree.leaves(rows)[0].shape[0] == 1:
            return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], rows)))
        return jax.lax.map(function, rows)

    def together(function, rows):
        return jax.vmap(lambda *row: function(row))(*rows)

    on_cpu = functools.partial(by_row, dataclasses.replace(options, single_cpu=True), one_by_one)
    return cpu.choose(on_cpu, functools.partial(by_row, options, together), *args)


# --- one row ------------------------------------------------------------------------------------------------------


def row_forward(options, q_GxRxLxK, k_GxSxK, v_GxSxK, sinks_GxR, ids):
    """Output `[G, R, L, K]` and log-sum-exp `[G, R, L]` (float32)."""
    G, R, L, K = q_GxRxLxK.shape
    outs, lses = [], []
    for low, high in _blocks(L, options.block):

        def block(first, last, low=low, high=high, q_GxRxLxK=q_GxRxLxK):
            q_GxMxK = q_GxRxLxK[:, :, low:high].reshape(G, -1, K)
            keys, values = k_GxSxK[:, first:last], v_GxSxK[:, first:last]
            scores = _product(options, q_GxMxK, keys, 2).reshape(G, R, high - low, last - first)
            bias_LxS = _bias(options, ids, slice(low, high), slice(first, last), keys_first=False)
            scores, _ = _cap(options, scores)
            scores = scores + bias_LxS[None, None]
            top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), NOTHING)
            if sinks_GxR is not None:
                top = jnp.maximum(top, sinks_GxR[:, :, None, None])
            weights = jax.lax.optimization_barrier(jnp.exp(scores - top).astype(v_GxSxK.dtype))
            # Summed as they are multiplied, that is, rounded: the output is a true average of the values.
            total = jnp.sum(weights.astype(jnp.float32), axis=-1)
            if sinks_GxR is not None:
                total = total + jnp.exp(sinks_GxR[:, :, None] - top[..., 0])
            total = jnp.maximum(total, 1e-30)
            out = _product(options, weights.reshape(G, R * (high - low), -1), values, 1)
            out = out.reshape(G, R, high - low, K) / total[..., None]
            return out.astype(q_GxRxLxK.dtype), top[..., 0] + jnp.log(total)

        out, lse = _over_widths(options, ids, low, high, k_GxSxK.shape[1], block)
        q_GxRxLxK, out = _one_after_the_other(options, q_GxRxLxK, out)
        outs.append(out)
        lses.append(lse)
    return jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=2)


def row_backward(options, q_GxRxLxK, k_GxSxK, v_GxSxK, ids, lse_GxRxL, delta_GxRxL, do_GxRxLxK):
    """Gradients of q, k and v."""
    G, R, L, K = q_GxRxLxK.shape
    dtype = q_GxRxLxK.dtype
    do_GxRxLxK = do_GxRxLxK.astype(dtype)
    dqs = []
    dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (k_GxSxK, v_GxSxK))
    for low, high in _blocks(L, options.block):

        def block(first, last, dk, dv, low=low, high=high, q_GxRxLxK=q_GxRxLxK):
            rows = slice(low, high)
            q_GxMxK = q_GxRxLxK[:, :, rows].reshape(G, -1, K)
            do_GxMxK = do_GxRxLxK[:, :, rows].reshape(G, -1, K)
            keys, values = k_GxSxK[:, first:last], v_GxSxK[:, first:last]
            transposed = (G, last - first, R, high - low)
            scores, slope = _cap(options, _product(options, keys, q_GxMxK, 2).reshape(transposed))
            bias_SxL = _bias(options, ids, rows, slice(first, last), keys_first=True)
            weights = jnp.exp(scores + (bias_SxL[None, :, None] - lse_GxRxL[:, None, :, rows]))
            d_weights = _product(options, values, do_GxMxK, 2).reshape(transposed)
            d_scores = weights * (d_weights - delta_GxRxL[:, None, :, rows]) * slope
            flat = (G, last - first, -1)
            weights, d_scores = (x.astype(dtype).reshape(flat) for x in (weights, d_scores))
            dv_part = _product(options, weights, do_GxMxK, 1)
            dk_part = _product(options, d_scores, q_GxMxK, 1)
            dq_GxKxM = _product(options, _row_major(options, jnp.swapaxes(keys, 1, 2)), d_scores, 1)
            dq = jnp.transpose(dq_GxKxM.reshape(G, K, R, -1), (0, 2, 3, 1)).astype(dtype)
            return dq, dk.at[:, first:last].add(dk_part), dv.at[:, first:last].add(dv_part)

        dq, dk, dv = _over_widths(options, ids, low, high, k_GxSxK.shape[1], block, dk, dv)
        q_GxRxLxK, dq, dk, dv = _one_after_the_other(options, q_GxRxLxK, dq, dk, dv)
        dqs.append(dq)
    return jnp.concatenate(dqs, axis=2), dk.astype(k_GxSxK.dtype), dv.astype(v_GxSxK.dtype)


def _cap(options, scores):
    """Scaled and capped scores, and their derivative by the product of q and k."""
    scores = scores * options.scale
    if options.soft_cap is None:
        return scores, options.scale
    squashed = jnp.tanh(scores / options.soft_cap)
    return squashed * options.soft_cap, (1.0 - squashed * squashed) * options.scale


def _bias(options, ids, rows: slice, columns: slice, *, keys_first: bool):
    """0 where the query may see the key, else `MASKED`; `[queries, keys]`, or `[keys, queries]`."""
    query_axis, key_axis = (0, 1) if keys_first else (1, 0)
    segments_q, positions_q = (jnp.expand_dims(x[rows], query_axis) for x in ids[:2])
    segments_kv, positions_kv = (jnp.expand_dims(x[columns], key_axis) for x in ids[2:])
    distance = positions_q - positions_kv
    seen = (segments_q == segments_kv) & (distance >= 0)
    if options.window is not None:
        seen = seen & (distance < options.window)
    # Made once for all heads, instead of inside the pass over their scores.
    return jax.lax.optimization_barrier(jnp.where(seen, 0.0, MASKED))


def _product(options, a, b, b_axis: int):
    """`a[G, m, k]` times `b` (`[G, n, k]` for `b_axis` 2, `[G, k, n]` for 1) as float32 `[G, m, n]`."""
    dims = (((2,), (b_axis,)), ((0,), (0,)))
    return _row_major(options, cpu.dot_general(a, b, dims, precision_for(a.dtype), jnp.float32))


def _one_after_the_other(options, *arrays):
    """The next block waits for this one, so that its scores lie where these were, warm in the cache."""
    return jax.lax.optimization_barrier(arrays) if options.single_cpu else arrays


def _row_major(options, x):
    return cpu.row_major(x) if options.single_cpu else x


# --- which keys ---------------------------------------------------------------------------------------------------


def _blocks(length: int, size: int) -> list[tuple[int, int]]:
    return [(low, min(low + size, length)) for low in range(0, length, size)]


def _over_widths(options, ids, low: int, high: int, keys: int, block, *carry):
    """`block(first, last, *carry)` for the narrowest static range of keys that holds all that the queries can see.

    queries of block 3     keys  0    1    2    3
    widths                                  |----|      one segment covers the block
                                       |---------|
                             |-------------------|      at most three branches more than a 1024-long row has
    """
    if not options.in_order:
        return block(0, keys, *carry)
    # In the packer's order a key in the window is at most `window - 1` columns back.
    least = 0 if options.window is None else max(0, low - options.window + 1)
    firsts = [low]
    step = options.block
    while firsts[-1] > least:
        firsts.append(max(least, low - step))
        step *= 2
    if not options.single_cpu or len(firsts) == 1:
        return block(least, high, *carry)
    segments = ids[0]
    first_key = jnp.argmax(segments == segments[low])
    narrowest = jnp.sum(jnp.array(firsts) > first_key)
    branches = [functools.partial(block, first, high) for first in firsts]
    return jax.lax.switch(jnp.minimum(narrowest, len(firsts) - 1), branches, *carry)
