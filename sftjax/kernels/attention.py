"""Attention over packed rows: one call, and an ordered list of kernels for each platform.

Every kernel says what it can't honour (`supports(case) -> reason | None`); the first that can is taken and logged
once. Nobody gets a kernel that ignores segments. Letters: see `reference.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sftjax import compat
from sftjax.errors import ConfigError
from sftjax.kernels import chunked, cudnn, reference, splash
from sftjax.parallel import partition
from sftjax.parallel.mesh import BATCH_AXES

Array = jax.Array
log = logging.getLogger(__name__)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["segment_ids_q", "positions_q", "segment_ids_kv", "positions_kv"],
    meta_fields=["in_order", "max_segments"],
)
@dataclasses.dataclass(frozen=True)
class AttentionInfo:
    """Who may see whom; made once per batch, used by every layer. All arrays are int32."""

    segment_ids_q: Array  # [B, L]
    positions_q: Array  # [B, L]
    segment_ids_kv: Array  # [B, S]
    positions_kv: Array  # [B, S]
    in_order: bool  # keys are the queries' own tokens, segments contiguous, positions ascending
    max_segments: int | None  # the most segments a row can hold; None: unknown


def make_info(
    segment_ids_q: Array,
    positions_q: Array,
    segment_ids_kv: Array | None = None,
    positions_kv: Array | None = None,
    *,
    max_segments: int | None = None,
) -> AttentionInfo:
    """Describes a batch to the kernels.

    Without `segment_ids_kv` the keys are the queries' own tokens and rows are as the packer makes them: segments
    contiguous, positions ascending within each (kernels then skip what lies after a query in its row). With it,
    nothing is assumed about order: a query attends to the keys of its segment whose *position* isn't after its own.
    A cache marks empty slots with a segment id that no query has (0).

    Args:
      max_segments: static bound on segments in a row, the padding tail included; some GPU kernels need it.
    """
    in_order = segment_ids_kv is None
    if in_order:
        segment_ids_kv, positions_kv = segment_ids_q, positions_q
    return AttentionInfo(segment_ids_q, positions_q, segment_ids_kv, positions_kv, in_order, max_segments)


def attention(
    q: Array,
    k: Array,
    v: Array,
    info: AttentionInfo,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float,
    sinks: Array | None = None,
    dropout: tuple[float, Array] | None = None,
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Causal attention within segments.

    Args:
      q: `[B, L, H, K]`.
      k, v: `[B, S, G, K]`, `G` dividing `H`.
      info: from `make_info`.
      window: a key may be at most `window - 1` positions back; None: any.
      soft_cap: `cap * tanh(score / cap)`.
      scale: multiplies the scores.
      sinks: `[H]` logits joining each softmax.
      dropout: (rate, key) on the probabilities.
      implementation: a kernel's name (see `KERNELS`); None: the first that can.
      mesh: devices to run on, rows over data and fsdp, heads over tensor, queries over context.

    Returns:
      `[B, L, H, K]` in `q.dtype`.

    Raises:
      ConfigError: the named implementation can't honour the case.
    """
    case = Case(
        platform=jax.default_backend() if mesh is None else mesh.devices.flat[0].platform,
        heads=(q.shape[2], k.shape[2]),
        head_dim=q.shape[3],
        length=q.shape[1],
        dtype=jnp.dtype(q.dtype).name,
        in_order=info.in_order and not _cut(mesh, "context"),
        max_segments=info.max_segments,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks is not None,
        dropout=dropout is not None,
    )
    kernel = KERNELS[choose(case, implementation)]
    options = {"window": window, "soft_cap": soft_cap, "scale": scale}
    return _per_device(kernel.attention, mesh, q, k, v, info, sinks, dropout, options)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a kernel is asked to do. `heads`: of queries and of keys; the other fields as `attention` has them."""

    platform: str
    heads: tuple[int, int]
    head_dim: int
    length: int
    dtype: str
    in_order: bool
    max_segments: int | None = None
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    dropout: bool = False


class _Kernel:
    """A kernel's two functions, under one name."""

    def __init__(self, attention, supports):
        self.attention, self.supports = attention, supports


def _no_dropout(case: Case) -> str | None:
    return "it has no dropout on probabilities" if case.dropout else None


KERNELS = {
    "tokamax_splash": _Kernel(splash.tokamax_attention, splash.tokamax_supports),
    "splash": _Kernel(splash.attention, splash.supports),
    "cudnn_packed": _Kernel(cudnn.packed_attention, cudnn.packed_supports),
    "cudnn_mask": _Kernel(cudnn.mask_attention, cudnn.mask_supports),
    "chunked": _Kernel(chunked.attention, _no_dropout),
    "reference": _Kernel(reference.attention, lambda case: None),
}
ORDER = {
    "tpu": ("tokamax_splash", "splash", "chunked", "reference"),
    "gpu": ("cudnn_packed", "cudnn_mask", "chunked", "reference"),
    "cpu": ("chunked", "reference"),
}


@functools.cache
def choose(case: Case, implementation: str | None = None) -> str:
    """The name of the first kernel for the platform that can do the case, or the named one.

    Raises:
      ConfigError: `implementation` doesn't exist, or can't do the case.
    """
    if implementation is not None:
        if implementation not in KERNELS:
            raise ConfigError(f"attention {implementation!r} doesn't exist; choose from {', '.join(KERNELS)}")
        reason = KERNELS[implementation].supports(case)
        if reason is not None:
            raise ConfigError(f"attention {implementation!r} can't be used here: {reason}")
        return implementation
    refused = []
    for name in ORDER.get(case.platform, ORDER["gpu"]):
        reason = KERNELS[name].supports(case)
        if reason is None:
            _announce(name, "".join(f"; not {other}: {why}" for other, why in refused))
            return name
        refused.append((name, reason))
    raise AssertionError("the reference takes every case")


@functools.cache  # logged once, not once for each layer type and shape
def _announce(name: str, refused: str) -> None:
    log.info("attention: %s%s", name, refused)


# --- several devices ----------------------------------------------------------------------------------------------


def _cut(mesh: Mesh | None, axis: str) -> bool:
    return mesh is not None and mesh.shape.get(axis, 1) > 1


def _per_device(function, mesh, q, k, v, info, sinks, dropout, options):
    """Runs a kernel on each device's rows and heads. With a cut sequence, each has its queries and all keys."""
    extras = {"sinks": sinks, "dropout": dropout}
    if mesh is None or mesh.size == 1:
        return _call(function, info.in_order, info.max_segments, options, (), q, k, v, _ids(info), extras)
    in_order = info.in_order and not _cut(mesh, "context")
    heads = q.shape[2]
    k, v, head_axis = _split_heads(mesh, heads, k, v)
    queries = partition.fit(P(BATCH_AXES, "context", head_axis, None), q.shape, mesh)
    keys = P(queries[0], None, head_axis, None)
    ids = (P(*queries[:2]), P(*queries[:2]), P(queries[0], None), P(queries[0], None))
    axes = tuple(name for entry in queries if entry for name in ((entry,) if isinstance(entry, str) else entry))
    call = functools.partial(_call, function, in_order, info.max_segments, options, axes)
    return compat.shard_map(
        call,
        mesh=mesh,
        in_specs=(queries, keys, keys, ids, {"sinks": P(head_axis), "dropout": P()}),
        out_specs=queries,
    )(q, k, v, _ids(info), extras)


def _ids(info: AttentionInfo) -> tuple[Array, Array, Array, Array]:
    return info.segment_ids_q, info.positions_q, info.segment_ids_kv, info.positions_kv


def _call(function, in_order, max_segments, options, axes, q, k, v, ids, extras):
    info = AttentionInfo(*ids, in_order=in_order, max_segments=max_segments)
    extras = {name: value for name, value in extras.items() if value is not None}
    if "dropout" in extras and axes:
        rate, key = extras["dropout"]
        extras["dropout"] = rate, jax.random.fold_in(key, jax.lax.axis_index(axes))
    return function(q, k, v, info, **options, **extras)


def _split_heads(mesh: Mesh, heads: int, k: Array, v: Array):
    """Keys and values whose heads the tensor axis divides, and that axis (None: heads stay whole).

    With fewer key heads than devices, each is repeated until every device has the one its queries read.
    """
    tensor, groups = mesh.shape["tensor"], k.shape[2]
    if tensor == 1 or heads % tensor:
        return k, v, None
    if groups % tensor:
        if tensor % groups:
            return k, v, None
        k, v = (jnp.repeat(x, tensor // groups, axis=2) for x in (k, v))
    return k, v, "tensor"
