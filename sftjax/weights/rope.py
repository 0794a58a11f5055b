"""Rotary-embedding settings: `rope_parameters` (transformers 5) and `rope_scaling` (4), read and written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig, Rope, RopeScaling
from sftjax.weights import reference
from sftjax.weights.fields import Fields, short

# rope_type: our name, and which of its settings are numbers of the same name here
_KINDS = {
    "default": (None, ()),
    "linear": ("linear", ()),
    "dynamic": ("dynamic", ()),
    "llama3": ("llama3", ("low_freq_factor", "high_freq_factor")),
    "yarn": ("yarn", ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")),
    "longrope": ("longrope", ("attention_factor",)),
}
_EVERY_KEY = set().union(*(reference.rope_keys(kind) for kind in _KINDS))
# Keys that no rope type of transformers reads for the families here; at another value they'd be another model.
_INERT_AT = {"llama_4_scaling_beta": (0,), "alpha": (1,)}


def read(
    raw: Mapping[str, Any] | None,
    fields: Fields,
    *,
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
      fields: the config.json; keys of `raw` that transformers doesn't read for this rope type are noted there.
      theta, partial: what counts where the dict doesn't say.
      original_max_position: the field of that name outside the dict, which then wins.
      aliases: rope types that the family spells otherwise ("su").

    Raises:
      ConfigError: an unknown rope type, or a missing or senseless setting.
    """
    raw = {name: value for name, value in (raw or {}).items() if value is not None}
    kind = raw.get("rope_type", raw.get("type", "default"))
    kind = (aliases or {}).get(kind, kind)
    if kind not in _KINDS:
        raise ConfigError(f"{fields.where}: rope_type {kind!r} isn't known, only {sorted(_KINDS)}")
    name, numbers = _KINDS[kind]
    for key in sorted(set(raw) - reference.rope_keys(kind)):
        if key in _INERT_AT and raw[key] not in _INERT_AT[key]:
            raise ConfigError(f"{fields.where}: rope_parameters.{key}={short(raw[key])} isn't supported here")
        fields.ignored.append(f"rope_parameters.{key}")
    dim = int(head_dim * raw.get("partial_rotary_factor", partial))
    if dim % 2:
        raise ConfigError(f"{fields.where}: rotary embedding over {dim} dimensions; the number must be even")
    original = original_max_position or raw.get("original_max_position_embeddings", max_position)
    return Rope(
        theta=float(raw.get("rope_theta", theta)),
        dim=dim,
        scaling=None if name is None else _scaling(name, numbers, raw, fields.where, dim, max_position, original),
        interleaved=interleaved,
    )


def _scaling(
    kind: str, numbers: Sequence[str], raw: Mapping[str, Any], where: str, dim: int, max_position: int, original: int
) -> RopeScaling:
    factor = raw.get("factor")
    if factor is None and kind in ("yarn", "longrope"):
        factor = max_position / original
    if factor is None:
        raise ConfigError(f"{where}: rope_parameters.factor is missing")
    lists = {}
    if kind == "longrope":
        lists = {name: tuple(float(x) for x in raw.get(name, ())) for name in ("short_factor", "long_factor")}
    for name, values in lists.items():
        if len(values) != dim // 2:
            raise ConfigError(f"{where}: rope_parameters.{name} has {len(values)} numbers, {dim // 2} are needed")
    return RopeScaling(
        kind=kind,  # type: ignore[arg-type]
        factor=float(factor),
        # `linear` and `dynamic` always count from the model's own length (transformers reads no other)
        original_max_position=0 if kind in ("linear", "dynamic") else original,
        truncate=kind != "yarn" or bool(raw.get("truncate", True)),
        **lists,
        **{name: float(raw[name]) for name in numbers if name in raw},
    )


def write(rope: Rope, config: ModelConfig, *, with_partial: bool = False) -> dict[str, Any]:
    """The dict that transformers 5 writes under `rope_parameters`."""
    out: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": "default"}
    if with_partial or rope.dim != config.head_dim:
        out["partial_rotary_factor"] = fraction(rope.dim, config.head_dim)
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


def carry(raw: Mapping[str, Any] | None, written: dict[str, Any]) -> dict[str, Any]:
    """What `write` gave, with those keys of the dict that came in which change nothing and other programs may read."""
    raw, nested = raw or {}, {key: value for key, value in written.items() if isinstance(value, Mapping)}
    if nested:
        return written | {
            key: carry(raw.get(key, raw if key == "full_attention" else None), value) for key, value in nested.items()
        }
    inert = {key: value for key, value in raw.items() if key not in _EVERY_KEY and not isinstance(value, Mapping)}
    return written | inert


def fraction(part: int, whole: int) -> float:
    """A float f with int(whole * f) == part."""
    found = part / whole
    return found if int(whole * found) == part else math.nextafter(found, 2.0)
