"""GGUF files in: configuration, tensors under their Hugging Face names, tokenizer.

    config = families.read_config(gguf.read_config("model.gguf"))
    gguf.tokenizer_files("model.gguf")

llama.cpp stores some tensors otherwise than HF does, which is undone here: rows of q and k are permuted in Llama-like
models (its RoPE rotates neighbours, HF's rotates halves), and Gemma's norms have 1 added.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig
from sftjax.weights import gguf_file
from sftjax.weights.files import RangeFile, copy_converted
from sftjax.weights.gguf_tokenizer import build_tokenizer, tokenizer_data, tokenizer_files

__all__ = [
    "GgufSource",
    "build_tokenizer",
    "hf_names",
    "read_config",
    "read_generation",
    "tokenizer_data",
    "tokenizer_files",
]

MODEL_TYPES = {  # general.architecture: model_type
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}
PERMUTED = ("llama",)
_NOT_PARAMETERS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_USABLE = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


# -------------------------------------------------------------------------------------------------- configuration


def read_config(path: str) -> dict[str, Any]:
    """The config.json that transformers would write for this model.

    Raises:
      ConfigError: an architecture that isn't supported, or a field missing.
    """
    file = gguf_file.read(path)
    architecture = file.metadata.get("general.architecture")
    if architecture not in MODEL_TYPES:
        raise ConfigError(f"{path}: GGUF architecture {architecture!r} isn't supported, only {sorted(MODEL_TYPES)}")

    def need(name: str) -> Any:
        value = file.metadata.get(f"{architecture}.{name}")
        if value is None:
            raise ConfigError(f"{path}: the GGUF field {architecture}.{name} is missing")
        return value

    def get(name: str, default: Any = None) -> Any:
        return file.metadata.get(f"{architecture}.{name}", default)

    if get("expert_count", 0):
        raise ConfigError(f"{path}: {architecture}.expert_count: mixtures of experts can't be read from GGUF; "
                          f"use the Hugging Face folder")  # fmt: skip
    heads, hidden = need("attention.head_count"), need("embedding_length")
    raw = dict(
        model_type=MODEL_TYPES[architecture],
        vocab_size=_vocab_size(file, path),
        hidden_size=hidden,
        intermediate_size=need("feed_forward_length"),
        num_hidden_layers=need("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length", hidden // heads),
        max_position_embeddings=need("context_length"),
        rms_norm_eps=_rounded(need("attention.layer_norm_rms_epsilon")),
        tie_word_embeddings="output.weight" not in file.tensors,
        hidden_act="gelu_pytorch_tanh" if architecture.startswith("gemma") else "silu",
        rope_parameters=_rope(file, get, path),
        **_token_ids(file.metadata),
    )
    return {name: value for name, value in (raw | _special(architecture, file, get)).items() if value is not None}


def _special(architecture: str, file: gguf_file.GgufFile, get) -> dict[str, Any]:
    """What differs by architecture."""
    if architecture in ("gemma2", "gemma3"):
        scalar = get("attention.key_length", 256)
        if (architecture, get("block_count")) in (("gemma2", 46), ("gemma3", 62)):  # the 27B models
            scalar = get("embedding_length") // get("attention.head_count")
        extra = dict(
            hidden_activation="gelu_pytorch_tanh",
            hidden_act=None,
            sliding_window=get("attention.sliding_window", 4096),
            query_pre_attn_scalar=scalar,
            attn_logit_softcapping=get("attn_logit_softcapping"),
            final_logit_softcapping=get("final_logit_softcapping"),
        )
        if architecture == "gemma2":  # absent in files from before these were written
            extra["attn_logit_softcapping"] = extra["attn_logit_softcapping"] or 50.0
            extra["final_logit_softcapping"] = extra["final_logit_softcapping"] or 30.0
        if architecture == "gemma3":
            full = _rope(file, get, file.path)
            near = {"rope_type": "default", "rope_theta": _rounded(get("rope.freq_base_swa", 10_000.0))}
            extra["rope_parameters"] = {"full_attention": full, "sliding_attention": near}
        return extra
    if architecture == "llama":
        return dict(
            attention_bias="blk.0.attn_q.bias" in file.tensors,
            mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        )
    if architecture == "phi3":
        window = get("attention.sliding_window")
        original = get("rope.scaling.original_context_length")
        return dict(sliding_window=window or None, original_max_position_embeddings=original)
    return {}


def _vocab_size(file: gguf_file.GgufFile, path: str) -> int:
    if "token_embd.weight" not in file.tensors:
        raise ConfigError(f"{path}: the tensor token_embd.weight is missing")
    return file.tensors["token_embd.weight"].shape[0]


def _rounded(value: float) -> float:
    """GGUF holds float32; 9.999999747378752e-06 was written for 1e-05."""
    return float(f"{value:.7g}")


def _rope(file: gguf_file.GgufFile, get, path: str) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _rounded(get("rope.freq_base", 10_000.0))}
    head_dim = get("attention.key_length", get("embedding_length") // get("attention.head_count"))
    dim = get("rope.dimension_count", head_dim)
    if dim != head_dim:
        rope["partial_rotary_factor"] = dim / head_dim
    kind = get("rope.scaling.type", "none")
    if "rope_factors_long.weight" in file.tensors:
        long, short = (_vector(file, f"rope_factors_{name}.weight") for name in ("long", "short"))
        rope |= dict(rope_type="longrope", long_factor=long.tolist(), short_factor=short.tolist())
        rope["attention_factor"] = get("rope.scaling.attn_factor")
    elif "rope_freqs.weight" in file.tensors:
        rope |= _llama3_scaling(_vector(file, "rope_freqs.weight"), rope["rope_theta"], dim, path)
    elif kind == "linear":
        rope |= dict(rope_type="linear", factor=get("rope.scaling.factor"))
    elif kind == "yarn":
        original = get("rope.scaling.original_context_length")
        rope |= dict(rope_type="yarn", factor=get("rope.scaling.factor"), original_max_position_embeddings=original)
    elif kind != "none":
        raise ConfigError(f"{path}: rope.scaling.type {kind!r} isn't understood")
    return {name: value for name, value in rope.items() if value is not None}


def _vector(file: gguf_file.GgufFile, name: str) -> np.ndarray:
    tensor = file.tensors[name]
    out = np.empty(tensor.shape, np.float32)
    with RangeFile(file.path) as opened:
        _read_rows(opened, tensor, slice(None), out)
    return out


def _llama3_scaling(factors: np.ndarray, theta: float, dim: int, path: str) -> dict[str, Any]:
    """GGUF holds the divisor of each frequency; found back as the Llama-3.1 rule that gives the same numbers."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, dim, 2) / dim)
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise ConfigError(f"{path}: rope_freqs.weight doesn't follow the Llama-3.1 rule; use the Hugging Face folder")
    return dict(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "padding": "pad"}
    return {f"{ours}_token_id": metadata.get(f"tokenizer.ggml.{theirs}_token_id") for theirs, ours in names.items()}


def read_generation(path: str) -> dict[str, Any]:
    """generation_config.json: the special tokens, and the end of a turn as a further stop."""
    metadata = gguf_file.read(path).metadata
    ids = {name: value for name, value in _token_ids(metadata).items() if value is not None}
    turn = metadata.get("tokenizer.ggml.eot_token_id")
    if turn is not None and turn != ids.get("eos_token_id"):
        ids["eos_token_id"] = [ids["eos_token_id"], turn] if "eos_token_id" in ids else turn
    return ids


# -------------------------------------------------------------------------------------------------------- tensors


def hf_names(config: ModelConfig, fused: bool) -> dict[str, str]:
    """`{GGUF name: HF name}`, per model; `fused`: q, k, v and gate, up are one tensor each (Phi-3)."""
    norms = {"attn_norm": "input_layernorm"}
    if config.post_norm:
        norms |= {"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
        norms |= {"post_ffw_norm": "post_feedforward_layernorm"}
    else:
        norms |= {"ffn_norm": "post_attention_layernorm"}
    modules = norms | {
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_down": "mlp.down_proj",
    }
    if fused:
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
    return names


def unpermuted_rows(heads: int, head_dim: int) -> np.ndarray:
    """Where HF's row r of q or k is in GGUF: halves of a head there, neighbours here.

    HF row of a head:    0  1  2  3 | 4  5  6  7
    stored at in GGUF:   0  2  4  6 | 1  3  5  7
    """
    within = np.arange(head_dim).reshape(head_dim // 2, 2).T.reshape(-1)
    return (np.arange(heads)[:, None] * head_dim + within).reshape(-1)


class GgufSource:
    """The tensors of a GGUF file as a `load.Source` under HF names, dequantised by rows as they are read."""

    def __init__(self, path: str, config: ModelConfig):
        self.where, self._config = path, config
        file = gguf_file.read(path)
        architecture = file.metadata["general.architecture"]
        self._permuted = architecture in PERMUTED
        names = hf_names(config, fused=architecture == "phi3")
        # a tensor without an HF name keeps its own, and is reported as unexpected
        self._tensors = {
            names.get(name, name): tensor for name, tensor in file.tensors.items() if name not in _NOT_PARAMETERS
        }
        self._file = RangeFile(path)
        for name, tensor in self._tensors.items():
            if tensor.kind.name not in _USABLE:
                raise ConfigError(f"{path}: {name} is quantised as {tensor.kind.name}; known are {', '.join(_USABLE)}")

    @property
    def bytes_read(self) -> int:
        return self._file.bytes_read

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return {name: (tensor.shape, "float32") for name, tensor in self._tensors.items()}

    def read(self, name: str, index: tuple[int | slice, ...], out: np.ndarray) -> None:
        tensor = self._tensors[name]
        if len(tensor.shape) == 1:
            whole = np.empty(tensor.shape, np.float32)
            _read_rows(self._file, tensor, slice(None), whole)
            is_norm = name.endswith("norm.weight")
            whole = whole - np.float32(1) if self._config.norm_plus_one and is_norm else whole
            rows = self._rows_of(name, tensor.shape[0])
            copy_converted((whole if rows is None else whole[rows])[index], out)
            return
        index = list(index) + [slice(None)] * (2 - len(index))
        for axis, at in enumerate(index):
            if not isinstance(at, slice):
                index[axis], out = slice(at, at + 1), np.expand_dims(out, axis)
        span = range(tensor.shape[0])[index[0]]
        rows = self._rows_of(name, tensor.shape[0])
        step = max(1, 2**22 // tensor.shape[1])  # rows at a time, so that scratch memory stays small
        if rows is not None:
            step = self._config.head_dim * max(1, step // self._config.head_dim)
        for first in range(0, len(span), step):
            part = span[first : first + step]
            if rows is None:
                block = np.empty((len(part), tensor.shape[1]), np.float32)
                _read_rows(self._file, tensor, slice(part.start, part.stop), block)
            else:
                wanted = rows[part.start : part.stop]
                low, high = int(wanted.min()), int(wanted.max()) + 1
                block = np.empty((high - low, tensor.shape[1]), np.float32)
                _read_rows(self._file, tensor, slice(low, high), block)
                block = block[wanted - low]
            copy_converted(block[:, index[1]], out[first : first + len(part)])

    def _rows_of(self, name: str, count: int) -> np.ndarray | None:
        if self._permuted and re.search(r"self_attn\.[qk]_proj\.(weight|bias)$", name):
            return unpermuted_rows(count // self._config.head_dim, self._config.head_dim)
        return None


def _read_rows(file: RangeFile, tensor: gguf_file.GgufTensor, rows: slice, out: np.ndarray) -> None:
    """Dequantises rows of a tensor (a vector is one row) into float32."""
    count = 1 if len(tensor.shape) == 1 else math.prod(tensor.shape[:-1])
    span = range(count)[rows] if len(tensor.shape) > 1 else range(1)
    raw = np.empty((len(span), tensor.row_bytes), np.uint8)
    file.read_into(tensor.start + span.start * tensor.row_bytes, memoryview(raw.reshape(-1)))
    out[...] = gguf.quants.dequantize(raw, tensor.kind).reshape(out.shape)
