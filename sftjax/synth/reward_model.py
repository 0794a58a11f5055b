"""Reward models: an HF `...ForSequenceClassification` with one label, run in the decoder that everything else runs in.

    conversation -> chat template -> decoder -> hidden state of the last token . score.weight [1, D] -> reward

Source of the pooling: transformers' `GenericForSequenceClassification` (the last token that isn't padding).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sftjax import loading
from sftjax.data.tokenizer import Tokenizer
from sftjax.errors import ConfigError
from sftjax.generate.sample import encode_conversation
from sftjax.models import decoder
from sftjax.models.config import ModelConfig
from sftjax.score import TOKENS_PER_BATCH, batches
from sftjax.weights import classifier


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A decoder and the head over its last hidden state; `head` is `[1, D]`, float32."""

    config: ModelConfig
    runtime: decoder.Runtime
    variables: Mapping[str, Any]
    head: jax.Array
    tokenizer: Tokenizer
    fingerprint: str

    def score(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
        """The reward of each conversation, which ends with the answer that is judged."""
        encoded = [encode_conversation(self.tokenizer, each, generation=False) for each in conversations]
        rewards = np.zeros(len(encoded))
        for chosen, length in batches([len(ids) for ids in encoded]):
            shape = (max(1, TOKENS_PER_BATCH // length), length)
            tokens, last = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
            for row, number in enumerate(chosen):
                tokens[row, : len(encoded[number])] = encoded[number]
                last[row] = len(encoded[number]) - 1
            found = _rewards(self.config, self.runtime, self.variables, self.head, tokens, last)
            rewards[chosen] = np.asarray(found)[: len(chosen)]
        return rewards.tolist()


def _rewards_of(config, runtime, variables, head, tokens_BxL, last_B):
    """f32 `[B]`. Padding stands behind the last token, where causal attention doesn't see it."""
    segments = jnp.where(jnp.arange(tokens_BxL.shape[1])[None] <= last_B[:, None], 1, 2)
    places = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1], dtype=jnp.int32)[None], tokens_BxL.shape)
    positions = jnp.where(segments == 1, places, places - last_B[:, None] - 1)
    hidden, _ = decoder.hidden_states(config, runtime, variables, tokens_BxL, positions, segments)
    pooled = jnp.take_along_axis(hidden, last_B[:, None, None], axis=1)[:, 0].astype(jnp.float32)
    return jnp.einsum("BD,D->B", pooled, head[0])


_rewards = jax.jit(_rewards_of, static_argnums=(0, 1))


def load_reward_model(path: str, dtype: str = "float32") -> RewardModel:
    """Opens and loads a reward model.

    Raises:
      ConfigError: not a sequence-classification model, or one with several labels.
    """
    opened = loading.open_model(path)
    opened.tokenizer.require_template()
    config, params, head = classifier.load_classifier(opened.files, dtype)
    if head.shape[0] != 1:
        raise ConfigError(f"{path}: the head has {head.shape[0]} labels; a reward model has one")
    runtime = decoder.Runtime(compute_dtype=dtype, remat="none")
    fingerprint = classifier.fingerprint(opened.files)
    return RewardModel(config, runtime, {"params": params}, head, opened.tokenizer, fingerprint)
