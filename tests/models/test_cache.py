"""Attention over a cache against its formula in float64: windows, caps, sinks, ragged rows, in all ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax.models import cache as caches

SCALE = 0.3


def formula(q, k, v, at, window, cap, sinks):
    """[B, T, H, K] in float64, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    share = q.shape[2] // k.shape[1]
    for b, t, h in np.ndindex(q.shape[:3]):
        first = 0 if window is None else max(0, at[b, t] - window + 1)
        seen = slice(first, at[b, t] + 1)
        scores = k[b, h // share, seen] @ q[b, t, h] * SCALE
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        shares = np.exp(scores - scores.max())
        shares /= shares.sum() + (0.0 if sinks is None else np.exp(sinks[h] - scores.max()))
        out[b, t, h] = shares @ v[b, h // share, seen]
    return out


def draw(batch, new, heads, groups, slots, size, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (batch, new, heads, size), dtype)
    stacked = (2, batch, groups, slots, size)
    k, v = (jax.random.normal(key, stacked, dtype) for key in keys[1:])
    kept = {
        name: x if x.dtype == caches.kept_as(dtype) else jax.lax.bitcast_convert_type(x, caches.kept_as(dtype))
        for name, x in (("k", k), ("v", v))
    }
    return q, k, v, kept


@pytest.mark.parametrize("slots", [40, 96, 200])  # all at once; and one by one over two and three sizes
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("cap", "with_sinks"), [(None, False), (5.0, False), (None, True)])
def test_what_stands_before_a_token_within_its_window(slots, window, cap, with_sinks):
    q, k, v, kept = draw(5, 1, 6, 2, slots, 16, jnp.float32)
    at = np.array([[0], [slots // 2 - 1], [slots // 2], [slots - 1], [17]])
    sinks = np.linspace(-1, 2, 6) if with_sinks else None
    options = {
        "window": window,
        "soft_cap": cap,
        "scale": SCALE,
        "sinks_H": None if sinks is None else jnp.array(sinks),
    }
    run = jax.jit(lambda q, kept, at: caches.attention(q, kept, jnp.int32(1), at, **options))
    wanted = formula(q, k[1], v[1], at, window, cap, sinks)
    np.testing.assert_allclose(run(q, kept, at), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("new", [1, 3])
def test_sixteen_bits_are_kept_as_they_are(new):
    q, k, v, kept = draw(3, new, 6, 2, 150, 16, jnp.bfloat16)
    at = np.array([[4], [70], [140]]) + np.arange(new)
    assert kept["k"].dtype == jnp.uint16
    found = caches.attention(q, kept, jnp.int32(1), jnp.array(at), window=None, soft_cap=None, scale=SCALE)
    assert found.dtype == jnp.bfloat16
    wanted = formula(q, k[1], v[1], at, None, None, None)
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=0, atol=2e-2 * np.abs(wanted).max())


def test_a_row_at_rest_stands_past_the_end_and_disturbs_nobody():
    q, k, v, kept = draw(2, 1, 4, 2, 128, 8, jnp.float32)
    at = np.array([[100], [128]])
    found = caches.attention(q, kept, jnp.int32(0), jnp.array(at), window=None, soft_cap=None, scale=SCALE)
    wanted = formula(q[:1], k[0, :1], v[0, :1], at[:1], None, None, None)
    np.testing.assert_allclose(found[:1], wanted, rtol=0, atol=2e-6)


def test_what_is_written_is_read_and_what_is_past_the_end_is_dropped():
    _, _, _, kept = draw(2, 1, 4, 2, 10, 8, jnp.bfloat16)
    new = jnp.full((2, 2, 2, 8), 3, jnp.bfloat16)
    written = caches.write(kept, new, -new, jnp.array([[4, 5], [9, 10]]), jnp.int32(1))
    for name, sign in (("k", 3), ("v", -3)):
        before, after = (jax.lax.bitcast_convert_type(x[name], jnp.bfloat16) for x in (kept, written))
        changed = np.argwhere(np.asarray((before != after).any(axis=(2, 4))))
        np.testing.assert_array_equal(changed, [[1, 0, 4], [1, 0, 5], [1, 1, 9]])
        assert (after[1, 0, :, 4:6] == sign).all()
