"""Splash attention on TPUs: tokamax's, which skips blocks across segments, or jax's own, which only masks them.

Both work in blocks of queries and keys; 512 suits the lengths of fine-tuning data (larger ones straddle more segments).
tokamax's schedule is the union over a `vmap`, so its rows go one after the other.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as jax_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as jax_mask

Array = jax.Array
LANES = 128
BLOCKS = (512, 384, 256, 128)
TOKAMAX = (0, 0, 16)  # the first that prunes by segment in both passes
RESIDUALS = "attention_out"  # the remat policy's name for output and log-sum-exp


def supports(case) -> str | None:
    """Why jax's kernel can't do the case."""
    if case.platform != "tpu":
        return "it runs on TPUs"
    if not case.in_order:
        return "it needs keys in the packer's order"
    if case.length % LANES:
        return f"the length, {case.length}, isn't a multiple of {LANES}"
    if case.dropout:
        return "it has no dropout on probabilities"
    return None


def tokamax_supports(case) -> str | None:
    """Why tokamax's kernel can't do the case."""
    if (version := tokamax_version()) is None:
        return "tokamax isn't installed"
    if version < TOKAMAX:
        return (
            f"tokamax {'.'.join(map(str, version))} doesn't skip blocks by segment; {'.'.join(map(str, TOKAMAX))} does"
        )
    return supports(case)


@functools.cache
def tokamax_version() -> tuple[int, ...] | None:
    if importlib.util.find_spec("tokamax") is None:
        return None
    return tuple(int(part) for part in importlib.metadata.version("tokamax").split(".")[:3] if part.isdigit())


def attention(q, k, v, info, *, window=None, soft_cap=None, scale, sinks=None, interpret: bool = False) -> Array:
    """As `kernels.attention.attention`, on one device. `interpret`: run it on a CPU, for tests."""
    length, heads = q.shape[1:3]
    kernel = jax_kernel.make_splash_mha_single_device(
        jax_mask.MultiHeadMask([_mask(jax_mask, length, window)] * heads),
        block_sizes=jax_kernel.BlockSizes(**_blocks(length), use_fused_bwd_kernel=True),
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )

    def row(q, k, v, segments):
        return kernel(q, k, v, jax_kernel.SegmentIds(segments, segments), sinks)

    return _heads_first(jax.vmap(row), q, k, v, info.segment_ids_q, scale)


def tokamax_attention(q, k, v, info, *, window=None, soft_cap=None, scale, sinks=None, interpret: bool = False):
    """As `kernels.attention.attention`, on one device."""
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    length = q.shape[1]
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        _mask(splash_attention_mask, length, window),
        config=splash_attention_kernel.SplashConfig(
            **_blocks(length),
            use_fused_bwd_kernel=True,
            attn_logits_soft_cap=soft_cap,
            residual_checkpoint_name=RESIDUALS,
            interpret=interpret,
        ),
    )

    def row(arguments):
        q, k, v, segments = arguments
        return kernel(q, k, v, splash_attention_kernel.SegmentIds(segments, segments), sinks)

    def rows(*arguments):
        if arguments[0].shape[0] == 1:
            return row([x[0] for x in arguments])[None]
        return jax.lax.map(row, arguments)

    return _heads_first(rows, q, k, v, info.segment_ids_q, scale)


def _mask(module, length: int, window: int | None):
    """The static part of the mask: by row index, which is right within a segment of the packer's order."""
    if window is None or window >= length:
        return module.CausalMask((length, length))
    return module.LocalMask((length, length), window_size=(window - 1, 0), offset=0)


def _blocks(length: int) -> dict[str, int]:
    size = next(block for block in BLOCKS if length % block == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    return dict.fromkeys(names, size)


def _heads_first(rows, q, k, v, segments, scale) -> Array:
    """`[B, L, H, K]` to the kernel's `[B, H, L, K]` and back; heads narrower than the lanes are filled with zeros."""
    width = q.shape[3]
    fill = [(0, 0)] * 3 + [(0, -width % LANES)]
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel doesn't scale
    q, k, v = (jnp.swapaxes(jnp.pad(x, fill), 1, 2) for x in (q, k, v))
    return jnp.swapaxes(rows(q, k, v, segments), 1, 2)[..., :width]
