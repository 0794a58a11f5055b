"""Growing the vocabulary: rows of the embedding (and of the head) for tokens that a chat template adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sftjax import tree
from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig

VOCAB_LEAVES = ("embed_tokens/weight", "lm_head/weight")


def padded_size(size: int, multiple: int) -> int:
    """The next multiple, so that rows divide evenly over devices."""
    return -(-size // multiple) * multiple


def resize_vocab(
    params: Mapping[str, Any], config: ModelConfig, new_size: int, pad_multiple: int = 1
) -> tuple[dict[str, Any], ModelConfig]:
    """More tokens: new rows are the mean of the old ones, in float32, so that no new token stands out.

        [V, D] -> [padded_size(new_size, pad_multiple), D]; rows from `new_size` on are padding, and zero

    Tied heads stay tied (there is one leaf). Where there is padding, the result's `valid_vocab` counts the real
    tokens: loss and samplers leave padded rows out of the softmax, and an export doesn't write them.

    Raises:
      ConfigError: the vocabulary would shrink.
    """
    old = config.valid_vocab or config.vocab_size
    if new_size < old:
        raise ConfigError(f"the vocabulary can't shrink from {old} to {new_size}")
    rows = padded_size(new_size, pad_multiple)
    flat = dict(tree.flatten(params))
    for path in VOCAB_LEAVES:
        if path in flat:
            flat[path] = _grow(flat[path], old, new_size, rows)
    valid = new_size if rows > new_size else None
    return tree.unflatten(flat), config.replace(vocab_size=rows, valid_vocab=valid)


def start_at_mean(params: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """Rows `ids`, which the table has but no training ever touched, set to the mean of those before them, in float32.

    Like `resize_vocab` for new tokens that take rows which only filled up the table.
    """
    flat = dict(tree.flatten(params))
    for path in VOCAB_LEAVES:
        if path in flat:
            weight = flat[path]
            mean = jnp.mean(weight[: min(ids)], axis=0, keepdims=True, dtype=jnp.float32).astype(weight.dtype)
            flat[path] = weight.at[jnp.asarray(ids)].set(mean)
    return tree.unflatten(flat)


def untie(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with a head of its own, which is the same array as the embedding."""
    return dict(params) | {"lm_head": {"weight": params["embed_tokens"]["weight"]}}


def _grow(weight: jax.Array, old: int, new: int, rows: int) -> jax.Array:
    weight = weight[:old]
    mean = jnp.mean(weight, axis=0, keepdims=True, dtype=jnp.float32).astype(weight.dtype)
    added = jnp.broadcast_to(mean, (new - old, weight.shape[1]))
    padding = jnp.zeros((rows - new, weight.shape[1]), weight.dtype)
    return jnp.concatenate([weight, added, padding])
