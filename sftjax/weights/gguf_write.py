"""GGUF out: F16, BF16 or Q8_0, for llama.cpp and whatever reads its files.

Norms, biases and other vectors stay float32, as llama.cpp's own converter leaves them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sftjax import tree
from sftjax.errors import ConfigError, StorageError
from sftjax.models.config import ModelConfig, Rope
from sftjax.weights import export, families, gguf_tokenizer, rules
from sftjax.weights.gguf import MODEL_TYPES, PERMUTED, hf_names, unpermuted_rows

KINDS = ("F16", "BF16", "Q8_0")


def write_gguf(
    path: str | os.PathLike,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    kind: str,
    model_type: str,
    tokenizer: Mapping[str, bytes],
) -> None:
    """Writes one file, beside its name first and then renamed.

    Args:
      kind: of the matrices: "F16", "BF16" or "Q8_0".
      model_type: as in config.json; one of those `weights.gguf` reads.
      tokenizer: files by name: tokenizer.json, tokenizer_config.json and perhaps chat_template.jinja.

    Raises:
      ConfigError: a family or tokenizer that can't be written.
      StorageError: the file can't be written.
    """
    architectures = {theirs: ours for ours, theirs in MODEL_TYPES.items()}
    if model_type not in architectures or kind not in KINDS:
        raise ConfigError(f"GGUF: {model_type!r} as {kind!r}; families {sorted(architectures)}, kinds {list(KINDS)}")
    architecture = architectures[model_type]
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        writer = gguf.GGUFWriter(partial, architecture)
        vectors = _write_fields(writer, architecture, config)
        gguf_tokenizer.write_fields(writer, tokenizer, config.valid_vocab or config.vocab_size)
        leaves = tree.flatten(params)
        _write_tensors(writer, architecture, config, leaves, gguf.GGMLQuantizationType[kind], vectors)
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: can't be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _write_fields(writer: gguf.GGUFWriter, architecture: str, config: ModelConfig) -> dict[str, np.ndarray]:
    """Everything but the tokenizer; returns the vectors that go among the tensors."""
    raw = families.FAMILIES[MODEL_TYPES[architecture]].write(config)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.valid_vocab or config.vocab_size)
    windows = {layer.window for layer in config.layers if layer.window is not None}
    if windows:
        if architecture not in ("gemma2", "gemma3", "phi3"):
            raise ConfigError(f"GGUF has no sliding window for {architecture!r}")
        writer.add_sliding_window(windows.pop())
    if config.attention_soft_cap is not None:
        writer.add_attn_logit_softcapping(config.attention_soft_cap)
    if config.final_soft_cap is not None:
        writer.add_final_logit_softcapping(config.final_soft_cap)
    if architecture in ("gemma2", "gemma3") and raw["query_pre_attn_scalar"] != config.head_dim:
        usual = config.num_layers in (46, 62) and raw["query_pre_attn_scalar"] == config.hidden_size // config.num_heads
        if not usual:
            raise ConfigError(f"GGUF can't hold query_pre_attn_scalar={raw['query_pre_attn_scalar']}")
    far = next(layer.rope for layer in config.layers if layer.window is None or len(set(config.layers)) == 1)
    extra = _write_rope(writer, far, config)
    near = {layer.rope.theta for layer in config.layers if layer.window is not None and layer.rope}
    if architecture == "gemma3" and near:
        writer.add_float32("gemma3.rope.freq_base_swa", near.pop())
    return extra


def _write_rope(writer: gguf.GGUFWriter, rope: Rope, config: ModelConfig) -> dict[str, np.ndarray]:
    writer.add_rope_freq_base(rope.theta)
    writer.add_rope_dimension_count(rope.dim)
    scaling = rope.scaling
    if scaling is None:
        return {}
    original = scaling.original_max_position or config.max_position
    if scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)
    elif scaling.kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(original)
    elif scaling.kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, original)}
    elif scaling.kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(original)
        if scaling.attention_factor is not None:
            writer.add_rope_scaling_attn_factors(scaling.attention_factor)
        return {
            f"rope_factors_{name}.weight": np.array(getattr(scaling, f"{name}_factor"), np.float32)
            for name in ("long", "short")
        }
    else:
        raise ConfigError(f"GGUF can't hold RoPE scaling of the kind {scaling.kind!r}")
    return {}


def _llama3_factors(rope: Rope, original: int) -> np.ndarray:
    scaling = rope.scaling
    wavelengths = 2 * np.pi * rope.theta ** (np.arange(0, rope.dim, 2) / rope.dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling.factor + smooth)).astype(np.float32)


def _write_tensors(
    writer: gguf.GGUFWriter,
    architecture: str,
    config: ModelConfig,
    leaves: Mapping[str, Any],
    kind: gguf.GGMLQuantizationType,
    vectors: Mapping[str, np.ndarray],
) -> None:
    """Names and sizes first, then the data, one tensor in memory at a time."""
    if config.valid_vocab is not None:
        config = config.replace(vocab_size=config.valid_vocab, valid_vocab=None)
    table = rules.tensors(config, families.FAMILIES[MODEL_TYPES[architecture]].layout)
    names = {ours: theirs for theirs, ours in hf_names(config, fused=architecture == "phi3").items()}
    full = gguf.GGMLQuantizationType.F32
    for name, vector in vectors.items():
        writer.add_tensor_info(name, vector.shape, vector.dtype, vector.nbytes)
    for tensor in table:
        stored = kind if len(tensor.shape) > 1 else full
        block, size = gguf.GGML_QUANT_SIZES[stored]
        if tensor.shape[-1] % block:
            raise ConfigError(f"{tensor.name} has rows of {tensor.shape[-1]}, which {kind.name} can't hold; use F16")
        shape = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
        writer.add_tensor_info(names[tensor.name], shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for vector in vectors.values():
        writer.write_tensor_data(vector)
    for tensor in table:
        array = export.assemble(tensor, np.dtype(np.float32), leaves)
        if config.norm_plus_one and tensor.name.endswith("norm.weight"):
            array = array + np.float32(1)
        if architecture in PERMUTED and (".q_proj." in tensor.name or ".k_proj." in tensor.name):
            array = array[np.argsort(unpermuted_rows(len(array) // config.head_dim, config.head_dim))]
        writer.write_tensor_data(gguf.quants.quantize(array, kind if array.ndim > 1 else full))
    writer.close()
