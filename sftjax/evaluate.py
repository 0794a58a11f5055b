"""Held-out loss: token-weighted, per source, per example; and how sure a difference is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from sftjax import compat
from sftjax.program import Program


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Sums per held-out example (N of them), in the order of the data.

    Attributes:
      keys: i64 [N, 3]: source, row, sample.
      nll: f64 [N], weighted sum in nats; weight: f64 [N]; trained, correct: i64 [N], tokens.
      source_names: by source number.
    """

    keys: np.ndarray
    nll: np.ndarray
    weight: np.ndarray
    trained: np.ndarray
    correct: np.ndarray
    source_names: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        return _ratio(self.nll.sum(), self.weight.sum())

    def metrics(self) -> dict[str, float]:
        """`eval_loss`, `eval_perplexity`, `eval_mean_token_accuracy`; the loss of each of several sources."""
        result = {
            "eval_loss": self.loss,
            "eval_perplexity": math.exp(min(self.loss, 700.0)),
            "eval_mean_token_accuracy": _ratio(self.correct.sum(), self.trained.sum()),
        }
        present = np.unique(self.keys[:, 0])
        if len(present) > 1:
            for source in present:
                chosen = self.keys[:, 0] == source
                result[f"eval_loss/{self.source_names[source]}"] = _ratio(
                    self.nll[chosen].sum(), self.weight[chosen].sum()
                )
        return result


def evaluate(program: Program, trainable, frozen, pipeline: Iterable, source_names: Sequence[str] = ()) -> Evaluation:
    """Runs over the held-out batches (`data.pipeline.Item`s with one micro-batch)."""
    totals: dict[tuple[int, int, int], np.ndarray] = {}
    for batch, _, info in pipeline:
        examples = info.examples[0]
        sums = compat.in_turn(program.eval_step(trainable, frozen, program.put(batch, info.rows, len(examples))))
        sums = {name: np.asarray(_to_host(value), np.float64) for name, value in sums.items()}
        for row, segments in enumerate(examples):
            for segment, key in enumerate(segments):
                new = np.array([sums[name][row, segment] for name in ("nll", "weight", "trained", "correct")])
                # An example that was split over rows is still one example.
                totals[tuple(key)] = totals.get(tuple(key), 0.0) + new
    keys = np.array(sorted(totals), np.int64).reshape(-1, 3)
    table = np.array([totals[tuple(key)] for key in keys]).reshape(-1, 4)
    return Evaluation(
        keys, table[:, 0], table[:, 1], table[:, 2].astype(np.int64), table[:, 3].astype(np.int64), tuple(source_names)
    )


def bootstrap_difference(
    before: Evaluation, after: Evaluation, *, samples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Change of the loss and its 95 % interval, resampling conversations (rows), not tokens.

    Returns:
      (after - before, lower, upper) in nats per token.
    """
    if not np.array_equal(before.keys, after.keys):
        raise ValueError("the two evaluations are of different examples")
    # Several samples of one row stand or fall together.
    _, row = np.unique(before.keys[:, :2], axis=0, return_inverse=True)
    count = int(row.max()) + 1
    change = np.bincount(row, after.nll - before.nll, count)
    weight = np.bincount(row, before.weight, count)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), samples)
    differences = (drawn @ change) / np.maximum(drawn @ weight, np.finfo(np.float64).tiny)
    low, high = np.quantile(differences, [0.025, 0.975])
    return _ratio(change.sum(), weight.sum()), float(low), float(high)


class Patience:
    """Early stopping: true once `patience` evaluations in a row brought no better loss."""

    def __init__(self, patience: int, best: float = math.inf, waited: int = 0):
        self.patience, self.best, self.waited = patience, best, waited

    def update(self, loss: float) -> bool:
        """Takes a new loss; says whether to stop."""
        if loss < self.best:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1
        return bool(self.patience) and self.waited >= self.patience

    def to_dict(self) -> dict[str, float]:
        return {"best": self.best, "waited": self.waited}


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator > 0 else math.nan


def _to_host(array: jax.Array) -> np.ndarray:
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))
