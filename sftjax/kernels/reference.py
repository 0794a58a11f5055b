"""Attention as its formula, in float32: what every kernel is tested against, and the last resort.

Letters: `B` batch, `L` queries, `S` keys, `H` heads, `G` key/value heads, `K` head dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array
MASKED = -1e30  # finite, so that a row that sees nothing has no NaN in its gradient


def visible(info, window: int | None) -> Array:
    """`[B, L, S]`: may the query attend to the key?

    Same segment, and a position not after the query's own; with a window, fewer than `window` positions back.

        segments  1 1 1 2 2      key  0 1 2 3 4
        positions 0 1 2 0 1   query 0 x
                                    1 x x
                                    2 x x x
                                    3       x
                                    4       x x
    """
    distance = info.positions_q[:, :, None] - info.positions_kv[:, None, :]
    mask = (info.segment_ids_q[:, :, None] == info.segment_ids_kv[:, None, :]) & (distance >= 0)
    return mask if window is None else mask & (distance < window)


def attention(q: Array, k: Array, v: Array, info, *, window=None, soft_cap=None, scale, sinks=None, dropout=None):
    """Softmax attention, `[B, L, H, K]` in `q.dtype`; a query that sees no key gets zeros.

    Args:
      q: `[B, L, H, K]`.
      k, v: `[B, S, G, K]`; query head `h` reads key head `h // (H / G)`.
      info: `kernels.attention.AttentionInfo`.
      soft_cap: `cap * tanh(score / cap)` before masking (Gemma 2).
      sinks: `[H]` logits that join each softmax without a value (GPT-OSS).
      dropout: (rate, key) on the probabilities.
    """
    group = q.shape[2] // k.shape[2]
    q_BxLxGxHxK = q.reshape(*q.shape[:2], k.shape[2], group, q.shape[3]).astype(jnp.float32)
    scores = jnp.einsum(
        "BLGHK,BSGK->BGHLS", q_BxLxGxHxK * scale, k.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    mask = visible(info, window)[:, None, None]
    scores = jnp.where(mask, scores, MASKED)
    top = jnp.max(scores, axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(1, k.shape[2], group, 1, 1)
        top = jnp.maximum(top, sinks)
    top = jax.lax.stop_gradient(top)
    weights = jnp.where(mask, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    weights = weights / jnp.maximum(total, 1e-30)
    if dropout is not None:
        weights = drop(weights, *dropout)
    out = jnp.einsum("BGHLS,BSGK->BLGHK", weights, v.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return out.reshape(q.shape).astype(q.dtype)


def drop(weights: Array, rate: float, key: Array) -> Array:
    """Zeroes a share `rate` of the entries and scales the rest, so that the expectation stays."""
    keep = jax.random.bernoulli(key, 1.0 - rate, weights.shape)
    return jnp.where(keep, weights / (1.0 - rate), 0.0)
