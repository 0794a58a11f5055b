"""Rotary-embedding settings: `rope_parameters` (transformers 5) and `rope_scaling` (4), read and written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig, Rope, RopeScaling

_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KINDS = {  # rope_type: (our name, the fields it may have)
    "default": (None, set()),
    "linear": ("linear", {"factor"}),
    "dynamic": ("dynamic", {"factor", "original_max_position_embeddings"}),
    "llama3": ("llama3", {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}),
    "yarn": (
        "yarn",
        {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
         "mscale_all_dim", "truncate"},
    ),
    "longrope": (
        "longrope",
        {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
    ),
}  # fmt: skip


def read(
    raw: Mapping[str, Any] | None,
    *,
    where: str,
    head_dim: int,
    max_position: int,
    theta: float,
    partial: float = 1.0,
    original_max_position: int | None = None,
    interleaved: bool = False,
    aliases: Mapping[str, str] | None = None,
) -> Rope:
    """One layer type's settings.

    Args:
      raw: the dict of config.json, in either form; None: no scaling.
      theta, partial: what counts where the dict doesn't say.
      original_max_position: the field of that name outside the dict (Phi-3), which then wins.
      aliases: rope types that the family spells otherwise ("su").

    Raises:
      ConfigError: an unknown rope type or field, or a missing one.
    """
    raw = {name: value for name, value in (raw or {}).items() if value is not None}
    kind = raw.get("rope_type", raw.get("type", "default"))
    kind = (aliases or {}).get(kind, kind)
    if kind not in _KINDS:
        raise ConfigError(f"{where}: rope_type {kind!r} isn't known, only {sorted(_KINDS)}")
    name, allowed = _KINDS[kind]
    unknown = sorted(set(raw) - allowed - _COMMON)
    if unknown:
        raise ConfigError(f"{where}: rope_parameters.{unknown[0]} isn't understood for rope_type {kind!r}")
    dim = int(head_dim * raw.get("partial_rotary_factor", partial))
    if dim % 2:
        raise ConfigError(f"{where}: rotary embedding over {dim} dimensions; the number must be even")
    return Rope(
        theta=float(raw.get("rope_theta", theta)),
        dim=dim,
        scaling=None if name is None else _scaling(name, raw, where, dim, max_position, original_max_position),
        interleaved=interleaved,
    )


def _scaling(
    kind: str, raw: Mapping[str, Any], where: str, dim: int, max_position: int, original: int | None
) -> RopeScaling:
    # `dynamic` always counts from the model's own length (transformers reads no other)
    original = 0 if kind in ("linear", "dynamic") else original or raw.get("original_max_position_embeddings", 0)
    factor = raw.get("factor")
    if factor is None and kind in ("yarn", "longrope"):
        factor = max_position / (original or max_position)
    factors = {name: tuple(float(x) for x in raw.get(name, ())) for name in ("short_factor", "long_factor")}
    for name, values in factors.items():
        if kind == "longrope" and len(values) != dim // 2:
            raise ConfigError(f"{where}: rope_parameters.{name} has {len(values)} numbers, {dim // 2} are needed")
    if factor is None:
        raise ConfigError(f"{where}: rope_parameters.factor is missing")
    optional = {name: float(raw[name]) for name in ("mscale", "mscale_all_dim", "attention_factor") if name in raw}
    bands = {
        name: float(raw[name])
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
        if raw.get(name)
    }
    return RopeScaling(
        kind=kind,  # type: ignore[arg-type]
        factor=float(factor),
        original_max_position=original,
        truncate=bool(raw.get("truncate", True)),
        **factors,
        **bands,
        **optional,
    )


def write(rope: Rope, config: ModelConfig, *, with_partial: bool = False) -> dict[str, Any]:
    """The dict that transformers 5 writes under `rope_parameters`."""
    out: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": "default"}
    if with_partial or rope.dim != config.head_dim:
        out["partial_rotary_factor"] = _fraction(rope.dim, config.head_dim)
    scaling = rope.scaling
    if scaling is None:
        return out
    out["rope_type"] = scaling.kind
    original = scaling.original_max_position or config.max_position
    if not (scaling.kind == "longrope" and math.isclose(scaling.factor, config.max_position / original)):
        out["factor"] = scaling.factor
    if scaling.kind in ("llama3", "yarn", "longrope"):
        out["original_max_position_embeddings"] = original
    if scaling.kind == "llama3":
        out |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        out |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
    if scaling.kind == "longrope":
        out |= {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
    for name in ("mscale", "mscale_all_dim", "attention_factor"):
        if getattr(scaling, name) is not None:
            out[name] = getattr(scaling, name)
    return out


def write_for_4(rope: Rope, config: ModelConfig, *, kind_name: str = "rope_type") -> dict[str, Any]:
    """The same as fields for transformers 4, which reads no `rope_parameters`: without them its theta is the default.

    Transformers 5 takes `rope_scaling`, where it isn't null, in place of `rope_parameters`; so it says as much.

    Args:
      kind_name: "type" in families whose transformers-4 class insists on that spelling.
    """
    scaling = {name: value for name, value in write(rope, config).items() if name != "rope_theta"}
    partial = scaling.pop("partial_rotary_factor", None)
    kind = scaling.pop("rope_type")
    out: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if partial is not None:
        out["partial_rotary_factor"] = partial
    if kind == "longrope":  # read from outside the dict
        out["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    if kind != "default":
        out["rope_scaling"] = {kind_name: kind, **scaling}
    return out


def _fraction(part: int, whole: int) -> float:
    """A float f with int(whole * f) == part."""
    fraction = part / whole
    return fraction if int(whole * fraction) == part else math.nextafter(fraction, 2.0)
