"""The modules that own the decoder's variables. What they compute is in `ops`, `moe` and `kernels`.

Shapes: `B` batch, `L` length, `D` model, `H` heads, `G` key/value heads, `K` head size, `S` cache slots, `R` repeats.

A weight is looked up in this order: `adapter` (a module trained in full beside an adapter), `quant` (stored codes),
`params`. So one module serves full fine-tuning, LoRA and QLoRA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

from sftjax.kernels.attention import attention
from sftjax.kernels.linear import linear
from sftjax.models import cache as caches
from sftjax.models import ops
from sftjax.models.config import LayerSpec, ModelConfig
from sftjax.parallel import partition
from sftjax.peft import lora

Array = jax.Array
BATCH = ("data", "fsdp")  # the mesh axes that divide a batch


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How a model is run; only the dropouts, NEFTune and the adapters' activation change what it computes.

    Attributes:
      compute_dtype: of activations and matmuls.
      remat: what the backward pass recomputes: "none", "full" (all but each layer's input), "dots" (keeps matmul
        outputs), "attention" (keeps attention outputs only).
      attention: an attention kernel by name; None: the first that can, by platform.
      unroll: layers per step of the scan.
      mesh: devices; None: no constraints on where activations live.
      adapter_dropout, attention_dropout, residual_dropout, embedding_dropout: rates; used only with a key.
      neftune_alpha: strength of the noise on embeddings (arXiv:2310.05914); used only with a key.
      bottleneck_activation: of Houlsby and Pfeiffer adapters, as they were trained.
      max_segments: the most segments a row holds, padding included; None: unknown, which some GPU kernels refuse.
    """

    compute_dtype: str = "bfloat16"
    remat: str = "full"
    attention: str | None = None
    unroll: int = 1
    mesh: Mesh | None = None
    adapter_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    neftune_alpha: float = 0.0
    bottleneck_activation: str = "relu"
    max_segments: int | None = None

    def __post_init__(self):
        if self.remat not in ("none", "full", "dots", "attention"):
            raise ValueError(f"remat {self.remat!r}: use none, full, dots or attention")

    @property
    def is_stochastic(self) -> bool:
        """Whether a training step draws random numbers."""
        rates = (self.adapter_dropout, self.attention_dropout, self.residual_dropout, self.embedding_dropout)
        return any(rate > 0 for rate in (*rates, self.neftune_alpha))

    def constrain(self, x: Array, *axes: Any) -> Array:
        """Places the dims of `x` on mesh axes; the identity without a mesh."""
        return x if self.mesh is None else partition.constrain(x, PartitionSpec(*axes), self.mesh)

    def replace(self, **changes: Any) -> Runtime:
        return dataclasses.replace(self, **changes)


class Linear(nn.Module):
    """y = x weightᵀ + bias, and what an adapter adds. Weight `[features, in]`."""

    features: int
    runtime: Runtime
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.has_variable("quant", "codes") and not self.has_variable("adapter", "weight"):
            from sftjax.kernels import nf4

            y = nf4.linear_quant(x, stored_leaves(self))
        else:
            y = linear(x, gathered(self, trained(self, "weight", init_matrix, (self.features, x.shape[-1]))))
        if self.has_variable("adapter", "lora_A"):
            y = adapted(self, x, y, lambda: stored_weight(self))
        if self.use_bias:
            bias = trained(self, "bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y


class Norm(nn.Module):
    """RMS or layer norm over the last axis, by the model's fields. Weight `[size]`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = {"rms": ops.rms_norm, "layer": ops.layer_norm}[self.config.norm_kind]
        init = nn.initializers.zeros if self.config.norm_plus_one else nn.initializers.ones
        weight = trained(self, "weight", init, (x.shape[-1],))
        return norm(x, weight, self.config.norm_eps, self.config.norm_plus_one)


class Mlp(nn.Module):
    """The gated MLP: down(activation(gate(x)) * up(x))."""

    config: ModelConfig
    runtime: Runtime
    size: int

    @nn.compact
    def __call__(self, x_BxLxD: Array) -> Array:
        config, runtime, bias = self.config, self.runtime, self.config.mlp_bias
        gate = Linear(self.size, runtime, bias, name="gate_proj")(x_BxLxD)
        up = Linear(self.size, runtime, bias, name="up_proj")(x_BxLxD)
        inner = ops.gated_activation(gate, up, config.activation, config.swiglu_limit)
        inner = runtime.constrain(inner, BATCH, "context", "tensor")
        return Linear(config.hidden_size, runtime, bias, name="down_proj")(inner)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; over the batch itself, or over a cache."""

    config: ModelConfig
    runtime: Runtime
    spec: LayerSpec

    @nn.compact
    def __call__(self, x_BxLxD: Array, inputs: dict[str, Any], cache: dict[str, Array] | None, repeat: Array):
        config, runtime = self.config, self.runtime
        q = self.project("q", x_BxLxD, config.num_heads)
        k = self.project("k", x_BxLxD, config.num_kv_heads)
        v = self.project("v", x_BxLxD, config.num_kv_heads)
        if self.spec.rope is not None:
            tables = inputs["rope"][config.ropes.index(self.spec.rope)]
            q = ops.apply_rope(q, tables, self.spec.rope.interleaved)
            k = ops.apply_rope(k, tables, self.spec.rope.interleaved)
        sinks = trained(self, "sinks", init_matrix, (config.num_heads,)) if config.attention_sinks else None
        scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        if cache is not None:
            cache = caches.write(cache, k, v, inputs["positions"], repeat)
        if inputs["info"] is None:  # decoding: the keys are the cache
            out = caches.attention(
                q,
                cache,
                repeat,
                inputs["positions"],
                window=self.spec.window,
                soft_cap=config.attention_soft_cap,
                scale=scale,
                sinks_H=sinks,
            )
        else:
            out = attention(
                q,
                k,
                v,
                inputs["info"],
                window=self.spec.window,
                soft_cap=config.attention_soft_cap,
                scale=scale,
                sinks=sinks,
                dropout=attention_dropout(self, runtime.attention_dropout),
                implementation=runtime.attention,
                mesh=runtime.mesh,
            )
        out = out.reshape(*out.shape[:2], config.num_heads * config.head_dim)
        return Linear(config.hidden_size, runtime, config.o_bias, name="o_proj")(out), cache

    def project(self, kind: str, x_BxLxD: Array, heads: int) -> Array:
        """A projection split into heads, and for q and k normed: `[B, L, heads, K]`."""
        config = self.config
        flat = Linear(heads * config.head_dim, self.runtime, config.qkv_bias, name=f"{kind}_proj")(x_BxLxD)
        normed = "none" if kind == "v" else config.qk_norm
        if normed == "full":
            flat = Norm(config, name=f"{kind}_norm")(flat)
        split = flat.reshape(*flat.shape[:2], heads, config.head_dim)
        split = self.runtime.constrain(split, BATCH, "context", "tensor", None)
        return Norm(config, name=f"{kind}_norm")(split) if normed == "head" else split


# ------------------------------------------------------------------------------------------------ variables and keys

init_matrix = nn.initializers.normal(0.02)


def trained(module: nn.Module, name: str, init, shape: tuple[int, ...]) -> Array:
    """A parameter: the copy trained beside an adapter if there is one, else the model's own."""
    if module.has_variable("adapter", name):
        return module.get_variable("adapter", name)
    return module.param(name, init, shape, jnp.float32)


def adapted(module: nn.Module, x: Array, y: Array, base_weight: Callable[[], Array]) -> Array:
    """The output `y` of a module with what its adapter adds to it."""
    rate = module.runtime.adapter_dropout
    key = dropout_key(module, rate)
    parts = leaves(module, "adapter")
    return lora.apply(x, y, parts, dropout_rate=rate, dropout_rng=key, base_weight=base_weight)


def leaves(module: nn.Module, collection: str) -> dict[str, Array]:
    """All variables of one collection that the module owns, by name."""
    return dict(module.variables[collection])


def stored_weight(module: nn.Module) -> Array:
    """A module's base weight, dequantised if need be."""
    if module.has_variable("quant", "codes"):
        from sftjax.kernels import nf4

        return nf4.dequantise(stored_leaves(module))
    return gathered(module, module.get_variable("params", "weight"))


def stored_leaves(module: nn.Module) -> dict[str, Array]:
    """A quantised weight's leaves as they are used: gathered before they are dequantised, so codes cross the wire."""
    return {name: gathered(module, leaf, name) for name, leaf in leaves(module, "quant").items()}


def gathered(module: nn.Module, weight: Array, name: str = "weight") -> Array:
    """A layer's weight as it is used, its `fsdp` cuts undone; from its bits, where it is kept so (`as_bits`)."""
    mesh = module.runtime.mesh
    if mesh is not None:
        weight = partition.gather(weight, "/".join((*module.path, name)), mesh)
    return jax.lax.bitcast_convert_type(weight, jnp.bfloat16) if weight.dtype == jnp.uint16 else weight


def as_bits(weight: Array) -> Array:
    """A bfloat16 weight of several layers as uint16, which generation keeps it as on a CPU.

    XLA:CPU takes a layer out of stacked bfloat16 ten times slower (2 ms against 0.2 for 1536 by 576, more than the
    product with a few rows takes).
    """
    return jax.lax.bitcast_convert_type(weight, jnp.uint16)


def bottleneck(module: nn.Module, name: str, x: Array) -> Array:
    """x through the bottleneck adapter of this name, where the block has one."""
    if name not in module.variables.get("adapter", {}):
        return x
    from sftjax.peft import adapters

    return adapters.apply(x, module.variables["adapter"][name], module.runtime.bottleneck_activation)


def dropout_key(module: nn.Module, rate: float) -> Array | None:
    return module.make_rng("dropout") if rate > 0 and module.has_rng("dropout") else None


def attention_dropout(module: nn.Module, rate: float) -> tuple[float, Array] | None:
    """(rate, key) for the attention kernel; None where there is nothing to drop."""
    key = dropout_key(module, rate)
    return None if key is None else (rate, key)
