"""One decoder for every family: embedding, scanned runs of blocks, final norm, head.

Shapes: `B` batch, `L` length, `T` new tokens, `D` model, `V` vocabulary, `G` key/value heads, `S` slots, `K` head size.

Variables are a dict of collections: `params`, and where there are some `adapter` and `quant`. Everything here is pure;
the cache and auxiliary losses are arguments and results.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sftjax.kernels.attention import make_info
from sftjax.kernels.cross_entropy import cross_entropy
from sftjax.kernels.linear import forward_product
from sftjax.models import cache as caches
from sftjax.models import layers, moe, ops
from sftjax.models.config import LayerSpec, ModelConfig, layer_plan
from sftjax.models.layers import BATCH, Runtime
from sftjax.peft import lora

__all__ = [
    "Runtime",
    "abstract_params",
    "decode",
    "head_weight",
    "hidden_states",
    "init_cache",
    "init_params",
    "logits",
    "token_loss",
]

Array = jax.Array
Variables = Mapping[str, Mapping[str, Any]]
REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
}


def hidden_states(
    config: ModelConfig,
    runtime: Runtime,
    variables: Variables,
    tokens_BxL: Array,
    positions_BxL: Array,
    segment_ids_BxL: Array,
    *,
    dropout_rng: Array | None = None,
    weights: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """What the head sees, after the final norm.

    Args:
      tokens_BxL: ids in [0, vocab_size); others are not noticed here (they are clamped).
      positions_BxL: within the segment.
      segment_ids_BxL: 1.., contiguous in a row; padding is a segment of its own.
      dropout_rng: a key; without one there is neither dropout nor NEFTune.
      weights: `[B, L]`; a segment none of whose tokens has a weight is padding, which routers' statistics and NEFTune
        leave out. None: every token is real.

    Returns:
      hidden `[B, L, D]` in the compute dtype, and auxiliary results: with experts `{"moe_loss": f32 scalar}`, not yet
      multiplied by `config.experts.aux_loss_weight`.
    """
    real = jnp.ones(tokens_BxL.shape, bool) if weights is None else ops.real_tokens(weights, segment_ids_BxL)
    lengths = ops.segment_lengths(positions_BxL, segment_ids_BxL)
    inputs = {
        "rope": rope_tables(config, positions_BxL, lengths),
        "info": make_info(segment_ids_BxL, positions_BxL, max_segments=runtime.max_segments),
        "real": real,
        "lengths": lengths,
    }
    rngs = None if dropout_rng is None else {"dropout": dropout_rng}
    hidden, _, statistics = Decoder(config, runtime).apply(variables, tokens_BxL, inputs, rngs=rngs)
    return hidden, {} if statistics is None else {"moe_loss": moe.load_balancing_loss(statistics)}


def logits(config: ModelConfig, runtime: Runtime, variables: Variables, hidden: Array) -> Array:
    """Float32 `[..., V]`, scaled and capped as the model has it; rows that only pad the table get -inf."""
    hidden, weight = head(config, variables, hidden)
    flat = forward_product(hidden, weight.astype(hidden.dtype), jnp.float32)
    flat = ops.soft_cap(flat * config.logit_scale, config.final_soft_cap)
    if config.valid_vocab is not None:
        column = jnp.arange(flat.shape[-1]).reshape((1,) * (flat.ndim - 1) + (-1,))
        flat = jnp.where(column < config.valid_vocab, flat, -jnp.inf)
    return flat


def token_loss(
    config: ModelConfig,
    runtime: Runtime,
    variables: Variables,
    hidden_BxLxD: Array,
    targets_BxL: Array,
    weights_BxL: Array,
    *,
    dropout_rng: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """sum(weights * nll), f32, without ever holding `[B, L, V]`; for each token `nll` f32 and `correct` `[B, L]`.

    `dropout_rng`: a key for the dropout of an adapter of the head.
    """
    rate = runtime.adapter_dropout
    hidden_BxLxD, weight = head(config, variables, hidden_BxLxD, dropout_rate=rate, dropout_rng=dropout_rng)
    total, nll, correct = cross_entropy(
        hidden_BxLxD,
        weight,
        targets_BxL,
        weights_BxL,
        logit_scale=config.logit_scale,
        soft_cap=config.final_soft_cap,
        valid_vocab=config.valid_vocab,
        mesh=runtime.mesh,
    )
    return total, {"nll": nll, "correct": correct}


def head(config: ModelConfig, variables: Variables, hidden: Array, **dropout: Any) -> tuple[Array, Array]:
    """Hidden state and output head as they are multiplied: see `lora.extend` for what an adapter adds to both."""
    weight, adapters = head_weight(config, variables), variables.get("adapter", {})
    leaves = adapters.get("lm_head", {})
    if config.tie_word_embeddings:  # rows that are trained change on both sides, LoRA changes what is looked up
        rows = adapters.get("embed_tokens", {})
        leaves = {name: rows[name] for name in ("trainable_tokens", "token_indices") if name in rows}
    return lora.extend(hidden, weight, leaves, **dropout)


def head_weight(config: ModelConfig, variables: Variables) -> Array:
    """The output head `[V, D]`: the embedding if tied; the copy trained beside an adapter if there is one."""
    name = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    for collection in ("adapter", "params"):
        if "weight" in variables.get(collection, {}).get(name, {}):
            return variables[collection][name]["weight"]
    raise KeyError(f"no weight for {name}")


# ------------------------------------------------------------------------------------------------------- parameters


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameter tree as `ShapeDtypeStruct`s."""
    return jax.eval_shape(lambda: init_params(jax.random.key(0), config, dtype))


def init_params(rng: Array, config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random parameters: matrices N(0, 0.02²), biases 0, norms the identity. Pure: jit it with `out_shardings`."""
    tokens = jnp.zeros((1, 128), jnp.int32)
    positions = jnp.arange(128, dtype=jnp.int32)[None]
    inputs = {
        "rope": rope_tables(config, positions, positions + 1),
        "info": make_info(tokens + 1, positions),
        "real": tokens == 0,
        "lengths": positions + 1,
    }
    variables = Decoder(config, Runtime(compute_dtype="float32", remat="none")).init(rng, tokens, inputs)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), variables["params"])


# --------------------------------------------------------------------------------------------------------- decoding


def init_cache(config: ModelConfig, batch: int, length: int, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """Empty keys and values: `{layers_<run>: {position: {"k", "v": [repeat, B, G, length, K]}}}`.

    They belong to a runtime that computes in `dtype`; see `cache.kept_as` for how they are kept.
    """

    def empty(repeats: int) -> dict[str, Array]:
        shape = (repeats, batch, config.num_kv_heads, length, config.head_dim)
        return {name: jnp.zeros(shape, caches.kept_as(dtype)) for name in ("k", "v")}

    return {
        f"layers_{run}": {str(position): empty(repeats) for position in range(len(unit))}
        for run, (unit, repeats) in enumerate(layer_plan(config.layers))
    }


def decode(
    config: ModelConfig,
    runtime: Runtime,
    variables: Variables,
    tokens_BxT: Array,
    positions_BxT: Array,
    cache: dict[str, Any],
    *,
    prefill: bool = False,
    lengths: Array | None = None,
) -> tuple[Array, dict[str, Any]]:
    """New tokens over a cache whose slot `p` holds position `p`. Donate the cache.

    Rows are ragged by their positions. A row's padding goes behind its tokens, at the positions that follow: those
    slots are written again before any query can see them. Positions from the cache's length on are not stored.

    Args:
      tokens_BxT: `T` new tokens of each row.
      positions_BxT: where they stand.
      prefill: the tokens start at position 0 (T > 1): attention then runs over them with a training kernel.
      lengths: `[B]` how long each row is now, padding apart, where RoPE depends on it; None: its last position + 1.

    Returns:
      hidden `[B, T, D]` after the final norm, and the cache.
    """
    row_lengths = positions_BxT[:, -1] + 1 if lengths is None else lengths
    row_lengths = jnp.broadcast_to(row_lengths[:, None], positions_BxT.shape)
    inputs = {
        "rope": rope_tables(config, positions_BxT, row_lengths),
        "positions": positions_BxT,
        "info": make_info(jnp.ones_like(positions_BxT), positions_BxT) if prefill else None,
        "real": jnp.ones(tokens_BxT.shape, bool),
        "lengths": row_lengths,
    }
    decoder = Decoder(config, runtime.replace(remat="none"))
    hidden, cache, _ = decoder.apply(variables, tokens_BxT, inputs, cache)
    return hidden, cache


def rope_tables(config: ModelConfig, positions_BxL: Array, lengths_BxL: Array) -> tuple[tuple[Array, Array], ...]:
    """cos and sin for each of `config.ropes`."""
    return tuple(ops.rope_tables(rope, config.max_position, positions_BxL, lengths_BxL) for rope in config.ropes)


# ---------------------------------------------------------------------------------------------------------- modules


class Decoder(nn.Module):
    """From tokens to the final norm's output. See `hidden_states` and `decode` for the inputs."""

    config: ModelConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, tokens_BxL: Array, inputs: dict[str, Any], cache: dict[str, Any] | None = None):
        config, runtime = self.config, self.runtime
        x = Embedding(config, runtime, name="embed_tokens")(tokens_BxL, inputs)
        statistics = None if config.experts is None else moe.empty_statistics(config.experts)
        new_cache = None if cache is None else {}
        for run, (unit, repeats) in enumerate(layer_plan(config.layers)):
            name = f"layers_{run}"
            carry = (x, None if cache is None else cache[name], statistics, jnp.zeros((), jnp.int32))
            carry, _ = scanned(runtime, repeats)(config, runtime, unit, name=name)(carry, inputs)
            x, run_cache, statistics, _ = carry
            if cache is not None:
                new_cache[name] = run_cache
        x = layers.Norm(config, name="norm")(x)
        if self.is_initializing() and not config.tie_word_embeddings:
            layers.Linear(config.vocab_size, runtime, name="lm_head")(x[:, :1])
        return x, new_cache, statistics


def scanned(runtime: Runtime, repeats: int):
    """`Unit` over `repeats` layers of stacked variables, recomputed in the backward pass as the policy says."""
    unit = Unit
    if runtime.remat != "none":
        unit = nn.remat(Unit, policy=REMAT_POLICIES[runtime.remat], prevent_cse=False)
    return nn.scan(
        unit,
        variable_axes={"params": 0, "adapter": 0, "quant": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=repeats,
        unroll=min(runtime.unroll, repeats),
    )


class Unit(nn.Module):
    """The repeated group of layers. Carries activations, cache, routers' statistics and the repeat's number."""

    config: ModelConfig
    runtime: Runtime
    specs: tuple[LayerSpec, ...]

    @nn.compact
    def __call__(self, carry, inputs: dict[str, Any]):
        x, cache, statistics, repeat = carry
        new_cache = None if cache is None else {}
        for position, spec in enumerate(self.specs):
            block = Block(self.config, self.runtime, spec, name=str(position))
            x, layer_cache, found = block(x, inputs, None if cache is None else cache[str(position)], repeat)
            if cache is not None:
                new_cache[str(position)] = layer_cache
            if found is not None:
                statistics = jax.tree.map(jnp.add, statistics, found)
        return (x, new_cache, statistics, repeat + 1), None


class Block(nn.Module):
    """Attention and MLP with their norms; in sequence, or in parallel from one norm."""

    config: ModelConfig
    runtime: Runtime
    spec: LayerSpec

    @nn.compact
    def __call__(self, x_BxLxD: Array, inputs: dict[str, Any], cache: dict[str, Array] | None, repeat: Array):
        config, runtime = self.config, self.runtime
        normed = self.norm("pre_attention_norm", x_BxLxD, config.pre_norm)
        attention = layers.Attention(config, runtime, self.spec, name="self_attn")
        mixed, cache = attention(normed, inputs, cache, repeat)
        mixed = self.norm("post_attention_norm", mixed, config.post_norm)
        mixed = layers.bottleneck(self, "adapter_attn", mixed)
        if config.parallel_block:
            found, statistics = self.mlp(normed, inputs)
            return self.add(x_BxLxD, mixed + layers.bottleneck(self, "adapter_mlp", found)), cache, statistics
        x_BxLxD = self.add(x_BxLxD, mixed)
        found, statistics = self.mlp(self.norm("pre_mlp_norm", x_BxLxD, config.pre_norm), inputs)
        found = self.norm("post_mlp_norm", found, config.post_norm)
        return self.add(x_BxLxD, layers.bottleneck(self, "adapter_mlp", found)), cache, statistics

    def norm(self, name: str, x: Array, present: bool) -> Array:
        return layers.Norm(self.config, name=name)(x) if present else x

    def mlp(self, x_BxLxD: Array, inputs: dict[str, Any]) -> tuple[Array, dict[str, Array] | None]:
        config, runtime = self.config, self.runtime
        if self.spec.experts is None:
            return layers.Mlp(config, runtime, config.intermediate_size, name="mlp")(x_BxLxD), None
        return moe.MoeMlp(config, runtime, self.spec.experts, name="mlp")(x_BxLxD, inputs["real"])

    def add(self, x_BxLxD: Array, change_BxLxD: Array) -> Array:
        rate = self.runtime.residual_dropout
        change_BxLxD = ops.dropout(change_BxLxD, rate, layers.dropout_key(self, rate))
        if self.config.residual_scale != 1.0:
            change_BxLxD = change_BxLxD * jnp.asarray(self.config.residual_scale, change_BxLxD.dtype)
        return self.runtime.constrain(x_BxLxD + change_BxLxD, BATCH, "context", None)


class Embedding(nn.Module):
    """Rows of the table, in the compute dtype; with NEFTune's noise and dropout where they are on."""

    config: ModelConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, tokens_BxL: Array, inputs: dict[str, Any]) -> Array:
        config, runtime = self.config, self.runtime
        shape = (config.vocab_size, config.hidden_size)
        table = layers.gathered(self, layers.trained(self, "weight", layers.init_matrix, shape))
        x = lora.look_up(tokens_BxL, table, self.variables.get("adapter", {}), runtime.compute_dtype)
        x = runtime.constrain(x, BATCH, "context", None)
        key = layers.dropout_key(self, runtime.neftune_alpha)
        if key is not None:
            x = ops.neftune(x, runtime.neftune_alpha, inputs["lengths"], inputs["real"], key)
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        return ops.dropout(x, runtime.embedding_dropout, layers.dropout_key(self, runtime.embedding_dropout))
