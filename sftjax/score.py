"""How surprised a model is by each training sample: the loss of training, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sftjax.data.types import RowError, Sample
from sftjax.models import decoder

TOKENS_PER_BATCH = 4096
BUCKET = 128


def score_samples(
    config, runtime: decoder.Runtime, variables, samples: list[Sample], *, per_token: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Scores samples, each alone in its row, in batches of similar length.

    Args:
      variables: the model, with its adapter if it has one.
      per_token: adds "tokens", "weights" and "token_nll" (nats; the first is None: nothing predicts it).

    Yields:
      (position in `samples`, {"index", "sample", "nll", "num_trained_tokens", "num_tokens"}), in no particular order.
    """

    @jax.jit
    def token_nll(variables, tokens, targets, weights, positions, segments):
        hidden, _ = decoder.hidden_states(config, runtime, variables, tokens, positions, segments)
        return decoder.token_loss(config, runtime, variables, hidden, targets, weights)[1]["nll"]

    for chosen, length in batches([len(sample.tokens) for sample in samples]):
        rows = max(1, TOKENS_PER_BATCH // length)  # a fixed number for each length, so that each compiles once
        shape = (rows, length)
        tokens, targets, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.full(shape, 2, np.int32)
        positions = np.zeros(shape, np.int32)
        for row, number in enumerate(chosen):
            ids = samples[number].tokens
            tokens[row, : len(ids)] = ids
            targets[row, : len(ids) - 1] = ids[1:]
            segments[row, : len(ids)] = 1
            positions[row, : len(ids)] = np.arange(len(ids))
            positions[row, len(ids) :] = np.arange(length - len(ids))
        # Weight 1 everywhere: each token's own loss is wanted; the samples' weights are applied here, in float64.
        nll = np.asarray(token_nll(variables, tokens, targets, jnp.ones(shape, jnp.float32), positions, segments))
        for row, number in enumerate(chosen):
            yield number, _line(samples[number], nll[row, : len(samples[number].tokens) - 1], per_token)


def _line(sample: Sample, nll: np.ndarray, per_token: bool) -> dict[str, Any]:
    weights = sample.weights.astype(np.float64)
    line = {
        "index": sample.index,
        "sample": sample.sample,
        "nll": float(np.sum(weights[1:] * nll)),
        "num_trained_tokens": int(np.count_nonzero(weights[1:])),
        "num_tokens": len(sample.tokens),
    }
    if per_token:
        line |= {
            "tokens": sample.tokens.tolist(),
            "weights": sample.weights.tolist(),
            "token_nll": [None, *map(float, nll)],
        }
    return line


def batches(lengths: list[int]) -> Iterator[tuple[list[int], int]]:
    """Numbers of samples that go together, with the padded length, long ones first (the largest memory at once)."""
    padded = [max(BUCKET, -(-length // BUCKET) * BUCKET) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda number: (-padded[number], number))
    while order:
        length = padded[order[0]]
        rows = max(1, TOKENS_PER_BATCH // length)
        batch = [number for number in order[:rows] if padded[number] == length]
        order = order[len(batch) :]
        yield batch, length


def encode_rows(source, encoder, *, limit: int | None = None) -> tuple[list[Sample], list[dict[str, Any]]]:
    """All rows of a source: (samples, error lines `{"row", "index", "error"}` of the rows that can't be used)."""
    samples, errors = [], []
    for index in range(len(source) if limit is None else min(limit, len(source))):
        try:
            samples += encoder(source[index], index)
        except RowError as error:
            errors.append({"row": source.location(index), "index": index, "error": str(error)})
    return samples, errors
