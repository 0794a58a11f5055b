"""Held-out loss: token-weighted, per source, per example."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from sftjax import compat
from sftjax.held_out import Evaluation
from sftjax.program import Program


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


def _to_host(array: jax.Array) -> np.ndarray:
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))
