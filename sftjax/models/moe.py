"""Mixture of experts: a float32 router and dropless grouped matmuls.

Shapes: `N` tokens, `D` model, `E` experts, `C` experts chosen per token, `F` expert ffn.
Every chosen expert runs on every token that chose it: tokens are sorted by expert and multiplied group by group, so
that what a token gets never depends on the other tokens of the batch (nor on padding).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sftjax.models import layers, ops
from sftjax.models.config import Experts, ModelConfig
from sftjax.peft import lora

Array = jax.Array


class MoeMlp(nn.Module):
    """Routed experts, and a shared one beside them where the model has it.

    Returns the output `[B, L, D]` and the router's statistics (see `load_balancing_loss`).
    """

    config: ModelConfig
    runtime: layers.Runtime
    experts: Experts

    @nn.compact
    def __call__(self, x_BxLxD: Array, real_BxL: Array) -> tuple[Array, dict[str, Array]]:
        experts = self.experts
        x_NxD = x_BxLxD.reshape(-1, x_BxLxD.shape[-1])
        logits_NxE = Router(experts, name="router")(x_NxD)
        weights_NxC, chosen_NxC = route(logits_NxE, experts)
        out_NxD = ExpertMlps(self.config, self.runtime, experts, name="experts")(x_NxD, weights_NxC, chosen_NxC)
        if experts.shared_intermediate_size:
            shared = layers.Mlp(self.config, self.runtime, experts.shared_intermediate_size, name="shared_expert")(
                x_BxLxD
            )
            gate = layers.Linear(1, self.runtime, name="shared_expert_gate")(x_BxLxD)
            out_NxD = out_NxD + (jax.nn.sigmoid(gate) * shared).reshape(out_NxD.shape)
        statistics = router_statistics(logits_NxE, chosen_NxC, real_BxL.reshape(-1))
        return out_NxD.reshape(x_BxLxD.shape), statistics


class Router(nn.Module):
    """One float32 logit per expert: rounding here would send tokens to other experts."""

    experts: Experts

    @nn.compact
    def __call__(self, x_NxD: Array) -> Array:
        weight = layers.trained(self, "weight", layers.init_matrix, (self.experts.count, x_NxD.shape[-1]))
        logits = jnp.einsum("nd,ed->ne", x_NxD.astype(jnp.float32), weight.astype(jnp.float32))
        if self.experts.router_bias:
            bias = layers.trained(self, "bias", nn.initializers.zeros, (self.experts.count,))
            logits = logits + bias.astype(jnp.float32)[None, :]
        return logits


class ExpertMlps(nn.Module):
    """The experts' gated MLPs, stacked on a leading axis `E`."""

    config: ModelConfig
    runtime: layers.Runtime
    experts: Experts

    @nn.compact
    def __call__(self, x_NxD: Array, weights_NxC: Array, chosen_NxC: Array) -> Array:
        config, experts = self.config, self.experts
        order = jnp.argsort(chosen_NxC.reshape(-1), stable=True)  # (token, choice) pairs, by expert
        expert_of = chosen_NxC.reshape(-1)[order]
        token_of = order // experts.per_token
        sizes_E = jnp.bincount(expert_of, length=experts.count).astype(jnp.int32)
        x = x_NxD[token_of]

        def project(name: str, features: int, x: Array) -> Array:
            module = ExpertLinear(experts.count, features, self.runtime, experts.bias, name=name)
            return module(x, sizes_E, expert_of)

        gate = project("gate_proj", experts.intermediate_size, x)
        up = project("up_proj", experts.intermediate_size, x)
        inner = ops.gated_activation(gate, up, config.activation, config.swiglu_limit)
        out = project("down_proj", config.hidden_size, inner)
        out = out.astype(jnp.float32) * weights_NxC.reshape(-1)[order][:, None]
        summed = jnp.zeros((x_NxD.shape[0], config.hidden_size), jnp.float32).at[token_of].add(out)
        return summed.astype(x_NxD.dtype)


class ExpertLinear(nn.Module):
    """One projection of all experts: row `m` of x meets the weight of its expert. Weight `[E, features, in]`."""

    count: int
    features: int
    runtime: layers.Runtime
    use_bias: bool

    @nn.compact
    def __call__(self, x_MxI: Array, sizes_E: Array, expert_of_M: Array) -> Array:
        if self.has_variable("quant", "codes"):
            weight = layers.stored_weight(self)
        else:
            shape = (self.count, self.features, x_MxI.shape[-1])
            weight = layers.trained(self, "weight", layers.init_matrix, shape)
        multiply = grouped_matmul(sizes_E)
        y = multiply(x_MxI, layers.gathered(self, weight).astype(x_MxI.dtype))
        if self.has_variable("adapter", "lora_A"):
            rate = self.runtime.adapter_dropout
            key = layers.dropout_key(self, rate)
            adapter = layers.leaves(self, "adapter")
            y = lora.apply(x_MxI, y, adapter, dropout_rate=rate, dropout_rng=key, matmul=multiply)
        if self.use_bias:
            bias = layers.trained(self, "bias", nn.initializers.zeros, (self.count, self.features))
            y = y + bias.astype(y.dtype)[expert_of_M]
        return y


def grouped_matmul(sizes_E: Array) -> Callable[[Array, Array], Array]:
    """`(x [M, in], weight [E, out, in]) -> [M, out]`, the rows of x sorted by expert, `sizes_E` of them for each."""
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )

    def multiply(x: Array, weight: Array) -> Array:
        y = jax.lax.ragged_dot_general(x, weight, sizes_E, dims, preferred_element_type=jnp.float32)
        return y.astype(x.dtype)

    return multiply


def route(logits_NxE: Array, experts: Experts) -> tuple[Array, Array]:
    """The chosen experts of each token and their weights: f32 `[N, C]`, i32 `[N, C]`."""
    if experts.softmax_after_top_k:
        best, chosen = jax.lax.top_k(logits_NxE, experts.per_token)
        return jax.nn.softmax(best, axis=-1), chosen
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits_NxE, axis=-1), experts.per_token)
    if experts.normalize_top_k:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, chosen


def empty_statistics(experts: Experts) -> dict[str, Array]:
    return {
        "choices": jnp.zeros(experts.count, jnp.float32),
        "shares": jnp.zeros(experts.count, jnp.float32),
        "tokens": jnp.zeros((), jnp.float32),
    }


def router_statistics(logits_NxE: Array, chosen_NxC: Array, real_N: Array) -> dict[str, Array]:
    """Sums over real tokens: how often each expert was chosen, its softmax share, and the tokens themselves."""
    real = real_N.astype(jnp.float32)
    choices = jnp.sum(jax.nn.one_hot(chosen_NxC, logits_NxE.shape[-1], dtype=jnp.float32), axis=1)
    shares = jax.nn.softmax(logits_NxE, axis=-1)
    return {
        "choices": jnp.sum(choices * real[:, None], axis=0),
        "shares": jnp.sum(shares * real[:, None], axis=0),
        "tokens": jnp.sum(real),
    }


def load_balancing_loss(statistics: dict[str, Any]) -> Array:
    """E * sum over experts of (share of choices * mean probability), all layers pooled; 1 per choice if balanced.

    Equation 4 to 6 of arXiv:2101.03961 in the form of transformers' `load_balancing_loss_func`, over real tokens.
    """
    tokens = jnp.maximum(statistics["tokens"], 1.0)
    experts = statistics["choices"].shape[0]
    return experts * jnp.sum(statistics["choices"] / tokens * (statistics["shares"] / tokens))
