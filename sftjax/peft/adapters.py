"""Bottleneck adapters: a small two-layer network behind a block's attention and MLP.

    y = h + up(activation(down(h)))        down [size, D], up [D, size]

Houlsby (arXiv:1902.00751) puts one after attention and one after the MLP, Pfeiffer (arXiv:2005.00247) after the MLP
only. `h` is what the sublayer adds to the residual stream, after a post-norm if the model has one. `up` starts at zero,
so training starts from the base model's function.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sftjax import tree
from sftjax.kernels.linear import linear
from sftjax.peft.spec import AdapterSpec

Array = jax.Array
ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "tanh": jnp.tanh}


def apply(h: Array, adapter: Mapping[str, Mapping[str, Array]], activation: str = "relu") -> Array:
    """The adapter on `h [..., D]`.

    Args:
      adapter: `{"down": {"weight", "bias"}, "up": {"weight", "bias"}}` without the repeat axis; empty: none here.
    """
    if not adapter:
        return h
    inner = ACTIVATIONS[activation](_affine(h, adapter["down"]))
    return h + _affine(inner, adapter["up"])


def _affine(x: Array, leaves: Mapping[str, Array]) -> Array:
    bias = leaves["bias"].astype(x.dtype)
    return linear(x, leaves["weight"]) + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def init(rng: Array, params: tree.Tree, spec: AdapterSpec) -> dict[str, Array]:
    """`{path: leaf}`, float32: layers_<run>/<position>/<adapter_attn|adapter_mlp>/{down,up}/{weight,bias}."""
    places = ("adapter_attn", "adapter_mlp") if spec.method == "houlsby" else ("adapter_mlp",)
    flat = {}
    for block, repeat, width in _blocks(params):
        for place in places:
            path, size = f"{block}/{place}", spec.bottleneck_size
            key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
            down = jax.random.uniform(key, (repeat, size, width), minval=-1.0, maxval=1.0) / np.sqrt(width)
            flat[f"{path}/down/weight"] = down
            flat[f"{path}/down/bias"] = jnp.zeros((repeat, size))
            flat[f"{path}/up/weight"] = jnp.zeros((repeat, width, size))
            flat[f"{path}/up/bias"] = jnp.zeros((repeat, width))
    return flat


def _blocks(params: tree.Tree) -> list[tuple[str, int, int]]:
    """(path, repeat, width) of every block, the width taken from its norms."""
    found: dict[str, tuple[str, int, int]] = {}
    for path, leaf in tree.flatten(params).items():
        parts = path.split("/")
        if parts[0].startswith("layers_") and len(parts) == 4 and parts[2].endswith("_norm") and parts[3] == "weight":
            block = "/".join(parts[:2])
            found.setdefault(block, (block, leaf.shape[0], leaf.shape[-1]))
    return list(found.values())
