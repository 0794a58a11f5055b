"""Tiny random checkpoints of every family, written without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import transformers

from sftjax.weights import families, rules, safetensors

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_MOE = dict(num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2)
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True)),
    "llama3": (
        "LlamaConfig",
        dict(
            tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=128,
            ),
        ),
    ),
    "llama_linear": ("LlamaConfig", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))),
    "llama_dynamic": ("LlamaConfig", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0))),
    "mistral": ("MistralConfig", dict(sliding_window=16, head_dim=16)),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4)),
    "qwen2": ("Qwen2Config", dict(use_sliding_window=True, sliding_window=16, max_window_layers=2)),
    "qwen2_yarn": (
        "Qwen2Config",
        dict(
            rope_parameters=dict(
                rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=128
            )
        ),
    ),
    "qwen2_moe": ("Qwen2MoeConfig", dict(_MOE, shared_expert_intermediate_size=24, mlp_only_layers=[1])),
    "qwen3": ("Qwen3Config", dict(head_dim=16)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(_MOE, head_dim=16, decoder_sparse_step=2, norm_topk_prob=True)),
    "gemma": ("GemmaConfig", dict(head_dim=16)),
    "gemma2": ("Gemma2Config", dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=24)),
    "gemma3": ("Gemma3TextConfig", dict(head_dim=16, sliding_window=16, num_hidden_layers=7)),
    "phi3": ("Phi3Config", dict(sliding_window=64)),
    "phi3_long": (
        "Phi3Config",
        dict(
            original_max_position_embeddings=128,
            rope_parameters=dict(
                rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75,
                short_factor=[1.0, 1.1, 1.2], long_factor=[2.0, 3.0, 4.0],
            ),
        ),
    ),
    "olmo2": ("Olmo2Config", {}),
    "granite": (
        "GraniteConfig",
        dict(attention_multiplier=0.2, embedding_multiplier=3.0, residual_multiplier=0.3, logits_scaling=7.0),
    ),
    "smollm3": ("SmolLM3Config", {}),
    "seed_oss": ("SeedOssConfig", dict(head_dim=16)),
    "gpt_oss": ("GptOssConfig", dict(num_local_experts=4, head_dim=16, num_experts_per_tok=2)),
    "cohere": ("CohereConfig", {}),
    "cohere2": ("Cohere2Config", dict(sliding_window=16)),
}  # fmt: skip


def config_dict(name: str, **changes) -> dict:
    """config.json as the installed transformers writes it."""
    kind, options = FAMILIES[name]
    config = getattr(transformers, kind)(**{**SIZES, **options, **changes})
    config.architectures = [families.FAMILIES[config.model_type].architecture]
    config.dtype = "bfloat16"
    return json.loads(config.to_json_string())


def random_tensors(raw: dict, *, dtype="bfloat16", layout: str | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    config = families.read_config(raw)
    layout = layout or families.FAMILIES[families.family_of(raw)].layout
    rng = np.random.default_rng(seed)
    return {
        tensor.name: rng.normal(size=tensor.shape).astype(np.float32).astype(np.dtype(dtype))
        for tensor in rules.tensors(config, layout)
    }


def write_file(path: Path, tensors: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as out:
        entries = [(name, array.dtype, array.shape) for name, array in tensors.items()]
        out.write(safetensors.header_bytes(entries, {"format": "pt"}))
        for array in tensors.values():
            safetensors.write_array(out, array)


def write_model(folder: Path, raw: dict, tensors: dict[str, np.ndarray], files: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if files == 1:
        write_file(folder / "model.safetensors", tensors)
        return folder
    names, weight_map = list(tensors), {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        chosen = names[number::files]  # scattered on purpose
        write_file(folder / file, {name: tensors[name] for name in chosen})
        weight_map |= dict.fromkeys(chosen, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
