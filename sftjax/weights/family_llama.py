"""Families that are Llama with other fields: Mistral, Granite, SmolLM3, Seed-OSS, Qwen, Mixtral; see `families.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

from sftjax.errors import ConfigError
from sftjax.models.config import Experts, LayerSpec, ModelConfig
from sftjax.weights import family_parts as parts
from sftjax.weights.fields import Fields


def read_llama(fields: Fields) -> ModelConfig:
    sizes = parts.sizes(fields)
    layers = parts.specs(parts.windows(fields, None), parts.read_rope(fields, sizes))
    return ModelConfig(**sizes, **parts.biases(fields, mlp=True), layers=layers)


def write_llama(config: ModelConfig) -> dict[str, Any]:
    return parts.write_sizes(config) | parts.write_rope(config) | {
        "head_dim": config.head_dim,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }  # fmt: skip


def read_mistral(fields: Fields) -> ModelConfig:
    sizes = parts.sizes(fields, max_position=131_072)
    window = fields.take("sliding_window", None if "sliding_window" in fields.raw else 4096)
    return ModelConfig(**sizes, layers=parts.specs(parts.windows(fields, window), parts.read_rope(fields, sizes)))


def write_mistral(config: ModelConfig) -> dict[str, Any]:
    return parts.write_sizes(config) | parts.write_rope(config) | {
        "head_dim": config.head_dim,
        "sliding_window": parts.window(config),
    }  # fmt: skip


def read_granite(fields: Fields) -> ModelConfig:
    return dataclasses.replace(
        read_llama(fields),
        attention_scale=float(fields.take("attention_multiplier", 1.0)),
        embedding_scale=float(fields.take("embedding_multiplier", 1.0)),
        residual_scale=float(fields.take("residual_multiplier", 1.0)),
        logit_scale=1.0 / fields.take("logits_scaling", 1.0),
    )


def _without_usual_head_dim(out: dict[str, Any]) -> dict[str, Any]:
    """For families whose configuration has no head_dim of its own."""
    usual = out["head_dim"] * out["num_attention_heads"] == out["hidden_size"]
    return {name: value for name, value in out.items() if not (usual and name == "head_dim")}


def write_granite(config: ModelConfig) -> dict[str, Any]:
    return _without_usual_head_dim(write_llama(config)) | {
        "attention_multiplier": config.attention_scale,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": 1.0 / config.logit_scale,
    }


def read_smollm3(fields: Fields) -> ModelConfig:
    sizes = parts.sizes(fields, tied=True, max_position=32_768)
    count = fields.need("num_hidden_layers")
    interval = fields.take("no_rope_layer_interval", 4)
    with_rope = fields.take("no_rope_layers", [int((layer + 1) % interval != 0) for layer in range(count)])
    if len(with_rope) < count:
        raise ConfigError(f"{fields.where}: no_rope_layers has {len(with_rope)} entries for {count} layers")
    window = _switched_window(fields, None)
    types = ["sliding_attention" if window and not uses else "full_attention" for uses in with_rope[:count]]
    one = parts.read_rope(fields, sizes, 2_000_000.0)
    layers = tuple(
        LayerSpec(window=each, rope=one if uses else None)
        for each, uses in zip(parts.windows(fields, window, types), with_rope, strict=False)
    )
    return ModelConfig(**sizes, **parts.biases(fields, mlp=True), layers=layers)


def write_smollm3(config: ModelConfig) -> dict[str, Any]:
    return _without_usual_head_dim(write_llama(config)) | {
        "no_rope_layers": [int(layer.rope is not None) for layer in config.layers],
        "layer_types": parts.write_layer_types(config),
        "use_sliding_window": parts.window(config) is not None,
        "sliding_window": parts.window(config),
    }


def read_seed_oss(fields: Fields) -> ModelConfig:
    sizes = parts.sizes(fields, max_position=524_288, head_dim=128)
    layers = parts.specs(parts.windows(fields, None), parts.read_rope(fields, sizes))
    biases = {
        "qkv_bias": fields.take("attention_bias", True),
        "o_bias": fields.take("attention_out_bias", False),
        "mlp_bias": fields.take("mlp_bias", False),
    }
    return ModelConfig(**sizes, **biases, layers=layers)


def write_seed_oss(config: ModelConfig) -> dict[str, Any]:
    return write_llama(config) | {"attention_out_bias": config.o_bias}


def _switched_window(fields: Fields, default: int | None = 4096) -> int | None:
    """The sliding window where `use_sliding_window` says so."""
    window, used = fields.take("sliding_window", default), fields.take("use_sliding_window", False)
    return window if used else None


def _qwen_windows(fields: Fields) -> list[int | None]:
    window = _switched_window(fields)
    count, first = fields.need("num_hidden_layers"), fields.take("max_window_layers", 28)
    types = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(count)]
    return parts.windows(fields, window, types)


def write_qwen_windows(config: ModelConfig) -> dict[str, Any]:
    return {
        "layer_types": parts.write_layer_types(config),
        "use_sliding_window": parts.window(config) is not None,
        "sliding_window": parts.window(config),
    }


def read_qwen2(fields: Fields) -> ModelConfig:
    sizes = parts.sizes(fields, max_position=32_768)
    return ModelConfig(
        **sizes, layers=parts.specs(_qwen_windows(fields), parts.read_rope(fields, sizes)), qkv_bias=True
    )


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return parts.write_sizes(config) | parts.write_rope(config) | write_qwen_windows(config)


def read_qwen3(fields: Fields) -> ModelConfig:
    sizes = parts.sizes(fields, max_position=32_768, head_dim=128)
    layers = parts.specs(_qwen_windows(fields), parts.read_rope(fields, sizes))
    return ModelConfig(**sizes, **parts.biases(fields), layers=layers, qk_norm="head")


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return write_qwen2(config) | {"head_dim": config.head_dim, "attention_bias": config.qkv_bias}


def _qwen_experts(fields: Fields, count: int, *, shared: int) -> list[Experts | None]:
    experts = Experts(
        count=count,
        per_token=fields.need("num_experts_per_tok"),
        intermediate_size=fields.need("moe_intermediate_size"),
        normalize_top_k=bool(fields.take("norm_topk_prob", False)),
        shared_intermediate_size=shared,
        aux_loss_weight=float(fields.take("router_aux_loss_coef", 0.001)),
    )
    dense, step = fields.take("mlp_only_layers", []), fields.take("decoder_sparse_step", 1)
    return [
        None if layer in dense or (layer + 1) % step else experts for layer in range(fields.need("num_hidden_layers"))
    ]


def write_qwen_experts(config: ModelConfig) -> dict[str, Any]:
    experts = parts.experts(config)
    return {
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.normalize_top_k,
        "router_aux_loss_coef": experts.aux_loss_weight,
        "mlp_only_layers": [i for i, layer in enumerate(config.layers) if layer.experts is None],
        "decoder_sparse_step": 1,
    }


def read_qwen2_moe(fields: Fields) -> ModelConfig:
    sizes = parts.sizes(fields, max_position=32_768)
    window, last = _switched_window(fields), fields.take("max_window_layers", 28)
    slides = [window and layer % 2 == 0 and layer < last for layer in range(fields.need("num_hidden_layers"))]
    types = ["sliding_attention" if slide else "full_attention" for slide in slides]
    shared = fields.need("shared_expert_intermediate_size")
    experts = _qwen_experts(fields, fields.take("num_experts", 60), shared=shared)
    layers = parts.specs(parts.windows(fields, window, types), parts.read_rope(fields, sizes), experts)
    return ModelConfig(**sizes, layers=layers, qkv_bias=bool(fields.take("qkv_bias", True)))


def write_qwen2_moe(config: ModelConfig) -> dict[str, Any]:
    return write_qwen2(config) | write_qwen_experts(config) | {
        "num_experts": parts.experts(config).count,
        "shared_expert_intermediate_size": parts.experts(config).shared_intermediate_size,
        "qkv_bias": config.qkv_bias,
    }  # fmt: skip


def read_qwen3_moe(fields: Fields) -> ModelConfig:
    sizes = parts.sizes(fields, max_position=32_768)
    window = _switched_window(fields)
    count = fields.take("num_experts", fields.take("num_local_experts", 128))
    experts = _qwen_experts(fields, count, shared=0)
    layers = parts.specs(parts.windows(fields, window), parts.read_rope(fields, sizes), experts)
    return ModelConfig(**sizes, **parts.biases(fields), layers=layers, qk_norm="head")


def write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    return parts.write_sizes(config) | parts.write_rope(config) | write_qwen_experts(config) | {
        "head_dim": config.head_dim,
        "attention_bias": config.qkv_bias,
        "num_experts": parts.experts(config).count,
        "use_sliding_window": parts.window(config) is not None,
        "sliding_window": parts.window(config),
    }  # fmt: skip


def read_mixtral(fields: Fields) -> ModelConfig:
    sizes = parts.sizes(fields, eps=1e-5, max_position=131_072)
    experts = Experts(
        count=fields.take("num_local_experts", fields.take("num_experts", 8)),
        per_token=fields.take("num_experts_per_tok", 2),
        intermediate_size=sizes["intermediate_size"],
        normalize_top_k=True,
        aux_loss_weight=float(fields.take("router_aux_loss_coef", 0.001)),
    )
    windows = parts.windows(fields, fields.take("sliding_window"))
    return ModelConfig(
        **sizes, layers=parts.specs(windows, parts.read_rope(fields, sizes, 1e6), [experts] * len(windows))
    )


def write_mixtral(config: ModelConfig) -> dict[str, Any]:
    return write_mistral(config) | {
        "num_local_experts": parts.experts(config).count,
        "num_experts_per_tok": parts.experts(config).per_token,
        "router_aux_loss_coef": parts.experts(config).aux_loss_weight,
    }
