"""Attention over packed rows: one call, and an ordered list of kernels for each platform.

Every kernel says what it can't honour (`supports(...) -> reason | None`); the first that can is taken and logged
once. Nobody gets a kernel that ignores segments. Letters: see `reference.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging

import jax
from jax.sharding import Mesh

from sftjax.kernels import reference

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
      mesh: devices to run on; kernels that the compiler can't partition run per device on it.

    Returns:
      `[B, L, H, K]` in `q.dtype`.

    Raises:
      ConfigError: the named implementation can't honour the case.
    """
    return reference.attention(
        q, k, v, info, window=window, soft_cap=soft_cap, scale=scale, sinks=sinks, dropout=dropout
    )
