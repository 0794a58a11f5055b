"""What the readers and writers of `weights/families.py` share: sizes, biases, RoPE, sliding windows.

`read` side: functions of the `Fields` of a config.json; `write_...`: the same fields from a `ModelConfig`, in the form
of transformers 5 (RoPE in that of 4 as well).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sftjax.errors import ConfigError
from sftjax.models.config import Experts, LayerSpec, ModelConfig, Rope
from sftjax.weights import rope
from sftjax.weights.fields import Fields, short

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def sizes(
    fields: Fields,
    *,
    tied: bool = False,
    eps: float = 1e-6,
    max_position: int = 2048,
    head_dim: int | None = None,
    activation: str = "silu",
) -> dict[str, Any]:
    """What every family has; the keyword arguments are the family's defaults (head_dim: hidden size / heads)."""
    heads, hidden = fields.need("num_attention_heads"), fields.need("hidden_size")
    if head_dim is None and fields.take("head_dim") is None and hidden % heads:
        raise ConfigError(f"{fields.where}: hidden_size {hidden} isn't a multiple of num_attention_heads {heads}")
    head_dim = fields.need("head_dim", head_dim or hidden // heads)
    kv_heads = fields.need("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"{fields.where}: num_attention_heads {heads} isn't a multiple of the {kv_heads} kv heads")
    return dict(
        vocab_size=fields.need("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.need("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=fields.need("max_position_embeddings", max_position),
        norm_eps=fields.take("rms_norm_eps", eps),
        tie_word_embeddings=bool(fields.take("tie_word_embeddings", tied)),
        activation=find_activation(fields, fields.take("hidden_act", activation)),
    )


def find_activation(fields: Fields, name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ConfigError(f"{fields.where}: hidden_act {name!r} isn't known, only {sorted(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def write_sizes(config: ModelConfig) -> dict[str, Any]:
    return dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_position,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        hidden_act=_ACTIVATION_NAMES[config.activation],
    )


def biases(fields: Fields, *, mlp: bool = False) -> dict[str, bool]:
    """`attention_bias` means q, k, v and o."""
    attention = bool(fields.take("attention_bias", False))
    biases = dict(qkv_bias=attention, o_bias=attention)
    return biases | {"mlp_bias": bool(fields.take("mlp_bias", False))} if mlp else biases


def read_rope(
    fields: Fields,
    sizes: Mapping[str, Any],
    theta: float = 10_000.0,
    *,
    partly: bool = False,
    original: int | None = None,
    **options: Any,
) -> Rope:
    """The model's one RoPE setting. As in transformers, a `rope_scaling` wins over `rope_parameters`.

    Args:
      partly: the family may rotate a part of each head only.
      original: the family's default for the original length, where it has one outside the dict.
    """
    new, old = fields.take("rope_parameters"), fields.take("rope_scaling")
    theta, partial = fields.take("rope_theta", theta), fields.take("partial_rotary_factor", 1.0)
    original = fields.take("original_max_position_embeddings", original)
    raw = old or new or {}
    nested = [value for value in raw.values() if isinstance(value, Mapping)]
    if nested and all(value == nested[0] for value in nested) and len(nested) == len(raw):
        raw = nested[0]  # written per layer type, but all alike
    one = rope.read(
        raw,
        fields,
        head_dim=sizes["head_dim"],
        max_position=sizes["max_position"],
        theta=theta,
        partial=partial,
        original_max_position=original,
        **options,
    )
    if one.dim != sizes["head_dim"] and not partly:
        raise ConfigError(f"{fields.where}: partial_rotary_factor isn't known for this model type")
    return one


def write_rope(config: ModelConfig, *, kind_name: str = "rope_type", **options: Any) -> dict[str, Any]:
    """The model's one RoPE setting, in the form of transformers 5 and in that of 4."""
    used = next(layer.rope for layer in config.layers if layer.rope is not None)
    new, old = rope.write(used, config, **options), rope.write_for_4(used, config, kind_name=kind_name)
    return {"rope_parameters": new, **old}


def windows(fields: Fields, window: int | None, default_types: Sequence[str] | None = None) -> list[int | None]:
    """Each layer's sliding window, from `layer_types` or else `default_types`.

    Without default types all layers are alike, and `layer_types` may only repeat that.
    """
    count = fields.need("num_hidden_layers")
    uniform = ["sliding_attention" if window else "full_attention"] * count
    types = list(fields.take("layer_types", default_types or uniform))
    if len(types) != count or (default_types is None and types != uniform):
        raise ConfigError(f"{fields.where}: layer_types {short(types)} doesn't fit this model of {count} layers")
    known = {"full_attention": None, "sliding_attention": window}
    for kind in types:
        if kind not in known or (kind == "sliding_attention" and not window):
            raise ConfigError(f"{fields.where}: layer_types has {kind!r}, and sliding_window is {window}")
    return [known[kind] for kind in types]


def every(count: int, pattern: int) -> list[str]:
    """Sliding layers, each `pattern`-th one full."""
    return ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(count)]


def write_layer_types(config: ModelConfig) -> list[str]:
    return ["full_attention" if layer.window is None else "sliding_attention" for layer in config.layers]


def window(config: ModelConfig) -> int | None:
    """The window of the sliding layers; None where there are none."""
    return next((layer.window for layer in config.layers if layer.window is not None), None)


def specs(windows: Sequence[int | None], one_rope: Rope, experts: Sequence[Experts | None] | None = None):
    experts = experts or [None] * len(windows)
    return tuple(LayerSpec(window, one_rope, expert) for window, expert in zip(windows, experts, strict=True))


def experts(config: ModelConfig) -> Experts:
    return next(layer.experts for layer in config.layers if layer.experts is not None)


def optional(fields: Fields, name: str, default: float | None) -> float | None:
    """A number that null switches off, unlike a field that is absent."""
    value = fields.take(name) if name in fields.raw else default
    return None if value is None else float(value)
