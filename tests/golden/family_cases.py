"""Tiny models of every family for comparisons with transformers: their configurations, weights and inputs.

Weights and inputs are seeded by name, so that only results need to be stored. No torch here.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sftjax import tree
from sftjax.models import decoder
from sftjax.models.config import ModelConfig
from sftjax.weights import families, rules

LENGTHS = (300, 130, 57)  # beyond every window (48) and RoPE boundary (128); at a boundary; short
PROMPTS = (5, 100)
NEW_TOKENS = 200
AUX_WEIGHT = 3.0  # of the load-balancing loss, so that its gradient is seen
ENTRIES = 24  # of each gradient

_SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40)
_LONG = dict(rope_type="longrope", rope_theta=1e4)


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **fields}}


def _long(pairs: int) -> dict[str, Any]:
    short = [1.0 + 0.05 * i for i in range(pairs)]
    factors = {"short_factor": short, "long_factor": [1.5 * x * x for x in short]}
    return {"rope_parameters": _LONG | factors, "original_max_position_embeddings": 128}


_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128)
CASES: dict[str, dict[str, Any]] = {
    "llama2": dict(model_type="llama", num_key_value_heads=4),
    "llama31": dict(model_type="llama", tie_word_embeddings=True) | _LLAMA3,
    "llama_linear": dict(model_type="llama") | _rope("linear", factor=3.0),
    "llama_dynamic": dict(model_type="llama", max_position_embeddings=128) | _rope("dynamic", factor=4.0),
    "llama_yarn": dict(model_type="llama") | _rope("yarn", factor=4.0, original_max_position_embeddings=128),
    "llama_biases": dict(model_type="llama", attention_bias=True, mlp_bias=True, head_dim=24),
    "smollm3": dict(model_type="smollm3", num_hidden_layers=5, no_rope_layer_interval=4),
    "seed_oss": dict(model_type="seed_oss", head_dim=24, attention_out_bias=True),
    "mistral": dict(model_type="mistral", sliding_window=48),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2": dict(model_type="qwen2", use_sliding_window=True, sliding_window=48, max_window_layers=1),
    "qwen2_moe": dict(model_type="qwen2_moe", shared_expert_intermediate_size=56, mlp_only_layers=[1], **_MOE),
    "qwen3": dict(model_type="qwen3", head_dim=24, tie_word_embeddings=True),
    "qwen3_moe": dict(model_type="qwen3_moe", head_dim=16, norm_topk_prob=True, decoder_sparse_step=1, **_MOE),
    "gemma": dict(model_type="gemma", head_dim=32, tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh"),
    "gemma2": dict(
        model_type="gemma2", head_dim=16, tie_word_embeddings=True, num_hidden_layers=4, sliding_window=48,
        query_pre_attn_scalar=24, attn_logit_softcapping=5.0, final_logit_softcapping=7.0,
    ),
    "gemma3": dict(
        model_type="gemma3_text", head_dim=16, tie_word_embeddings=True, num_hidden_layers=8, sliding_window=48,
        query_pre_attn_scalar=24,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "phi3": dict(model_type="phi3", **_long(8)),
    "phi4_mini": dict(model_type="phi3", tie_word_embeddings=True, partial_rotary_factor=0.75, **_long(6)),
    "olmo2": dict(model_type="olmo2"),
    "granite": dict(
        model_type="granite", embedding_multiplier=6.0, attention_multiplier=0.2, residual_multiplier=0.4,
        logits_scaling=3.0,
    ),
    "gpt_oss": dict(
        model_type="gpt_oss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=4,
        sliding_window=48,
        rope_parameters=dict(
            rope_type="yarn", rope_theta=15e4, factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
            original_max_position_embeddings=128,
        ),
    ),
    "cohere": dict(model_type="cohere", tie_word_embeddings=True, logit_scale=0.25),
    "cohere2": dict(
        model_type="cohere2", tie_word_embeddings=True, logit_scale=0.25, num_hidden_layers=4, sliding_window=48,
        head_dim=16,
    ),
}  # fmt: skip


def raw_config(case: str) -> dict[str, Any]:
    """The case's config.json, as a user would write it."""
    return _SIZES | CASES[case]


# ------------------------------------------------------------------------------------------------ weights and inputs


def values(name: str, shape: tuple[int, ...], plus_one: bool) -> np.ndarray:
    """Random float32 weights of an HF tensor: norms and biases too, matrices larger than at any real start."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    noise = random.standard_normal(shape).astype(np.float32)
    if "norm" in name:
        return 0.3 * noise + np.float32(0.0 if plus_one else 1.0)
    if name.endswith("bias"):
        return 0.3 * noise
    if "embed_tokens" in name and plus_one:
        return np.float32(0.05) * noise  # Gemma scales it up; a large one would say its own token for ever
    if len(shape) == 1 or "embed_tokens" in name:
        return noise
    fan_in = 80 if len(shape) == 3 else shape[-1]  # fused experts come either way round
    return np.float32(1.5 / np.sqrt(fan_in)) * noise


def sequences() -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(3, _SIZES["vocab_size"], length) for length in LENGTHS]


def prompts() -> list[list[int]]:
    random = np.random.default_rng(2)
    return [random.integers(3, _SIZES["vocab_size"], length).tolist() for length in PROMPTS]


def loss_weights() -> list[np.ndarray]:
    """Weights of targets; the last token has none."""
    random = np.random.default_rng(3)
    found = []
    for length in LENGTHS:
        weights = random.choice([0.0, 0.5, 1.0], length).astype(np.float32)
        weights[-1] = 0
        found.append(weights)
    return found


def kept_positions(length: int) -> np.ndarray:
    """At which tokens of a sequence logits are compared with stored ones."""
    return np.unique(np.linspace(0, length - 1, 14).astype(int))


def kept_entries(name: str, size: int) -> np.ndarray:
    """Which entries of a tensor's gradient are stored."""
    return np.random.default_rng(zlib.crc32(name.encode()) + 1).integers(0, size, ENTRIES)


# -------------------------------------------------------------------------------------------------------- our side


@dataclasses.dataclass(frozen=True)
class Case:
    """A case on our side."""

    config: ModelConfig
    params: dict[str, Any]
    table: list[rules.Tensor]


def build(case: str) -> Case:
    """Configuration, parameters, and the table of tensors as transformers holds them in memory."""
    raw = raw_config(case)
    config = families.read_config(raw)
    layout = families.FAMILIES[families.family_of(raw)].layout
    if config.experts is not None and layout != "gpt_oss":
        layout = "fused_experts"
    table = rules.tensors(config, layout)
    leaves = {path: np.zeros(shape, np.float32) for path, shape in rules.leaf_shapes(config).items()}
    for tensor in table:
        whole = values(tensor.name, tensor.shape, config.norm_plus_one)
        for part in tensor.parts:
            piece = whole[part.select] if part.select else whole
            leaves[part.path][part.index] = piece.T if part.transpose else piece
    return Case(config, jax.tree.map(jnp.asarray, tree.unflatten(leaves)), table)


def as_tensors(case: Case, leaves: dict[str, Any]) -> dict[str, np.ndarray]:
    """A tree like the parameters (gradients) as HF tensors."""
    flat = {path: np.asarray(leaf) for path, leaf in tree.flatten(leaves).items()}
    found = {}
    for tensor in case.table:
        whole = np.zeros(tensor.shape, np.float32)
        for part in tensor.parts:
            piece = flat[part.path][part.index]
            whole[part.select or ...] = piece.T if part.transpose else piece
        found[tensor.name] = whole
    return found


def layouts() -> dict[str, tuple[dict[str, np.ndarray], list[tuple[int, int]]]]:
    """The three sequences as a batch: a row each, or all in one of three rows. And (row, first column) of each.

    Both have the same shape, so that one compiled program runs both.
    """
    total = 512
    found = {}
    for name, rows in (("unpacked", [[0], [1], [2]]), ("packed", [[], [2, 0, 1], []])):
        batch = {
            key: np.zeros((len(rows), total), kind)
            for key, kind in dict(tokens=int, targets=int, weights=float, segment_ids=int, positions=int).items()
        }
        places: dict[int, tuple[int, int]] = {}
        for row, members in enumerate(rows):
            column = 0
            for segment, member in enumerate([*members, None], 1):
                ids = np.zeros(total - column, int) if member is None else sequences()[member]
                weights = np.zeros(len(ids)) if member is None else loss_weights()[member]
                span = slice(column, column + len(ids))
                batch["tokens"][row, span], batch["targets"][row, span] = ids, np.roll(ids, -1)
                batch["weights"][row, span], batch["segment_ids"][row, span] = weights, segment
                batch["positions"][row, span] = np.arange(len(ids))
                if member is not None:
                    places[member] = (row, column)
                column += len(ids)
        batch = {key: part.astype(np.float32 if key == "weights" else np.int32) for key, part in batch.items()}
        found[name] = (batch, [places[member] for member in range(len(LENGTHS))])
    return found


def compiled(case: Case, runtime: decoder.Runtime):
    """`batch -> {"logits" [B, L, V], "nll", "moe_loss", "gradients"}`, one program."""

    def loss(params, batch):
        variables = {"params": params}
        hidden, aux = decoder.hidden_states(
            case.config, runtime, variables, batch["tokens"], batch["positions"], batch["segment_ids"],
            weights=batch["weights"],
        )  # fmt: skip
        nll, _ = decoder.token_loss(case.config, runtime, variables, hidden, batch["targets"], batch["weights"])
        moe_loss = aux.get("moe_loss", jnp.zeros(()))
        logits = decoder.logits(case.config, runtime, variables, hidden)
        return nll + AUX_WEIGHT * moe_loss, (logits, nll, moe_loss)

    program = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def run(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        (_, (logits, nll, moe_loss)), gradients = program(case.params, batch)
        return {"logits": np.asarray(logits), "nll": float(nll), "moe_loss": float(moe_loss), "gradients": gradients}

    return run
