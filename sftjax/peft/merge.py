"""Adapters folded into weights, and several adapters into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from sftjax import tree
from sftjax.errors import ConfigError
from sftjax.kernels import nf4
from sftjax.peft import lora
from sftjax.peft.spec import AdapterSpec

Array = jax.Array
_PLAIN = {"lora_A", "lora_B", "scale", "initial_lora_A", "initial_lora_B"}


def merge(
    params: tree.Tree, adapter: tree.Tree, *, quant: tree.Tree | None = None, dtype: jnp.dtype | None = None
) -> dict:
    """The parameters of a plain model that computes what base and adapter compute together.

    Sums are float32, layer by layer, and rounded once.

    Args:
      params: the base. To merge into the original 16-bit weights rather than into what quantisation left of them,
        give those and no `quant`.
      quant: the quantised part of the base; it comes back dequantised.
      dtype: of the result; None: each parameter's own (bfloat16 for what was quantised).

    Raises:
      ConfigError: a bottleneck adapter, or a bias of an adapter where the model has none: no weight can absorb them.
    """
    modules = _by_module(adapter)
    if any("/adapter_" in path for path in modules):
        raise ConfigError("a bottleneck adapter can't be merged into the weights; export the adapter instead")
    _check_tied(params, modules)
    flat = dict(tree.flatten(params))
    for module, stored in _by_module(quant or {}).items():
        flat[f"{module}/weight"] = stored
    without = [module for module, leaves in modules.items() if "lora_bias" in leaves and f"{module}/bias" not in flat]
    if without:
        raise ConfigError(
            f"lora_bias can't be merged where the model has no bias ({without[0]}): export the adapter instead"
        )
    merged = {}
    for path, leaf in flat.items():
        module, _, name = path.rpartition("/")
        leaves = modules.get(module, {})
        kind = dtype or (jnp.bfloat16 if isinstance(leaf, Mapping) else leaf.dtype)
        if name in leaves:  # trained in full
            leaf = jnp.asarray(leaves[name])
        if name == "weight" and "lora_A" in leaves and not path.startswith("layers_"):
            merged[path] = _merged_table(leaf, leaves, path == "embed_tokens/weight").astype(kind)
        elif isinstance(leaf, Mapping) or (name == "weight" and "lora_A" in leaves):
            merged[path] = _merged_weight(leaf, leaves, kind)
        elif name == "weight" and "trainable_tokens" in leaves:
            merged[path] = _replaced(leaf, leaves).astype(kind)
        elif name == "bias" and "lora_bias" in leaves:
            scale = leaves["scale"].reshape(leaves["scale"].shape + (1,) * (leaf.ndim - leaves["scale"].ndim))
            merged[path] = (leaf.astype(jnp.float32) + scale * leaves["lora_bias"]).astype(kind)
        else:
            merged[path] = leaf.astype(kind)
    return tree.unflatten(merged)


def _check_tied(params: tree.Tree, modules: Mapping[str, Mapping[str, Array]]) -> None:
    """A tied embedding is one weight: an adapter that changes its two sides differently needs it untied first."""
    if "lm_head" in params:
        return
    if "lm_head" in modules or "lora_A" in modules.get("embed_tokens", {}):
        raise ConfigError("the adapter changes the embedding and the output head apart, and they are one weight here")


def merge_one(weight: Array, leaves: Mapping[str, Array]) -> Array:
    """One layer's weight `[(expert,) out, in]` with its adapter's leaves, float32."""
    total = weight.astype(jnp.float32) + lora.delta_weight(leaves)
    if "magnitude" not in leaves:
        return total
    norm = jnp.linalg.norm(total, axis=-1)
    factor = jnp.where(leaves["scale"] == 0, 1.0, leaves["magnitude"] / norm)
    return factor[..., None] * total


def _merged_table(weight: Array, leaves: Mapping[str, Array], embedding: bool) -> Array:
    """The embedding or the head `[V, D]` with its adapter, float32. DoRA's norms are over D, the embedding's over V."""
    if embedding and "magnitude" in leaves:
        total = merge_one(weight, {name: leaf for name, leaf in leaves.items() if name != "magnitude"})
        return leaves["magnitude"][None] / jnp.linalg.norm(total, axis=0, keepdims=True) * total
    total = merge_one(weight, leaves)
    return _replaced(total, leaves) if "trainable_tokens" in leaves else total


def _replaced(weight: Array, leaves: Mapping[str, Array]) -> Array:
    return jnp.asarray(weight).at[leaves["token_indices"]].set(leaves["trainable_tokens"].astype(weight.dtype))


def combine(adapters: Sequence[tree.Tree], weights: Sequence[float]) -> tuple[dict, int]:
    """One LoRA adapter whose change of each weight is the weighted sum of the given ones'.

    Ranks add up: A matrices are stacked, scales and weights go into B. PiSSA adapters count twice.

    Returns:
      (adapter tree, rank); its scale is 1 everywhere, so its alpha is its rank.

    Raises:
      ConfigError: DoRA, or modules trained in full, which don't add up.
    """
    modules: dict[str, list[tuple[Array, Array]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, leaves in _by_module(adapter).items():
            if not {"lora_A", "lora_B", "scale"} <= set(leaves) <= _PLAIN:
                raise ConfigError(f"only plain LoRA adapters can be combined; {path} holds {', '.join(sorted(leaves))}")
            low_A, low_B = lora.signed_factors(leaves)
            scale = jnp.asarray(leaves["scale"])
            scale = scale.reshape(scale.shape + (1,) * (low_B.ndim - scale.ndim))
            modules.setdefault(path, []).append((low_A, low_B * scale * weight))
    rank = max(sum(low_A.shape[-2] for low_A, _ in parts) for parts in modules.values())
    flat = {}
    for path, parts in modules.items():
        low_A = jnp.concatenate([low_A for low_A, _ in parts], axis=-2)
        low_B = jnp.concatenate([low_B for _, low_B in parts], axis=-1)
        missing = rank - low_A.shape[-2]
        pad = [(0, 0)] * (low_A.ndim - 2)
        flat[f"{path}/lora_A"] = jnp.pad(low_A, [*pad, (0, missing), (0, 0)])
        flat[f"{path}/lora_B"] = jnp.pad(low_B, [*pad, (0, 0), (0, missing)])
        flat[f"{path}/scale"] = jnp.ones(low_A.shape[:1] if low_A.ndim > 2 else (), jnp.float32)
    return tree.unflatten(flat), rank


def combined_spec(specs: Sequence[AdapterSpec], rank: int) -> AdapterSpec:
    """The spec of what `combine` returns, for adapters with the same targets."""
    first = specs[0]
    if any(spec.target_modules != first.target_modules for spec in specs):
        raise ConfigError("adapters with different target_modules can't be combined")
    return AdapterSpec(rank=rank, alpha=rank, target_modules=first.target_modules)


def _merged_weight(weight, leaves: Mapping[str, Array], dtype: jnp.dtype) -> Array:
    """Layer by layer, so that float32 exists for one layer at a time."""

    def one_layer(pair):
        weight, leaves = pair
        if isinstance(weight, Mapping):
            weight = nf4.dequantise(weight)
        return (merge_one(weight, leaves) if "lora_A" in leaves else weight).astype(dtype)

    return jax.jit(lambda pair: jax.lax.map(one_layer, pair))((weight, dict(leaves)))


def _by_module(collection: tree.Tree) -> dict[str, dict[str, Array]]:
    """`{module path: {leaf name: array}}`."""
    modules: dict[str, dict[str, Array]] = {}
    for path, leaf in tree.flatten(collection).items():
        module, _, name = path.rpartition("/")
        modules.setdefault(module, {})[name] = leaf
    return modules
