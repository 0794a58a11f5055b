"""Model families: a Hugging Face `config.json` to `ModelConfig`, and back.

The only module (beside presets, GGUF and chat templates) that names families. A family is one `Family` entry: a
function that reads its fields, and one that writes them as transformers 5 does. Both the transformers-4 form
(`rope_theta`, `rope_scaling`, `torch_dtype`) and the transformers-5 form (`rope_parameters`, `dtype`, `layer_types`)
are read. Every field is accounted for: read here, known not to change the maths, or refused by name. Code that a
checkpoint brings along (`auto_map`) is never run and never carried on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
_DROPPED_ON_EXPORT = {
    "torch_dtype", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "auto_map",
    "quantization_config", "_name_or_path", "name_or_path", "sliding_window_pattern", "architectures", "model_type",
    "transformers_version", "_attn_implementation", "_attn_implementation_autoset",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` is read and written."""

    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    layout: str = "plain"  # how tensors are named and fused: weights/rules.py


# ---------------------------------------------------------------------------------------------------- common parts


def _sizes(
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
    head_dim = fields.take("head_dim", head_dim)
    if head_dim is None and hidden % heads:
        raise ConfigError(f"{fields.where}: hidden_size {hidden} isn't a multiple of num_attention_heads {heads}")
    kv_heads = fields.take("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"{fields.where}: num_attention_heads {heads} isn't a multiple of the {kv_heads} kv heads")
    return dict(
        vocab_size=fields.need("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.need("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        max_position=fields.take("max_position_embeddings", max_position),
        norm_eps=fields.take("rms_norm_eps", eps),
        tie_word_embeddings=bool(fields.take("tie_word_embeddings", tied)),
        activation=_activation(fields, fields.take("hidden_act", activation)),
    )


def _activation(fields: Fields, name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ConfigError(f"{fields.where}: hidden_act {name!r} isn't known, only {sorted(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _write_sizes(config: ModelConfig) -> dict[str, Any]:
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


def _biases(fields: Fields, *, mlp: bool = False) -> dict[str, bool]:
    """`attention_bias` means q, k, v and o."""
    attention = bool(fields.take("attention_bias", False))
    biases = dict(qkv_bias=attention, o_bias=attention)
    return biases | {"mlp_bias": bool(fields.take("mlp_bias", False))} if mlp else biases


def _rope(
    fields: Fields, sizes: Mapping[str, Any], theta: float = 10_000.0, *, partly: bool = False, **options: Any
) -> Rope:
    """The model's one RoPE setting. As in transformers, a `rope_scaling` wins over `rope_parameters`.

    `partly`: the family may rotate a part of each head only.
    """
    new, old = fields.take("rope_parameters"), fields.take("rope_scaling")
    theta, partial = fields.take("rope_theta", theta), fields.take("partial_rotary_factor", 1.0)
    original = fields.take("original_max_position_embeddings")
    raw = old or new or {}
    nested = [value for value in raw.values() if isinstance(value, Mapping)]
    if nested and all(value == nested[0] for value in nested) and len(nested) == len(raw):
        raw = nested[0]  # written per layer type, but all alike
    one = rope.read(
        raw,
        where=fields.where,
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


def _write_rope(config: ModelConfig, **options: Any) -> dict[str, Any]:
    used = next(layer.rope for layer in config.layers if layer.rope is not None)
    return {"rope_parameters": rope.write(used, config, **options)}


def _windows(fields: Fields, window: int | None, default_types: Sequence[str] | None = None) -> list[int | None]:
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


def _every(count: int, pattern: int) -> list[str]:
    """Sliding layers, each `pattern`-th one full."""
    return ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(count)]


def _write_layer_types(config: ModelConfig) -> list[str]:
    return ["full_attention" if layer.window is None else "sliding_attention" for layer in config.layers]


def _window(config: ModelConfig) -> int | None:
    """The window of the sliding layers; None where there are none."""
    return next((layer.window for layer in config.layers if layer.window is not None), None)


def _specs(windows: Sequence[int | None], one_rope: Rope, experts: Sequence[Experts | None] | None = None):
    experts = experts or [None] * len(windows)
    return tuple(LayerSpec(window, one_rope, expert) for window, expert in zip(windows, experts, strict=True))


# ------------------------------------------------------------------------------ Llama, Mistral, Granite, SmolLM3


def _read_llama(fields: Fields) -> ModelConfig:
    sizes = _sizes(fields)
    layers = _specs(_windows(fields, None), _rope(fields, sizes))
    return ModelConfig(**sizes, **_biases(fields, mlp=True), layers=layers)


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return _write_sizes(config) | _write_rope(config) | {
        "head_dim": config.head_dim,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }  # fmt: skip


def _read_mistral(fields: Fields) -> ModelConfig:
    sizes = _sizes(fields, max_position=131_072)
    window = fields.take("sliding_window", None if "sliding_window" in fields.raw else 4096)
    return ModelConfig(**sizes, layers=_specs(_windows(fields, window), _rope(fields, sizes)))


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return _write_sizes(config) | _write_rope(config) | {
        "head_dim": config.head_dim,
        "sliding_window": _window(config),
    }  # fmt: skip


def _read_granite(fields: Fields) -> ModelConfig:
    return dataclasses.replace(
        _read_llama(fields),
        attention_scale=float(fields.take("attention_multiplier", 1.0)),
        embedding_scale=float(fields.take("embedding_multiplier", 1.0)),
        residual_scale=float(fields.take("residual_multiplier", 1.0)),
        logit_scale=1.0 / fields.take("logits_scaling", 1.0),
    )


def _without_usual_head_dim(out: dict[str, Any]) -> dict[str, Any]:
    """For families whose configuration has no head_dim of its own."""
    usual = out["head_dim"] * out["num_attention_heads"] == out["hidden_size"]
    return {name: value for name, value in out.items() if not (usual and name == "head_dim")}


def _write_granite(config: ModelConfig) -> dict[str, Any]:
    return _without_usual_head_dim(_write_llama(config)) | {
        "attention_multiplier": config.attention_scale,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": 1.0 / config.logit_scale,
    }


def _read_smollm3(fields: Fields) -> ModelConfig:
    sizes = _sizes(fields, tied=True, max_position=32_768)
    count = fields.need("num_hidden_layers")
    interval = fields.take("no_rope_layer_interval", 4)
    with_rope = fields.take("no_rope_layers", [int((layer + 1) % interval != 0) for layer in range(count)])
    if len(with_rope) < count:
        raise ConfigError(f"{fields.where}: no_rope_layers has {len(with_rope)} entries for {count} layers")
    window = _switched_window(fields, None)
    types = ["sliding_attention" if window and not uses else "full_attention" for uses in with_rope[:count]]
    one = _rope(fields, sizes, 2_000_000.0)
    layers = tuple(
        LayerSpec(window=each, rope=one if uses else None)
        for each, uses in zip(_windows(fields, window, types), with_rope, strict=False)
    )
    return ModelConfig(**sizes, **_biases(fields, mlp=True), layers=layers)


def _write_smollm3(config: ModelConfig) -> dict[str, Any]:
    return _without_usual_head_dim(_write_llama(config)) | {
        "no_rope_layers": [int(layer.rope is not None) for layer in config.layers],
        "layer_types": _write_layer_types(config),
        "use_sliding_window": _window(config) is not None,
        "sliding_window": _window(config),
    }


# ---------------------------------------------------------------------------------------------------- Qwen, Mixtral


def _switched_window(fields: Fields, default: int | None = 4096) -> int | None:
    """The sliding window where `use_sliding_window` says so."""
    window, used = fields.take("sliding_window", default), fields.take("use_sliding_window", False)
    return window if used else None


def _qwen_windows(fields: Fields) -> list[int | None]:
    window = _switched_window(fields)
    count, first = fields.need("num_hidden_layers"), fields.take("max_window_layers", 28)
    types = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(count)]
    return _windows(fields, window, types)


def _write_qwen_windows(config: ModelConfig) -> dict[str, Any]:
    return {
        "layer_types": _write_layer_types(config),
        "use_sliding_window": _window(config) is not None,
        "sliding_window": _window(config),
    }


def _read_qwen2(fields: Fields) -> ModelConfig:
    sizes = _sizes(fields, max_position=32_768)
    return ModelConfig(**sizes, layers=_specs(_qwen_windows(fields), _rope(fields, sizes)), qkv_bias=True)


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return _write_sizes(config) | _write_rope(config) | _write_qwen_windows(config)


def _read_qwen3(fields: Fields) -> ModelConfig:
    sizes = _sizes(fields, max_position=32_768, head_dim=128)
    layers = _specs(_qwen_windows(fields), _rope(fields, sizes))
    return ModelConfig(**sizes, **_biases(fields), layers=layers, qk_norm="head")


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return _write_qwen2(config) | {"head_dim": config.head_dim, "attention_bias": config.qkv_bias}


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


def _write_qwen_experts(config: ModelConfig) -> dict[str, Any]:
    experts = _experts(config)
    return {
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.normalize_top_k,
        "router_aux_loss_coef": experts.aux_loss_weight,
        "mlp_only_layers": [i for i, layer in enumerate(config.layers) if layer.experts is None],
        "decoder_sparse_step": 1,
    }


def _experts(config: ModelConfig) -> Experts:
    return next(layer.experts for layer in config.layers if layer.experts is not None)


def _read_qwen2_moe(fields: Fields) -> ModelConfig:
    sizes = _sizes(fields, max_position=32_768)
    window, last = _switched_window(fields), fields.take("max_window_layers", 28)
    slides = [window and layer % 2 == 0 and layer < last for layer in range(fields.need("num_hidden_layers"))]
    types = ["sliding_attention" if slide else "full_attention" for slide in slides]
    shared = fields.need("shared_expert_intermediate_size")
    experts = _qwen_experts(fields, fields.take("num_experts", 60), shared=shared)
    layers = _specs(_windows(fields, window, types), _rope(fields, sizes), experts)
    return ModelConfig(**sizes, layers=layers, qkv_bias=bool(fields.take("qkv_bias", True)))


def _write_qwen2_moe(config: ModelConfig) -> dict[str, Any]:
    return _write_qwen2(config) | _write_qwen_experts(config) | {
        "num_experts": _experts(config).count,
        "shared_expert_intermediate_size": _experts(config).shared_intermediate_size,
        "qkv_bias": config.qkv_bias,
    }  # fmt: skip


def _read_qwen3_moe(fields: Fields) -> ModelConfig:
    sizes = _sizes(fields, max_position=32_768)
    window = _switched_window(fields)
    count = fields.take("num_experts", fields.take("num_local_experts", 128))
    experts = _qwen_experts(fields, count, shared=0)
    layers = _specs(_windows(fields, window), _rope(fields, sizes), experts)
    return ModelConfig(**sizes, **_biases(fields), layers=layers, qk_norm="head")


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    return _write_sizes(config) | _write_rope(config) | _write_qwen_experts(config) | {
        "head_dim": config.head_dim,
        "attention_bias": config.qkv_bias,
        "num_experts": _experts(config).count,
        "use_sliding_window": _window(config) is not None,
        "sliding_window": _window(config),
    }  # fmt: skip


def _read_mixtral(fields: Fields) -> ModelConfig:
    sizes = _sizes(fields, eps=1e-5, max_position=131_072)
    experts = Experts(
        count=fields.take("num_local_experts", fields.take("num_experts", 8)),
        per_token=fields.take("num_experts_per_tok", 2),
        intermediate_size=sizes["intermediate_size"],
        normalize_top_k=True,
        aux_loss_weight=float(fields.take("router_aux_loss_coef", 0.001)),
    )
    windows = _windows(fields, fields.take("sliding_window"))
    return ModelConfig(**sizes, layers=_specs(windows, _rope(fields, sizes, 1e6), [experts] * len(windows)))


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    return _write_mistral(config) | {
        "num_local_experts": _experts(config).count,
        "num_experts_per_tok": _experts(config).per_token,
        "router_aux_loss_coef": _experts(config).aux_loss_weight,
    }


# ------------------------------------------------------------------------------------------------------------ Gemma


def _gemma_sizes(fields: Fields, max_position: int) -> dict[str, Any]:
    sizes = _sizes(fields, tied=True, max_position=max_position, head_dim=256, activation="gelu_pytorch_tanh")
    return sizes | dict(norm_plus_one=True, embedding_scale=sizes["hidden_size"] ** 0.5)


def _read_gemma(fields: Fields) -> ModelConfig:
    sizes = _gemma_sizes(fields, 8192)
    # the first releases wrote "gelu", and meant (and ran) the tanh approximation
    meant = fields.take("hidden_activation", "gelu_pytorch_tanh" if sizes["activation"] == "gelu" else None)
    if meant is not None:
        sizes["activation"] = _activation(fields, meant)
    return ModelConfig(**sizes, **_biases(fields), layers=_specs(_windows(fields, None), _rope(fields, sizes)))


def _write_gemma(config: ModelConfig) -> dict[str, Any]:
    return _write_sizes(config) | _write_rope(config) | {
        "head_dim": config.head_dim,
        "attention_bias": config.qkv_bias,
    }  # fmt: skip


def _read_gemma2_fields(fields: Fields, max_position: int, caps: tuple[float | None, float | None]) -> dict[str, Any]:
    sizes = _gemma_sizes(fields, max_position)
    activation = _activation(fields, fields.take("hidden_activation", "gelu_pytorch_tanh"))
    return sizes | _biases(fields) | dict(
        activation=activation,  # `hidden_act` may be there too, and is never read
        post_norm=True,
        attention_scale=float(fields.take("query_pre_attn_scalar", 256)) ** -0.5,
        attention_soft_cap=_optional(fields, "attn_logit_softcapping", caps[0]),
        final_soft_cap=_optional(fields, "final_logit_softcapping", caps[1]),
    )  # fmt: skip


def _optional(fields: Fields, name: str, default: float | None) -> float | None:
    """A number that null switches off, unlike a field that is absent."""
    value = fields.take(name) if name in fields.raw else default
    return None if value is None else float(value)


def _write_gemma2(config: ModelConfig) -> dict[str, Any]:
    out = _write_gemma(config) | {
        "layer_types": _write_layer_types(config),
        "sliding_window": _window(config) or 4096,
        "query_pre_attn_scalar": _whole(config.attention_scale**-2),
        "attn_logit_softcapping": config.attention_soft_cap,
        "final_logit_softcapping": config.final_soft_cap,
    }
    out["hidden_activation"] = out.pop("hidden_act")
    return out


def _whole(value: float) -> int | float:
    """Undoes the rounding of a square root where the number was whole."""
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


def _read_gemma2(fields: Fields) -> ModelConfig:
    values = _read_gemma2_fields(fields, 8192, (50.0, 30.0))
    windows = _windows(fields, fields.take("sliding_window", 4096), _every(fields.need("num_hidden_layers"), 2))
    return ModelConfig(**values, layers=_specs(windows, _rope(fields, values)))


def _read_gemma3(fields: Fields) -> ModelConfig:
    values = _read_gemma2_fields(fields, 131_072, (None, None))
    pattern = fields.take("sliding_window_pattern", fields.take("_sliding_window_pattern", 6))
    types = _every(fields.need("num_hidden_layers"), pattern)
    windows = _windows(fields, fields.take("sliding_window", 4096), types)
    raw = fields.take("rope_parameters", {})
    full = (raw.get("full_attention") or {}) | (fields.take("rope_scaling") or {})
    common = dict(where=fields.where, head_dim=values["head_dim"], max_position=values["max_position"])
    far = rope.read(full, theta=fields.take("rope_theta", 1e6), **common)
    near = rope.read(raw.get("sliding_attention"), theta=fields.take("rope_local_base_freq", 1e4), **common)
    if set(raw) - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"{fields.where}: rope_parameters must have full_attention and sliding_attention only")
    layers = tuple(LayerSpec(window, far if window is None else near) for window in windows)
    return ModelConfig(**values, layers=layers, qk_norm="head")


def _write_gemma3(config: ModelConfig) -> dict[str, Any]:
    ropes = {"full_attention": 1e6, "sliding_attention": 1e4}
    written = {kind: {"rope_theta": theta, "rope_type": "default"} for kind, theta in ropes.items()}
    for kind, layer in zip(_write_layer_types(config), config.layers, strict=True):
        written[kind] = rope.write(layer.rope, config)
    return _write_gemma2(config) | {"rope_parameters": written}


# ------------------------------------------------------------------------------------- Phi-3, OLMo 2, GPT-OSS, Cohere


def _read_phi3(fields: Fields) -> ModelConfig:
    sizes = _sizes(fields, eps=1e-5, max_position=4096)
    # earlier releases called longrope "su" and "yarn"
    one = _rope(fields, sizes, partly=True, aliases={"su": "longrope", "yarn": "longrope"})
    return ModelConfig(**sizes, layers=_specs(_windows(fields, fields.take("sliding_window")), one))


def _write_phi3(config: ModelConfig) -> dict[str, Any]:
    out = _write_sizes(config) | _write_rope(config, with_partial=True) | {"sliding_window": _window(config)}
    original = out["rope_parameters"].get("original_max_position_embeddings", config.max_position)
    return out | {"original_max_position_embeddings": original}


def _read_olmo2(fields: Fields) -> ModelConfig:
    sizes = _sizes(fields, eps=1e-5)
    layers = _specs(_windows(fields, None), _rope(fields, sizes))
    return ModelConfig(**sizes, **_biases(fields), layers=layers, pre_norm=False, post_norm=True, qk_norm="full")


def _write_olmo2(config: ModelConfig) -> dict[str, Any]:
    return _write_sizes(config) | _write_rope(config) | {"attention_bias": config.qkv_bias}


_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read_gpt_oss(fields: Fields) -> ModelConfig:
    sizes = _sizes(fields, eps=1e-5, max_position=131_072, head_dim=64) | {"activation": "swiglu_oai"}
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
    windows = _windows(fields, fields.take("sliding_window", 128), _every(fields.need("num_hidden_layers"), 2))
    bias = bool(fields.take("attention_bias", True))
    return ModelConfig(
        **sizes,
        layers=_specs(windows, _rope(fields, sizes, 150_000.0), [experts] * len(windows)),
        qkv_bias=bias,
        o_bias=bias,
        attention_sinks=True,
        swiglu_limit=float(fields.take("swiglu_limit", 7.0)),
    )


def _write_gpt_oss(config: ModelConfig) -> dict[str, Any]:
    return _write_sizes(config.replace(activation="silu")) | _write_rope(config) | {
        "head_dim": config.head_dim,
        "attention_bias": config.qkv_bias,
        "layer_types": _write_layer_types(config),
        "sliding_window": _window(config) or 128,
        "swiglu_limit": config.swiglu_limit,
        "num_local_experts": _experts(config).count,
        "num_experts_per_tok": _experts(config).per_token,
        "router_aux_loss_coef": _experts(config).aux_loss_weight,
    }  # fmt: skip


def _read_cohere_fields(fields: Fields) -> dict[str, Any]:
    sizes = _sizes(fields, tied=True, max_position=8192)
    return sizes | _biases(fields) | dict(
        norm_eps=fields.take("layer_norm_eps", 1e-5),
        norm_kind="layer",
        parallel_block=True,
        logit_scale=float(fields.take("logit_scale", 0.0625)),
    )  # fmt: skip


def _read_cohere(fields: Fields) -> ModelConfig:
    values = _read_cohere_fields(fields)
    layers = _specs(_windows(fields, None), _rope(fields, values, 500_000.0, interleaved=True))
    return ModelConfig(**values, layers=layers)


def _read_cohere2(fields: Fields) -> ModelConfig:
    """Sliding layers have RoPE, full ones no position embedding at all."""
    values = _read_cohere_fields(fields)
    types = _every(fields.need("num_hidden_layers"), fields.take("sliding_window_pattern", 4))
    windows = _windows(fields, fields.take("sliding_window", 4096), types)
    one = _rope(fields, values, interleaved=True)
    return ModelConfig(**values, layers=tuple(LayerSpec(each, None if each is None else one) for each in windows))


def _write_cohere(config: ModelConfig) -> dict[str, Any]:
    out = _write_sizes(config) | _write_rope(config) | {
        "attention_bias": config.qkv_bias,
        "layer_norm_eps": config.norm_eps,
        "logit_scale": config.logit_scale,
    }  # fmt: skip
    del out["rms_norm_eps"]
    return out


def _write_cohere2(config: ModelConfig) -> dict[str, Any]:
    return _write_cohere(config) | {
        "head_dim": config.head_dim,
        "layer_types": _write_layer_types(config),
        "sliding_window": _window(config) or 4096,
    }


# ------------------------------------------------------------------------------------------------------- the table

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _read_llama, _write_llama),
    "mistral": Family("MistralForCausalLM", _read_mistral, _write_mistral),
    "mixtral": Family("MixtralForCausalLM", _read_mixtral, _write_mixtral, "mixtral"),
    "qwen2": Family("Qwen2ForCausalLM", _read_qwen2, _write_qwen2),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", _read_qwen2_moe, _write_qwen2_moe),
    "qwen3": Family("Qwen3ForCausalLM", _read_qwen3, _write_qwen3),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen3_moe),
    "gemma": Family("GemmaForCausalLM", _read_gemma, _write_gemma),
    "gemma2": Family("Gemma2ForCausalLM", _read_gemma2, _write_gemma2),
    "gemma3_text": Family("Gemma3ForCausalLM", _read_gemma3, _write_gemma3),
    "phi3": Family("Phi3ForCausalLM", _read_phi3, _write_phi3, "phi3"),
    "olmo2": Family("Olmo2ForCausalLM", _read_olmo2, _write_olmo2),
    "granite": Family("GraniteForCausalLM", _read_granite, _write_granite),
    "smollm3": Family("SmolLM3ForCausalLM", _read_smollm3, _write_smollm3),
    "gpt_oss": Family("GptOssForCausalLM", _read_gpt_oss, _write_gpt_oss, "gpt_oss"),
    "cohere": Family("CohereForCausalLM", _read_cohere, _write_cohere),
    "cohere2": Family("Cohere2ForCausalLM", _read_cohere2, _write_cohere2),
}
# Plain Llamas under other names; they leave as "llama", which loads everywhere without their own code.
ALIASES = {
    "Yi": "llama",
    "yi": "llama",
    "deepseek_llm": "llama",
    "internlm2_llama": "llama",
    "llamafied_qwen": "llama",
    "aquila": "llama",
    "smollm2": "llama",
    "tinyllama": "llama",
}


def family_of(raw: Mapping[str, Any], where: str = "config.json") -> str:
    """The key of `FAMILIES` for a config.json.

    Raises:
      ConfigError: the model type isn't known.
    """
    name = raw.get("model_type")
    name = ALIASES.get(name, name) if isinstance(name, str) else None
    if name not in FAMILIES:
        Fields(raw, where)  # a multimodal model is better named by what it has too much
        known = ", ".join(sorted({*FAMILIES, *ALIASES}))
        raise ConfigError(f"{where}: model_type {raw.get('model_type')!r} isn't supported; known are {known}")
    return name


def read_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """A parsed config.json (of transformers 4 or 5) as `ModelConfig`.

    Raises:
      ConfigError: naming the field that is missing, unknown or unsupported.
    """
    family = FAMILIES[family_of(raw, where)]
    fields = Fields(raw, where)
    quantization = fields.take("quantization_config")
    if quantization is not None and not (family.layout == "gpt_oss" and quantization.get("quant_method") == "mxfp4"):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ConfigError(
            f"{where}: quantization_config ({method!r}): the weights are quantised; use the original model, "
            f"or a GGUF file of it"
        )
    try:
        config = family.read(fields)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{where}: a field has the wrong type or value ({error})") from error
    fields.check_rest()
    return config


def write_config(config: ModelConfig, *, dtype: str, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json that transformers 5 would write.

    Args:
      dtype: of the tensors written, "bfloat16".
      like: the config.json that the model came with: its family is kept, and so are its other fields (token ids,
        dropout ...) and its way of writing what hasn't changed. None: the first family that can express the config.

    Raises:
      ConfigError: no family (or not the one of `like`) can express this config.
    """
    if like is None:
        name = _family_for(config)
        # unset, or transformers takes the family's own ids, which may lie beyond this vocabulary
        tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        out = FAMILIES[name].write(config) | tokens
    else:
        name = family_of(like)
        out, was = FAMILIES[name].write(config), FAMILIES[name].write(read_config(like))
        kept = {key: value for key, value in like.items() if key not in _DROPPED_ON_EXPORT}
        out |= {key: value for key, value in kept.items() if key not in out or out[key] == was.get(key)}
        if "num_local_experts" in kept and "num_experts" in out and "num_experts" not in kept:
            out["num_local_experts"] = out.pop("num_experts")
    out |= {"model_type": name, "architectures": [FAMILIES[name].architecture], "dtype": dtype}
    if read_config(out) != config:
        raise ConfigError(f"the model type {name!r} can't express this model's configuration; export it as another")
    return dict(sorted(out.items()))


def _family_for(config: ModelConfig) -> str:
    for name, family in FAMILIES.items():
        try:
            if read_config(family.write(config) | {"model_type": name}) == config:
                return name
        except (ConfigError, StopIteration, AttributeError, KeyError, TypeError):
            continue  # this family lacks a field, or has one too many
    raise ConfigError("no known model type can express this model's configuration, so it can't be exported")
