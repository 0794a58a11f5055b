"""cuDNN's fused attention on GPUs: packed rows as offsets, else with an explicit mask.

jax's public function has no segments; the one that does is private, and has been wrong before: jax < 0.11.1 computes
the offsets of keys from the queries' number of heads, so that grouped heads are silently wrong (keys and values are
repeated there). So whatever the versions say, the first use runs a small packed case, forward and gradient, against
the reference, and a kernel that fails it isn't used.
"""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

from sftjax import compat
from sftjax.kernels import reference

Array = jax.Array
GROUPED_HEADS = (0, 11, 1)  # jax versions from here on have the right offsets
TOLERANCE = 3e-2  # of the largest entry, bfloat16 against float32


def packed_supports(case) -> str | None:
    """Why the kernel with packed offsets can't do the case."""
    if (reason := _common(case)) is not None:
        return reason
    if not case.in_order:
        return "it needs keys in the packer's order"
    if case.max_segments is None:
        return "it needs a bound on the segments of a row (max_segments)"
    return _self_test("packed", case.head_dim, case.heads[0] != case.heads[1], case.window is not None, case.dtype)


def mask_supports(case) -> str | None:
    """Why the kernel with an explicit mask can't do the case."""
    if (reason := _common(case)) is not None:
        return reason
    if not case.in_order:
        return "it needs as many keys as queries"
    if case.length % 128:
        return f"the length, {case.length}, isn't a multiple of 128 (gradients are NaN there)"
    return _self_test("mask", case.head_dim, case.heads[0] != case.heads[1], case.window is not None, case.dtype)


def _common(case) -> str | None:
    if case.platform not in ("gpu", "cuda"):
        return "it runs on NVIDIA GPUs"
    if jax.default_backend() != "gpu":
        return "it can't be tested without the GPU"
    if case.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 and float16, not {case.dtype}"
    if case.head_dim % 8 or case.head_dim > 256:
        return f"heads of {case.head_dim}: it needs a multiple of 8, at most 256"
    for name in ("soft_cap", "sinks", "dropout"):
        if getattr(case, name):
            return f"it has no {name}"
    return None


def packed_attention(q, k, v, info, *, window=None, soft_cap=None, scale) -> Array:
    """As `kernels.attention.attention`, on one device. A row with more than `max_segments` segments becomes NaN."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    assert soft_cap is None
    if k.shape[2] != q.shape[2] and compat.JAX_VERSION < GROUPED_HEADS:
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    lengths, offsets, fits = segment_table(info.segment_ids_q, max(info.max_segments, 2))
    out = fused.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=scale,
        mask_type=fused.MaskType.PADDING_CAUSAL,
        sliding_window_length=window,
    )
    return jnp.where(fits[:, None, None, None], out, jnp.nan)


def segment_table(segment_ids: Array, max_segments: int) -> tuple[Array, Array, Array]:
    """Lengths `[B, M]` and starts `[B, M + 1]` of contiguous segments (-1: none), and whether each row fits in `M`.

    segments 1 1 1 2 2 3, M = 4   ->   lengths 3 2 1 -1,  offsets 0 3 5 -1 -1
    """
    B, L = segment_ids.shape
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    number = jnp.concatenate([jnp.zeros((B, 1), jnp.int32), jnp.cumsum(changed, axis=1, dtype=jnp.int32)], axis=1)
    starts = jax.vmap(lambda row: jnp.searchsorted(row, jnp.arange(max_segments + 1)))(number).astype(jnp.int32)
    lengths = jnp.diff(starts, axis=1)
    return jnp.where(lengths > 0, lengths, -1), jnp.where(starts < L, starts, -1), starts[:, -1] == L


def mask_attention(q, k, v, info, *, window=None, soft_cap=None, scale) -> Array:
    """As `kernels.attention.attention`, on one device, by an explicit `[B, 1, L, L]` mask."""
    assert soft_cap is None
    mask = reference.visible(info, window)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")


@functools.cache
def _self_test(kernel: str, head_dim: int, grouped: bool, windowed: bool, dtype: str) -> str | None:
    """Why the kernel isn't to be trusted on this machine: its difference from the reference, or its error."""
    function = {"packed": packed_attention, "mask": mask_attention}[kernel]
    try:
        with jax.ensure_compile_time_eval():  # the first use is inside a trace
            differences = compare(function, head_dim, grouped, windowed, dtype)
    except Exception as error:  # a private interface: any failure means "don't use it"
        return f"its self-test failed: {str(error).splitlines()[0][:200]}"
    bad = {name: value for name, value in differences.items() if not value <= TOLERANCE}
    return f"its self-test differs from the reference: {bad}" if bad else None


def compare(function, head_dim: int, grouped: bool, windowed: bool, dtype: str) -> dict[str, float]:
    """Largest differences from the reference in output and gradients, of the largest entry, for a small packed case."""
    rng = np.random.default_rng(0)
    B, L, H = 2, 256, 4
    G = 2 if grouped else H
    shapes = {
        "q": (B, L, H, head_dim),
        "k": (B, L, G, head_dim),
        "v": (B, L, G, head_dim),
        "d_out": (B, L, H, head_dim),
    }
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    arrays = {name: jnp.asarray(x).astype(dtype) for name, x in arrays.items()}
    cuts = np.array([[0, 90, 91, 200], [0, 1, 128, 255]])
    segments = np.sum(np.arange(L) >= cuts[:, :, None], axis=1).astype(np.int32)
    positions = np.arange(L) - np.take_along_axis(cuts, segments - 1, axis=1)
    ids = {"segment_ids_q": jnp.asarray(segments), "positions_q": jnp.asarray(positions, jnp.int32)}
    ids |= {"segment_ids_kv": ids["segment_ids_q"], "positions_kv": ids["positions_q"]}
    info = types.SimpleNamespace(**ids, in_order=True, max_segments=6)
    options = {"window": 40 if windowed else None, "scale": head_dim**-0.5}

    def results(function, cast):
        @jax.jit
        def run(q, k, v, d_out):
            out, pull = jax.vjp(lambda q, k, v: function(q, k, v, info, **options), q, k, v)
            return out, *pull(d_out.astype(out.dtype))

        return [np.asarray(x, np.float32) for x in run(*(x.astype(cast) for x in arrays.values()))]

    ours, theirs = results(function, dtype), results(reference.attention, "float32")
    names = ("out", "dq", "dk", "dv")
    return {n: float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for n, a, b in zip(names, ours, theirs, strict=True)}
