"""How far a model has moved from its base: KL over the whole vocabulary, at answer tokens of held-out samples.

KL(base || model) at places that the base's own data would lead to says how much of what the base would have said is now
unlikely; it grows with forgetting. The base may be gone by the time it is wanted (its weights are being trained), so
its log-probabilities are computed once and kept: `[N, V]` float32, 200 kB a token at 50,000 tokens of vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sftjax.models import decoder

PER_SAMPLE = 32  # tokens of one sample at most, so that a few long ones aren't all that is looked at
_LENGTH = 128  # padded lengths are multiples of this


def places(samples: Sequence[Any], tokens: int, max_length: int = 2048) -> list[tuple[int, np.ndarray]]:
    """Which tokens are looked at: (number of the sample, positions before its first trained tokens), `tokens` in all.

    Args:
      samples: `data.types.Sample`s.
      max_length: they are looked at so far.
    """
    chosen, left = [], tokens
    for number, sample in enumerate(samples):
        if left <= 0:
            break
        trained = np.flatnonzero(sample.weights[1:max_length] > 0)[: min(PER_SAMPLE, left)]
        if len(trained):
            chosen.append((number, trained))
            left -= len(trained)
    return chosen


def log_probabilities(
    config, runtime: decoder.Runtime, variables, samples: Sequence[Any], tokens: int, *, max_length: int = 2048
) -> np.ndarray:
    """f32 `[N, V]`: log-probabilities of the next token at `places`; N is `tokens` or fewer.

    Sharded models give it to every process whole.
    """
    runtime = runtime.replace(remat="none")
    parts = []
    for number, where in places(samples, tokens, max_length):
        ids = samples[number].tokens[:max_length]
        padded = np.zeros((1, -(-len(ids) // _LENGTH) * _LENGTH), np.int32)
        padded[0, : len(ids)] = ids  # what is behind doesn't change what is before
        at = np.zeros(PER_SAMPLE, np.int32)
        at[: len(where)] = where
        parts.append(np.asarray(_compute(config, runtime, variables, padded, at))[: len(where)])
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compute(config, runtime, variables, tokens_1xL, where):
    positions = jnp.arange(tokens_1xL.shape[1], dtype=jnp.int32)[None]
    hidden, _ = decoder.hidden_states(config, runtime, variables, tokens_1xL, positions, jnp.ones_like(tokens_1xL))
    logits = decoder.logits(config, runtime, variables, hidden[0, where])[:, : config.valid_vocab or config.vocab_size]
    return runtime.constrain(jax.nn.log_softmax(logits, axis=-1), None, None)


def kl(base_NxV: np.ndarray, model_NxV: np.ndarray) -> float:
    """Mean KL(base || model) over N places, in nats; NaN without any.

    Where the model's vocabulary has grown, its distribution over the base's tokens is compared.
    """
    if not len(base_NxV):
        return float("nan")
    total = 0.0
    for first, second in zip(base_NxV, model_NxV, strict=True):
        count = min(len(first), len(second))
        first, second = _over(first[:count]), _over(second[:count])
        total += float(np.sum(np.exp(first) * (first - second)))
    return total / len(base_NxV)


def _over(log_probabilities: np.ndarray) -> Any:
    """Normalised, in float64."""
    values = log_probabilities.astype(np.float64)
    return values - (np.log(np.sum(np.exp(values - values.max()))) + values.max())
