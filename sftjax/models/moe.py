"""Mixture of experts: a float32 router and dropless grouped matmuls.

Shapes: `N` tokens, `D` model, `E` experts, `C` experts chosen per token, `F` expert ffn.
Every chosen expert runs on every token that chose it: tokens are sorted by expert and multiplied group by group, so
that what a token gets never depends on the other tokens of the batch (nor on padding).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from sftjax import compat
from sftjax.models import layers, ops
from sftjax.models.config import Experts, ModelConfig
from sftjax.parallel import partition
from sftjax.parallel.mesh import BATCH_AXES
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
        logits_NxE = Router(experts, self.runtime, name="router")(x_NxD)
        weights_NxC, chosen_NxC = route(logits_NxE, experts)
        rows = x_BxLxD.shape[:2]
        out = ExpertMlps(self.config, self.runtime, experts, name="experts")(
            x_BxLxD, weights_NxC.reshape(*rows, -1), chosen_NxC.reshape(*rows, -1)
        )
        if experts.shared_intermediate_size:
            shared = layers.Mlp(self.config, self.runtime, experts.shared_intermediate_size, name="shared_expert")(
                x_BxLxD
            )
            gate = layers.Linear(1, self.runtime, name="shared_expert_gate")(x_BxLxD)
            out = out + jax.nn.sigmoid(gate) * shared
        statistics = router_statistics(logits_NxE, chosen_NxC, real_BxL.reshape(-1))
        return out, statistics


class Router(nn.Module):
    """One float32 logit per expert: rounding here would send tokens to other experts."""

    experts: Experts
    runtime: layers.Runtime

    @nn.compact
    def __call__(self, x_NxD: Array) -> Array:
        weight = layers.trained(self, "weight", layers.init_matrix, (self.experts.count, x_NxD.shape[-1]))
        x_NxD = x_NxD.astype(jnp.float32)
        logits = jnp.einsum("nd,ed->ne", x_NxD, weight.astype(jnp.float32))
        if self.has_variable("adapter", "lora_A"):
            logits = layers.adapted(self, x_NxD, logits, lambda: weight)
        if self.experts.router_bias:
            bias = layers.trained(self, "bias", nn.initializers.zeros, (self.experts.count,))
            logits = logits + bias.astype(jnp.float32)[None, :]
        return logits


class ExpertMlps(nn.Module):
    """The experts' gated MLPs, stacked on a leading axis `E`.

    On several devices each has some of the experts (axis `expert`) and some of the tokens (all other axes): it sends
    its tokens through its experts, and what they give is summed over the `expert` axis.
    """

    config: ModelConfig
    runtime: layers.Runtime
    experts: Experts

    @nn.compact
    def __call__(self, x_BxLxD: Array, weights_BxLxC: Array, chosen_BxLxC: Array) -> Array:
        config, experts, mesh = self.config, self.experts, self.runtime.mesh
        widths = {"gate_proj": (config.hidden_size, experts.intermediate_size)}
        widths |= {"up_proj": widths["gate_proj"], "down_proj": widths["gate_proj"][::-1]}
        projections = {
            name: ExpertLinear(experts.count, *width, self.runtime, experts.bias, name=name)(x_BxLxD.dtype)
            for name, width in widths.items()
        }
        run = functools.partial(_run_experts, config, experts, self.runtime.adapter_dropout)
        if mesh is None or mesh.size == 1:
            return run((), None, projections, x_BxLxD, weights_BxLxC, chosen_BxLxC)
        tokens = partition.fit(P(BATCH_AXES, ("context", "tensor"), None), x_BxLxD.shape, mesh)
        axes = tuple(name for entry in tokens if entry for name in entry)
        cut = "expert" if experts.count % mesh.shape["expert"] == 0 else None
        parts = jax.tree.map(lambda leaf: P(cut) if leaf.ndim > 1 else P(), projections)
        return compat.shard_map(
            functools.partial(run, axes, cut), mesh=mesh, in_specs=(parts, tokens, tokens, tokens), out_specs=tokens
        )(projections, x_BxLxD, weights_BxLxC, chosen_BxLxC)


class ExpertLinear(nn.Module):
    """One projection of all experts: what `_project` needs of it. Weight `[E, features, in]`."""

    count: int
    inputs: int
    features: int
    runtime: layers.Runtime
    use_bias: bool

    @nn.compact
    def __call__(self, dtype: Any) -> dict[str, Any]:
        if self.has_variable("quant", "codes"):
            weight = layers.stored_weight(self)
        else:
            weight = layers.trained(self, "weight", layers.init_matrix, (self.count, self.features, self.inputs))
        found: dict[str, Any] = {"weight": layers.gathered(self, weight).astype(dtype)}
        if self.has_variable("adapter", "lora_A"):
            found["adapter"] = layers.leaves(self, "adapter")
            key = layers.dropout_key(self, self.runtime.adapter_dropout)
            if key is not None:
                found["dropout"] = key
        if self.use_bias:
            found["bias"] = layers.trained(self, "bias", nn.initializers.zeros, (self.count, self.features))
        return found


def _run_experts(config, experts, dropout_rate, token_axes, expert_axis, projections, x_BxLxD, weights_BxLxC, chosen):
    """One device's tokens through its experts: the sum over the experts that each chose, `[B, L, D]`."""
    x_NxD = x_BxLxD.reshape(-1, x_BxLxD.shape[-1])
    count = projections["gate_proj"]["weight"].shape[0]
    expert = chosen.reshape(-1)
    if expert_axis is not None:
        expert = expert - jax.lax.axis_index(expert_axis) * count
    elsewhere = (expert < 0) | (expert >= count)
    expert = jnp.where(elsewhere, count, expert)  # (token, choice) pairs of other devices' experts come last
    order = jnp.argsort(expert, stable=True)
    expert_of, token_of = expert[order], order // experts.per_token
    sizes = jnp.bincount(expert_of, length=count + 1)[:count].astype(jnp.int32)
    # Rows behind the last group are undefined after a grouped matmul, and in its gradient too.
    here = (expert_of < count)[:, None]
    x = jnp.where(here, x_NxD[token_of], 0)

    def project(name: str, x: Array) -> Array:
        parts = dict(projections[name])
        if "dropout" in parts and token_axes:
            parts["dropout"] = jax.random.fold_in(parts["dropout"], jax.lax.axis_index(token_axes))
        return jnp.where(here, _project(parts, x, sizes, jnp.minimum(expert_of, count - 1), dropout_rate), 0)

    inner = ops.gated_activation(project("gate_proj", x), project("up_proj", x), config.activation, config.swiglu_limit)
    out = project("down_proj", inner).astype(jnp.float32) * weights_BxLxC.reshape(-1)[order][:, None]
    summed = jnp.zeros(x_NxD.shape, jnp.float32).at[token_of].add(out)
    if expert_axis is not None:
        summed = jax.lax.psum(summed, expert_axis)
    return summed.astype(x_BxLxD.dtype).reshape(x_BxLxD.shape)


def _project(parts, x_MxI: Array, sizes_E: Array, expert_of_M: Array, dropout_rate: float) -> Array:
    """Row `m` of x meets the weight of its expert, its adapter and its bias."""
    multiply = grouped_matmul(sizes_E)
    y = multiply(x_MxI, parts["weight"])
    if "adapter" in parts:
        key = parts.get("dropout")
        y = lora.apply(x_MxI, y, parts["adapter"], dropout_rate=dropout_rate, dropout_rng=key, matmul=multiply)
    if "bias" in parts:
        y = y + parts["bias"].astype(y.dtype)[expert_of_M]
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
