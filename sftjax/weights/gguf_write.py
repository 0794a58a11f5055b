"""GGUF out: F16, BF16 or Q8_0, for llama.cpp and whatever reads its files.

Norms, biases, routers and other small tensors stay float32, as llama.cpp's own converter leaves them.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sftjax import tree
from sftjax.errors import ConfigError, StorageError
from sftjax.models.config import ModelConfig, Rope, RopeScaling
from sftjax.weights import export, families, gguf_config, gguf_tokenizer, rules
from sftjax.weights.gguf_config import ARCHITECTURES, Architecture
from sftjax.weights.gguf_file import GgufFile, GgufTensor

KINDS = ("F16", "BF16", "Q8_0")
_FULL = gguf.GGMLQuantizationType.F32


def write_gguf(
    path: str | os.PathLike,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    kind: str,
    model_type: str,
    tokenizer: Mapping[str, bytes],
    stop_ids: Sequence[int] = (),
) -> list[str]:
    """Writes one file, beside its name first and then renamed.

    Args:
      kind: of the matrices: "F16", "BF16" or "Q8_0".
      model_type: as in config.json; one of `gguf_config.ARCHITECTURES`.
      tokenizer: files by name: tokenizer.json, tokenizer_config.json and perhaps chat_template.jinja.
      stop_ids: tokens that end an answer; the first that isn't EOS is written as the end of a turn.

    Returns:
      What differs from the model, a sentence each (a context that ends where llama.cpp lacks a sliding window).

    Raises:
      ConfigError: a family, setting or tokenizer that can't be written.
      StorageError: the file can't be written.
    """
    if model_type not in ARCHITECTURES or kind not in KINDS:
        raise ConfigError(f"GGUF: {model_type!r} as {kind!r}; families {sorted(ARCHITECTURES)}, kinds {list(KINDS)}")
    architecture = ARCHITECTURES[model_type]
    if config.valid_vocab is not None:
        config = config.replace(vocab_size=config.valid_vocab, valid_vocab=None)
    config, notes = _within_window(config, architecture)
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        writer = gguf.GGUFWriter(partial, architecture.name)
        vectors = _write_fields(writer, architecture, config, model_type)
        gguf_tokenizer.write_fields(writer, tokenizer, config.vocab_size, stop_ids)
        tensors = list(_tensors(config, architecture, model_type))
        held = _check(writer, config, architecture, [name for name, _ in tensors], vectors)
        scale = _attention_scale(config) / _attention_scale(held)
        _write_tensors(writer, architecture, config, tree.flatten(params), tensors, kind, vectors, scale)
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: can't be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)
    return notes


def _within_window(config: ModelConfig, architecture: Architecture) -> tuple[ModelConfig, list[str]]:
    """Up to which context llama.cpp computes the same where its code has no window: the window itself."""
    windows = {layer.window for layer in config.layers if layer.window is not None}
    if architecture.period is not None or not windows or min(windows) >= config.max_position:
        return config, []
    note = (
        f"llama.cpp has no sliding window for {architecture.name!r}: the file's context is {min(windows)} tokens "
        f"instead of {config.max_position}, up to which both compute the same"
    )
    return config.replace(max_position=min(windows)), [note]


# --------------------------------------------------------------------------------------------------------- fields


def _write_fields(
    writer: gguf.GGUFWriter, architecture: Architecture, config: ModelConfig, model_type: str
) -> dict[str, np.ndarray]:
    """Everything but the tokenizer; returns the vectors that go among the tensors."""
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if config.norm_kind == "layer":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
    _write_windows(writer, architecture, config)
    if config.attention_soft_cap is not None:
        writer.add_attn_logit_softcapping(config.attention_soft_cap)
    if config.final_soft_cap is not None:
        writer.add_final_logit_softcapping(config.final_soft_cap)
    if model_type == "granite":
        writer.add_attention_scale(config.attention_scale)
        writer.add_embedding_scale(config.embedding_scale)
        writer.add_residual_scale(config.residual_scale)
        writer.add_logit_scale(1.0 / config.logit_scale)  # llama.cpp divides by Granite's, as HF does
    elif config.logit_scale != 1.0:
        writer.add_logit_scale(config.logit_scale)
    _write_experts(writer, config)
    return _write_ropes(writer, architecture, config)


def _write_windows(writer: gguf.GGUFWriter, architecture: Architecture, config: ModelConfig) -> None:
    windows = [layer.window for layer in config.layers]
    used = {window for window in windows if window is not None}
    if not used:
        return
    if architecture.period is not None or len(set(windows)) == 1:
        writer.add_sliding_window(max(used))
    if architecture.period is not None and None in windows:
        period = windows.index(None) + 1
        if period != architecture.period:
            writer.add_sliding_window_pattern(period)


def _write_experts(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    experts = config.experts
    if experts is None:
        return
    writer.add_expert_count(experts.count)
    writer.add_expert_used_count(experts.per_token)
    writer.add_expert_feed_forward_length(experts.intermediate_size)
    if experts.shared_intermediate_size:
        writer.add_expert_shared_feed_forward_length(experts.shared_intermediate_size)


def _write_ropes(writer: gguf.GGUFWriter, architecture: Architecture, config: ModelConfig) -> dict[str, np.ndarray]:
    with_rope = [layer for layer in config.layers if layer.rope is not None]
    far = next((layer.rope for layer in with_rope if layer.window is None), with_rope[0].rope)
    near = {layer.rope.theta for layer in with_rope if layer.window is not None}
    if architecture.name == "gemma3" and near:
        writer.add_rope_freq_base_swa(near.pop())
    return _write_rope(writer, architecture, far, config)


def _write_rope(
    writer: gguf.GGUFWriter, architecture: Architecture, rope: Rope, config: ModelConfig
) -> dict[str, np.ndarray]:
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
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
        stretch = _yarn_attention(scaling)
        if stretch is not None:  # llama.cpp multiplies the usual one by this
            writer.add_rope_scaling_attn_factors(stretch / gguf_config.yarn_attention(scaling.factor))
    elif scaling.kind == "llama3" and architecture.factors:
        bands = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, float(original))
        writer.add_array(gguf_config.LLAMA3, list(bands))
        return {"rope_freqs.weight": gguf_config.llama3_divisors(rope.theta, rope.dim, *bands)}
    elif scaling.kind == "longrope" and architecture.name in ("llama", "phi3", "granite"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(_longrope_attention(scaling, original))
        return {
            f"rope_factors_{name}.weight": np.array(getattr(scaling, f"{name}_factor"), np.float32)
            for name in ("long", "short")
        }
    else:
        raise ConfigError(f"llama.cpp has no RoPE scaling of the kind {scaling.kind!r} for {architecture.name!r}")
    return {}


def _yarn_attention(scaling: RopeScaling) -> float | None:
    """The factor of cos and sin where it isn't the usual one."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        by = [0.1 * scale * math.log(scaling.factor) + 1 for scale in (scaling.mscale, scaling.mscale_all_dim)]
        return by[0] / by[1]
    return None


def _longrope_attention(scaling: RopeScaling, original: int) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return gguf_config.longrope_attention(scaling.factor, original)


# ----------------------------------------------------------------------------------------- is it the same model?


def _check(
    writer: gguf.GGUFWriter,
    config: ModelConfig,
    architecture: Architecture,
    names: Sequence[str],
    vectors: Mapping[str, np.ndarray],
) -> ModelConfig:
    """Reads the fields back, before any tensor is written: llama.cpp would compute what is found there.

    The scale of the attention may differ (most architectures have no field for it): the weights of q can take it.
    """
    wide = config.num_heads * config.head_dim != config.hidden_size
    if wide and not architecture.free_width:
        raise ConfigError(
            f"llama.cpp's {architecture.name!r} needs num_attention_heads * head_dim to be the hidden size, "
            f"{config.hidden_size}, not {config.num_heads * config.head_dim}"
        )
    if architecture.head == "tied" and not config.tie_word_embeddings:
        raise ConfigError(f"llama.cpp's {architecture.name!r} takes its output matrix to be that of the embedding")
    metadata = {
        name: np.float32(value.value).item() if isinstance(value.value, float) else value.value
        for name, value in writer.kv_data[0].items()
    }
    shapes = {"token_embd.weight": (config.vocab_size, config.hidden_size)}
    tensors = {
        name: GgufTensor(name, shapes.get(name, ()), _FULL, 0) for name in (*names, *vectors)
    }  # only their names are looked at
    found = families.read_config(
        gguf_config.read(GgufFile("the GGUF file", metadata, tensors), lambda name: vectors[name])
    )
    expected = _as_held(config, architecture).replace(attention_scale=found.attention_scale)
    different = dict(_differences(expected, found))
    if different:
        said = "; ".join(f"{name} {theirs!r} instead of {ours!r}" for name, (ours, theirs) in different.items())
        raise ConfigError(f"llama.cpp's {architecture.name!r} would compute another model, with {said}")
    return found


def _attention_scale(config: ModelConfig) -> float:
    return config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale


def _as_held(config: ModelConfig, architecture: Architecture) -> ModelConfig:
    """The configuration without what a file doesn't hold and doesn't need."""

    def held(layer):
        window = layer.window
        if architecture.period is None and len({each.window for each in config.layers}) > 1:
            window = None  # some layers have one: as long as the context, see _within_window
        if architecture.period is None and architecture.name not in ("llama", "phi3"):
            window = None
        rope = layer.rope
        if rope is not None and rope.scaling is not None:
            rope = dataclasses.replace(rope, scaling=_scaling_as_held(rope.scaling, config))
        experts = layer.experts and dataclasses.replace(layer.experts, aux_loss_weight=0.0)
        return dataclasses.replace(layer, window=window, rope=rope, experts=experts)

    own = config.replace(layers=tuple(map(held, config.layers)))
    return own if architecture.head != "own" else own.replace(tie_word_embeddings=False)


def _scaling_as_held(scaling: RopeScaling, config: ModelConfig) -> RopeScaling:
    original = scaling.original_max_position or config.max_position
    if scaling.kind == "yarn":
        return dataclasses.replace(
            scaling, original_max_position=original, attention_factor=_yarn_attention(scaling), mscale=None,
            mscale_all_dim=None,
        )  # fmt: skip
    if scaling.kind == "longrope":
        factor = config.max_position / original
        stretch = _longrope_attention(scaling, original)
        usual = math.isclose(stretch, gguf_config.longrope_attention(factor, original), rel_tol=1e-6)
        return dataclasses.replace(
            scaling, factor=factor, original_max_position=original, attention_factor=None if usual else stretch
        )
    return scaling


def _differences(ours: Any, theirs: Any, name: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Fields whose values differ; numbers are float32 in the file."""
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        for field in dataclasses.fields(ours):
            if field.name != "aux_loss_weight":
                yield from _differences(getattr(ours, field.name), getattr(theirs, field.name), field.name)
    elif isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        for one, other in zip(ours, theirs, strict=True):
            yield from _differences(one, other, name)
    elif isinstance(ours, float) and isinstance(theirs, float | int):
        if not math.isclose(ours, theirs, rel_tol=1e-5):
            yield name, (ours, theirs)
    elif ours != theirs:
        yield name, (ours, theirs)


# -------------------------------------------------------------------------------------------------------- tensors


def _tensors(config: ModelConfig, architecture: Architecture, model_type: str) -> Iterator[tuple[str, rules.Tensor]]:
    """(name in the file, what it is made of)."""
    layout = "stacked" if config.experts is not None else families.FAMILIES[model_type].layout
    table = rules.tensors(config, layout)
    names = {ours: theirs for theirs, ours in gguf_config.hf_names(config, architecture.name).items()}
    for tensor in table:
        yield names[tensor.name], tensor
    if architecture.head == "own" and config.tie_word_embeddings:
        yield "output.weight", table[0]  # the embedding once more


def _stored_as(name: str, tensor: rules.Tensor, kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    small = len(_shape(tensor)) == 1 or name.endswith(".bias") or "ffn_gate_inp" in name
    return _FULL if small else kind


def _write_tensors(
    writer: gguf.GGUFWriter,
    architecture: Architecture,
    config: ModelConfig,
    leaves: Mapping[str, Any],
    tensors: Sequence[tuple[str, rules.Tensor]],
    kind: str,
    vectors: Mapping[str, np.ndarray],
    scale: float,
) -> None:
    """Names and sizes first, then the data, one tensor in memory at a time; q is multiplied by `scale`."""
    kinds = [_stored_as(name, tensor, gguf.GGMLQuantizationType[kind]) for name, tensor in tensors]
    for name, vector in vectors.items():
        writer.add_tensor_info(name, vector.shape, vector.dtype, vector.nbytes)
    for (name, tensor), stored in zip(tensors, kinds, strict=True):
        block, size = gguf.GGML_QUANT_SIZES[stored]
        if tensor.shape[-1] % block:
            raise ConfigError(f"{tensor.name} has rows of {tensor.shape[-1]}, which {kind} can't hold; use float16")
        shape = (*_shape(tensor)[:-1], tensor.shape[-1] // block * size)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for vector in vectors.values():
        writer.write_tensor_data(vector)
    for (_, tensor), stored in zip(tensors, kinds, strict=True):
        array = export.assemble(tensor, np.dtype(np.float32), leaves)
        if config.norm_plus_one and tensor.name.endswith("norm.weight"):
            array = array + np.float32(1)
        if scale != 1.0 and (".q_proj." if config.qk_norm == "none" else ".q_norm.") in tensor.name:
            array = array * np.float32(scale)
        if architecture.permuted and (".q_proj." in tensor.name or ".k_proj." in tensor.name):
            rows = gguf_config.unpermuted_rows(len(array) // config.head_dim, config.head_dim)
            array = array[np.argsort(rows)]
        writer.write_tensor_data(gguf.quants.quantize(array.reshape(_shape(tensor)), stored))
    writer.close()


def _shape(tensor: rules.Tensor) -> tuple[int, ...]:
    """A matrix of one row is a vector in GGUF."""
    return tensor.shape[1:] if len(tensor.shape) == 2 and tensor.shape[0] == 1 else tensor.shape
