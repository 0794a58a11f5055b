"""Families with other norms, blocks or experts: Gemma, Phi-3, OLMo 2, GPT-OSS, Cohere. See `weights/families.py`."""

from __future__ import annotations

from typing import Any

from sftjax.errors import ConfigError
from sftjax.models.config import Experts, LayerSpec, ModelConfig
from sftjax.weights import family_parts as parts
from sftjax.weights import rope
from sftjax.weights.fields import Fields


def _gemma_sizes(fields: Fields, max_position: int) -> dict[str, Any]:
    sizes = parts.sizes(fields, tied=True, max_position=max_position, head_dim=256, activation="gelu_pytorch_tanh")
    return sizes | dict(norm_plus_one=True, embedding_scale=sizes["hidden_size"] ** 0.5)


def read_gemma(fields: Fields) -> ModelConfig:
    sizes = _gemma_sizes(fields, 8192)
    # the first releases wrote "gelu", and meant (and ran) the tanh approximation
    meant = fields.take("hidden_activation", "gelu_pytorch_tanh" if sizes["activation"] == "gelu" else None)
    if meant is not None:
        sizes["activation"] = parts.find_activation(fields, meant)
    return ModelConfig(
        **sizes, **parts.biases(fields), layers=parts.specs(parts.windows(fields, None), parts.read_rope(fields, sizes))
    )


def write_gemma(config: ModelConfig) -> dict[str, Any]:
    return parts.write_sizes(config) | parts.write_rope(config) | {
        "head_dim": config.head_dim,
        "attention_bias": config.qkv_bias,
    }  # fmt: skip


def read_gemma2_fields(fields: Fields, max_position: int, caps: tuple[float | None, float | None]) -> dict[str, Any]:
    sizes = _gemma_sizes(fields, max_position)
    activation = parts.find_activation(fields, fields.take("hidden_activation", "gelu_pytorch_tanh"))
    return sizes | parts.biases(fields) | dict(
        activation=activation,  # `hidden_act` may be there too, and is never read
        post_norm=True,
        attention_scale=float(fields.take("query_pre_attn_scalar", 256)) ** -0.5,
        attention_soft_cap=parts.optional(fields, "attn_logit_softcapping", caps[0]),
        final_soft_cap=parts.optional(fields, "final_logit_softcapping", caps[1]),
    )  # fmt: skip


def write_gemma2(config: ModelConfig) -> dict[str, Any]:
    out = write_gemma(config) | {
        "layer_types": parts.write_layer_types(config),
        "sliding_window": parts.window(config) or 4096,
        "query_pre_attn_scalar": _whole(config.attention_scale**-2),
        "attn_logit_softcapping": config.attention_soft_cap,
        "final_logit_softcapping": config.final_soft_cap,
    }
    out["hidden_activation"] = out.pop("hidden_act")
    return out


def _whole(value: float) -> int | float:
    """Undoes the rounding of a square root where the number was whole."""
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


def read_gemma2(fields: Fields) -> ModelConfig:
    values = read_gemma2_fields(fields, 8192, (50.0, 30.0))
    windows = parts.windows(
        fields, fields.take("sliding_window", 4096), parts.every(fields.need("num_hidden_layers"), 2)
    )
    return ModelConfig(**values, layers=parts.specs(windows, parts.read_rope(fields, values)))


def read_gemma3(fields: Fields) -> ModelConfig:
    values = read_gemma2_fields(fields, 131_072, (None, None))
    pattern = fields.take("sliding_window_pattern", fields.take("_sliding_window_pattern", 6))
    types = parts.every(fields.need("num_hidden_layers"), pattern)
    windows = parts.windows(fields, fields.take("sliding_window", 4096), types)
    raw = fields.take("rope_parameters", {})
    full = (raw.get("full_attention") or {}) | (fields.take("rope_scaling") or {})
    common = dict(fields=fields, head_dim=values["head_dim"], max_position=values["max_position"])
    far = rope.read(full, theta=fields.take("rope_theta", 1e6), **common)
    near = rope.read(raw.get("sliding_attention"), theta=fields.take("rope_local_base_freq", 1e4), **common)
    if set(raw) - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"{fields.where}: rope_parameters must have full_attention and sliding_attention only")
    layers = tuple(LayerSpec(window, far if window is None else near) for window in windows)
    return ModelConfig(**values, layers=layers, qk_norm="head")


def write_gemma3(config: ModelConfig) -> dict[str, Any]:
    ropes = {"full_attention": 1e6, "sliding_attention": 1e4}
    written = {kind: {"rope_theta": theta, "rope_type": "default"} for kind, theta in ropes.items()}
    for kind, layer in zip(parts.write_layer_types(config), config.layers, strict=True):
        written[kind] = rope.write(layer.rope, config)
    far = next((layer.rope for layer in config.layers if layer.window is None), None)
    old = {"rope_theta": 1e6, "rope_scaling": None} if far is None else rope.write_for_4(far, config)
    near = written["sliding_attention"]["rope_theta"]
    return write_gemma2(config) | {"rope_parameters": written, **old, "rope_local_base_freq": near}


def read_phi3(fields: Fields) -> ModelConfig:
    sizes = parts.sizes(fields, eps=1e-5, max_position=4096)
    # earlier releases called longrope "su" and "yarn"
    one = parts.read_rope(fields, sizes, partly=True, original=4096, aliases={"su": "longrope", "yarn": "longrope"})
    return ModelConfig(**sizes, layers=parts.specs(parts.windows(fields, fields.take("sliding_window")), one))


def write_phi3(config: ModelConfig) -> dict[str, Any]:
    out = (
        parts.write_sizes(config)
        | parts.write_rope(config, kind_name="type", with_partial=True)
        | {"sliding_window": parts.window(config)}
    )
    original = out["rope_parameters"].get("original_max_position_embeddings", config.max_position)
    return out | {"original_max_position_embeddings": original}


def read_olmo2(fields: Fields) -> ModelConfig:
    sizes = parts.sizes(fields, eps=1e-5)
    layers = parts.specs(parts.windows(fields, None), parts.read_rope(fields, sizes))
    return ModelConfig(**sizes, **parts.biases(fields), layers=layers, pre_norm=False, post_norm=True, qk_norm="full")


def write_olmo2(config: ModelConfig) -> dict[str, Any]:
    return parts.write_sizes(config) | parts.write_rope(config, kind_name="type") | {"attention_bias": config.qkv_bias}


_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read_gpt_oss(fields: Fields) -> ModelConfig:
    sizes = parts.sizes(fields, eps=1e-5, max_position=131_072, head_dim=64) | {"activation": "swiglu_oai"}
    experts = Experts(
        count=fields.take("num_local_experts", fields.take("num_experts", 128)),
        per_token=fields.take("num_experts_per_tok", fields.take("experts_per_token", 4)),
        intermediate_size=sizes["intermediate_size"],
        normalize_top_k=True,
        softmax_after_top_k=True,
        router_bias=True,
        bias=True,
        aux_loss_weight=float(fields.take("router_aux_loss_coef", 0.001)),
    )
    if fields.take("rope_scaling") is None and fields.take("rope_parameters") is None:
        fields.raw["rope_parameters"] = _OSS_ROPE
    windows = parts.windows(
        fields, fields.take("sliding_window", 128), parts.every(fields.need("num_hidden_layers"), 2)
    )
    bias = bool(fields.take("attention_bias", True))
    return ModelConfig(
        **sizes,
        layers=parts.specs(windows, parts.read_rope(fields, sizes, 150_000.0), [experts] * len(windows)),
        qkv_bias=bias,
        o_bias=bias,
        attention_sinks=True,
        swiglu_limit=float(fields.take("swiglu_limit", 7.0)),
    )


def write_gpt_oss(config: ModelConfig) -> dict[str, Any]:
    return parts.write_sizes(config.replace(activation="silu")) | parts.write_rope(config) | {
        "head_dim": config.head_dim,
        "attention_bias": config.qkv_bias,
        "layer_types": parts.write_layer_types(config),
        "sliding_window": parts.window(config) or 128,
        "swiglu_limit": config.swiglu_limit,
        "num_local_experts": parts.experts(config).count,
        "num_experts_per_tok": parts.experts(config).per_token,
        "router_aux_loss_coef": parts.experts(config).aux_loss_weight,
    }  # fmt: skip


def read_cohere_fields(fields: Fields) -> dict[str, Any]:
    sizes = parts.sizes(fields, tied=True, max_position=8192)
    return sizes | parts.biases(fields) | dict(
        norm_eps=fields.take("layer_norm_eps", 1e-5),
        norm_kind="layer",
        parallel_block=True,
        logit_scale=float(fields.take("logit_scale", 0.0625)),
    )  # fmt: skip


def read_cohere(fields: Fields) -> ModelConfig:
    values = read_cohere_fields(fields)
    layers = parts.specs(parts.windows(fields, None), parts.read_rope(fields, values, 500_000.0, interleaved=True))
    return ModelConfig(**values, layers=layers)


def read_cohere2(fields: Fields) -> ModelConfig:
    """Sliding layers have RoPE, full ones no position embedding at all."""
    values = read_cohere_fields(fields)
    types = parts.every(fields.need("num_hidden_layers"), fields.take("sliding_window_pattern", 4))
    windows = parts.windows(fields, fields.take("sliding_window", 4096), types)
    one = parts.read_rope(fields, values, interleaved=True)
    return ModelConfig(**values, layers=tuple(LayerSpec(each, None if each is None else one) for each in windows))


def write_cohere(config: ModelConfig) -> dict[str, Any]:
    out = parts.write_sizes(config) | parts.write_rope(config) | {
        "attention_bias": config.qkv_bias,
        "layer_norm_eps": config.norm_eps,
        "logit_scale": config.logit_scale,
    }  # fmt: skip
    del out["rms_norm_eps"]
    return out


def write_cohere2(config: ModelConfig) -> dict[str, Any]:
    return write_cohere(config) | {
        "head_dim": config.head_dim,
        "layer_types": parts.write_layer_types(config),
        "sliding_window": parts.window(config) or 4096,
    }
