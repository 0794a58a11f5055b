"""A GGUF file's metadata as a config.json, and which of our families llama.cpp has.

llama.cpp's code for an architecture takes some settings for granted (Qwen3-MoE always normalises the chosen experts'
weights, SmolLM3 leaves out RoPE in every fourth layer). What is read here is what that code computes; so a model that
reads back as another one than was to be written can't be a GGUF file (`gguf_write` asks).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig
from sftjax.weights import rope
from sftjax.weights.gguf_file import GgufFile

Vector = Callable[[str], np.ndarray]  # a one-dimensional tensor of the file, by name
LLAMA3 = "sftjax.rope.llama3"  # our own: factor, low and high frequency factor, original length


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How llama.cpp has a family.

    Attributes:
      name: `general.architecture`.
      permuted: rows of q and k are stored for a RoPE that rotates neighbours, where HF's rotates halves.
      head: the output matrix is that of the embedding ("tied"), one of its own ("own"), or either.
      period: each `period`-th layer attends to everything, the others within the window; None: no window there.
      free_width: heads * head_dim may be another number than the hidden size.
      factors: takes a divisor for each frequency (`rope_freqs.weight`), which Llama-3 scaling needs.
    """

    name: str
    permuted: bool = False
    head: Literal["tied", "own", "either"] = "either"
    period: int | None = None
    free_width: bool = True
    factors: bool = False


_LLAMA = Architecture("llama", permuted=True, factors=True)
ARCHITECTURES = {  # by model_type
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": Architecture("qwen2", free_width=False),
    "qwen2_moe": Architecture("qwen2moe", head="own", free_width=False),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "gemma": Architecture("gemma", head="tied"),
    "gemma2": Architecture("gemma2", head="tied", period=2),
    "gemma3_text": Architecture("gemma3", period=6),
    "phi3": Architecture("phi3", free_width=False),
    "olmo2": Architecture("olmo2", head="own", free_width=False),
    "granite": Architecture("granite", permuted=True, factors=True),
    "smollm3": Architecture("smollm3", permuted=True, free_width=False),
    "seed_oss": Architecture("seed_oss"),
    "gpt_oss": Architecture("gpt-oss", head="own", period=2),
    "cohere": Architecture("command-r", head="tied", free_width=False),
    "cohere2": Architecture("cohere2", head="tied", period=4, free_width=False),
}
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES.values()}


def model_type(file: GgufFile) -> str:
    """The model_type of a file. Three families are "llama" there: experts and a window tell them apart.

    Raises:
      ConfigError: an architecture that isn't supported.
    """
    name = file.metadata.get("general.architecture")
    if name not in BY_NAME:
        raise ConfigError(f"{file.path}: GGUF architecture {name!r} isn't supported, only {sorted(BY_NAME)}")
    if name == "llama":
        if file.metadata.get("llama.expert_count"):
            return "mixtral"
        return "mistral" if file.metadata.get("llama.attention.sliding_window") else "llama"
    return next(family for family, architecture in ARCHITECTURES.items() if architecture.name == name)


def read(file: GgufFile, vector: Vector) -> dict[str, Any]:
    """The config.json that transformers would write for this model.

    Raises:
      ConfigError: an architecture that isn't supported, or a field missing.
    """
    family = model_type(file)
    architecture = file.metadata["general.architecture"]

    def get(name: str, default: Any = None) -> Any:
        return file.metadata.get(f"{architecture}.{name}", default)

    def need(name: str) -> Any:
        value = get(name)
        if value is None:
            raise ConfigError(f"{file.path}: the GGUF field {architecture}.{name} is missing")
        return value

    heads, hidden = need("attention.head_count"), need("embedding_length")
    raw = dict(
        model_type=family,
        vocab_size=_vocab_size(file),
        hidden_size=hidden,
        intermediate_size=need("feed_forward_length"),
        num_hidden_layers=need("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length", hidden // heads),
        max_position_embeddings=need("context_length"),
        tie_word_embeddings="output.weight" not in file.tensors,
        hidden_act="gelu_pytorch_tanh" if architecture.startswith("gemma") else "silu",
        rope_parameters=_rope(file, get, vector),
        **token_ids(file.metadata),
    )
    if family in ("cohere", "cohere2"):
        raw |= dict(layer_norm_eps=_rounded(need("attention.layer_norm_epsilon")), logit_scale=get("logit_scale"))
    else:
        raw["rms_norm_eps"] = _rounded(need("attention.layer_norm_rms_epsilon"))
    raw |= _biases(family, file) | _windows(family, get) | _experts(family, get) | _special(family, get, need, raw)
    return {name: value for name, value in raw.items() if value is not None}


def _vocab_size(file: GgufFile) -> int:
    if "token_embd.weight" not in file.tensors:
        raise ConfigError(f"{file.path}: the tensor token_embd.weight is missing")
    return file.tensors["token_embd.weight"].shape[0]


def _rounded(value: float) -> float:
    """GGUF holds float32; 9.999999747378752e-06 was written for 1e-05."""
    return float(f"{value:.7g}")


def token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token_id, eos_token_id and pad_token_id; None where the file has none."""
    names = {"bos": "bos", "eos": "eos", "padding": "pad"}
    return {f"{ours}_token_id": metadata.get(f"tokenizer.ggml.{theirs}_token_id") for theirs, ours in names.items()}


def _biases(family: str, file: GgufFile) -> dict[str, Any]:
    """Whether there are biases is seen from the tensors."""
    has = {name: f"blk.0.{name}.bias" in file.tensors for name in ("attn_q", "attn_output", "ffn_up")}
    if family in ("llama", "granite", "smollm3"):
        return dict(attention_bias=has["attn_q"], mlp_bias=has["ffn_up"])
    if family == "seed_oss":
        return dict(attention_bias=has["attn_q"], attention_out_bias=False, mlp_bias=False)
    if family == "qwen2_moe":
        return dict(qkv_bias=has["attn_q"])
    return dict(attention_bias=has["attn_q"]) if family not in ("mistral", "mixtral", "qwen2", "phi3") else {}


def _windows(family: str, get: Callable[..., Any]) -> dict[str, Any]:
    period = ARCHITECTURES[family].period
    if period is None:
        window = get("attention.sliding_window") or None
        return dict(sliding_window=window) if family in ("mistral", "mixtral", "phi3") else {}
    pattern = get("attention.sliding_window_pattern", period)
    full = [(layer + 1) % pattern == 0 for layer in range(get("block_count"))] if isinstance(pattern, int) else (
        [not slides for slides in pattern]
    )  # fmt: skip
    return dict(
        sliding_window=get("attention.sliding_window", 4096),
        layer_types=["full_attention" if each else "sliding_attention" for each in full],
    )


def _experts(family: str, get: Callable[..., Any]) -> dict[str, Any]:
    count, used = get("expert_count"), get("expert_used_count")
    if family in ("mixtral", "gpt_oss"):
        return dict(num_local_experts=count, num_experts_per_tok=used)
    if family not in ("qwen2_moe", "qwen3_moe"):
        return {}
    out = dict(
        num_experts=count,
        num_experts_per_tok=used,
        moe_intermediate_size=get("expert_feed_forward_length") or get("feed_forward_length") // used,
        norm_topk_prob=family == "qwen3_moe",
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    if family == "qwen2_moe":
        shared = get("expert_shared_feed_forward_length") or get("feed_forward_length")
        out |= dict(shared_expert_intermediate_size=shared)
    return out


def _special(
    family: str, get: Callable[..., Any], need: Callable[[str], Any], raw: Mapping[str, Any]
) -> dict[str, Any]:
    """What one family has and no other."""
    if family in ("gemma2", "gemma3_text"):
        scalar = raw["head_dim"]
        if (family, raw["num_hidden_layers"]) in (("gemma2", 46), ("gemma3_text", 62)):  # the 27B models
            scalar = raw["hidden_size"] // raw["num_attention_heads"]
        extra = dict(
            hidden_activation="gelu_pytorch_tanh",
            hidden_act=None,
            query_pre_attn_scalar=scalar,
            attn_logit_softcapping=get("attn_logit_softcapping"),
            final_logit_softcapping=get("final_logit_softcapping"),
        )
        if family == "gemma2":  # absent in files from before these were written
            extra["attn_logit_softcapping"] = extra["attn_logit_softcapping"] or 50.0
            extra["final_logit_softcapping"] = extra["final_logit_softcapping"] or 30.0
        else:
            near = {"rope_type": "default", "rope_theta": _rounded(get("rope.freq_base_swa", 10_000.0))}
            extra["rope_parameters"] = {"full_attention": raw["rope_parameters"], "sliding_attention": near}
        return extra
    if family == "phi3":
        return dict(original_max_position_embeddings=get("rope.scaling.original_context_length"))
    if family == "granite":
        return dict(
            attention_multiplier=_rounded(get("attention.scale", 0.0)) or raw["head_dim"] ** -0.5,
            embedding_multiplier=_rounded(get("embedding_scale", 1.0)),
            residual_multiplier=_rounded(get("residual_scale", 1.0)),
            logits_scaling=_rounded(need("logit_scale")),
        )
    if family == "gpt_oss":
        return dict(swiglu_limit=7.0)
    return {}


# ----------------------------------------------------------------------------------------------------------- RoPE


def _rope(file: GgufFile, get: Callable[..., Any], vector: Vector) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": _rounded(get("rope.freq_base", 10_000.0))}
    head_dim = get("attention.key_length", get("embedding_length") // get("attention.head_count"))
    dim = get("rope.dimension_count", head_dim)
    if dim != head_dim:
        found["partial_rotary_factor"] = rope.fraction(dim, head_dim)
    kind, factor = get("rope.scaling.type", "none"), get("rope.scaling.factor")
    original, stretch = get("rope.scaling.original_context_length"), get("rope.scaling.attn_factor", 1.0)
    if "rope_factors_long.weight" in file.tensors:
        long, short = (vector(f"rope_factors_{name}.weight") for name in ("long", "short"))
        found |= dict(rope_type="longrope", long_factor=_numbers(long), short_factor=_numbers(short))
        found["original_max_position_embeddings"] = original
        usual = longrope_attention(get("context_length") / (original or get("context_length")), original)
        found["attention_factor"] = None if math.isclose(stretch, usual, rel_tol=1e-6) else _rounded(stretch)
    elif "rope_freqs.weight" in file.tensors:
        known = file.metadata.get(LLAMA3)
        found |= llama3_of(vector("rope_freqs.weight"), found["rope_theta"], dim, known, file.path)
    elif kind == "linear":
        found |= dict(rope_type="linear", factor=factor)
    elif kind == "yarn":
        found |= dict(rope_type="yarn", factor=factor, original_max_position_embeddings=original)
        found |= dict(beta_fast=get("rope.scaling.yarn_beta_fast"), beta_slow=get("rope.scaling.yarn_beta_slow"))
        if not math.isclose(stretch, 1.0, rel_tol=1e-6):  # beside the usual one
            found["attention_factor"] = _rounded(stretch * yarn_attention(factor))
        if file.metadata["general.architecture"] == "gpt-oss":
            found["truncate"] = False  # as released
    elif kind != "none":
        raise ConfigError(f"{file.path}: rope.scaling.type {kind!r} isn't understood")
    return {name: value for name, value in found.items() if value is not None}


def _numbers(values: np.ndarray) -> list[float]:
    return [_rounded(value) for value in values.tolist()]


def yarn_attention(factor: float) -> float:
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope_attention(factor: float, original: int | None) -> float:
    return math.sqrt(1 + math.log(factor) / math.log(original)) if original and factor > 1 else 1.0


def llama3_divisors(theta: float, dim: int, factor: float, low: float, high: float, original: float) -> np.ndarray:
    """The divisor of each frequency, `[dim / 2]`, by the Llama-3.1 rule."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, dim, 2) / dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def llama3_of(
    divisors: np.ndarray, theta: float, dim: int, known: list[float] | None = None, where: str = "GGUF"
) -> dict[str, Any]:
    """The settings that give these divisors.

    Only the ratios of the original length to the two frequency factors show in them; `low_freq_factor` is taken as 1.

    Args:
      known: factor, low, high and original length where the file says them.

    Raises:
      ConfigError: no settings do.
    """
    factor = _rounded(float(divisors.max()))
    guesses = [known] if known else []
    guesses += [(factor, 1.0, 4.0, 2.0**power) for power in (13, *range(5, 22))]
    wavelengths = 2 * math.pi * theta ** (np.arange(0, dim, 2) / dim)
    if factor > 1:
        smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
        band = (smooth > 1e-3) & (smooth < 1 - 1e-3)
        if band.sum() >= 2:  # on a line over 1 / wavelength: slope original / (high - low), at 0: -low / (high - low)
            slope, start = np.polyfit(1 / wavelengths[band], smooth[band], 1)
            guesses.append((factor, 1.0, float(f"{1 - 1 / start:.4g}"), float(round(-slope / start))))
    for factor, low, high, original in guesses:
        if np.allclose(divisors, llama3_divisors(theta, dim, factor, low, high, original), rtol=1e-4):
            return dict(
                rope_type="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high,
                original_max_position_embeddings=int(original),
            )  # fmt: skip
    raise ConfigError(f"{where}: rope_freqs.weight doesn't follow the Llama-3.1 rule; use the Hugging Face folder")


# ---------------------------------------------------------------------------------------------------------- names


def hf_names(config: ModelConfig, name: str) -> dict[str, str]:
    """`{GGUF name: HF name}` for an architecture; experts are stacked (the layout "stacked" of `rules.tensors`)."""
    norms = {} if not config.pre_norm else {"attn_norm": "input_layernorm"}
    if config.post_norm:
        norms |= {"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
        norms |= {"post_ffw_norm": "post_feedforward_layernorm"}
    elif name in ("gpt-oss", "seed_oss"):
        norms |= {"post_attention_norm": "post_attention_layernorm"}
    else:
        norms |= {"ffn_norm": "post_attention_layernorm"}
    modules = norms | {
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_down": "mlp.down_proj",
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    }
    modules |= {f"ffn_{name}_exps": f"mlp.experts.{name}_proj" for name in ("gate", "up", "down")}
    modules |= {f"ffn_{name}_shexp": f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    if name == "phi3":
        modules |= {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
    else:
        modules |= {f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"}
        modules |= {f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up")}
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    names["output.weight"] = "lm_head.weight"
    for layer in range(config.num_layers):
        for theirs, ours in modules.items():
            for kind in ("weight", "bias"):
                names[f"blk.{layer}.{theirs}.{kind}"] = f"model.layers.{layer}.{ours}.{kind}"
        names[f"blk.{layer}.attn_sinks.weight"] = f"model.layers.{layer}.self_attn.sinks"
    return names


def unpermuted_rows(heads: int, head_dim: int) -> np.ndarray:
    """Where HF's row r of q or k is in GGUF: halves of a head there, neighbours here.

    HF row of a head:    0  1  2  3 | 4  5  6  7
    stored at in GGUF:   0  2  4  6 | 1  3  5  7
    """
    within = np.arange(head_dim).reshape(head_dim // 2, 2).T.reshape(-1)
    return (np.arange(heads)[:, None] * head_dim + within).reshape(-1)
