"""Sums for each held-out example, the files that keep them, and how sure a difference is.

Whoever says that a held-out loss fell or rose (the end of a run, its report, the doctor) asks `Difference`: one test.
"""

from __future__ import annotations

import dataclasses
import math
from typing import BinaryIO, NamedTuple

import numpy as np


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

    def of_source(self, name: str) -> Evaluation:
        """The examples of one source."""
        chosen = self.keys[:, 0] == self.source_names.index(name)
        columns = (self.keys, self.nll, self.weight, self.trained, self.correct)
        return Evaluation(*(column[chosen] for column in columns), self.source_names)

    def save(self, file: BinaryIO) -> None:
        """Writes it as an `.npz` file."""
        np.savez(file, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})


def load(file: BinaryIO | str) -> Evaluation:
    """What `Evaluation.save` wrote.

    Raises:
      OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile: it isn't there, or not whole.
    """
    with np.load(file, allow_pickle=False) as arrays:
        values = {name: arrays[name] for name in arrays.files}
    return Evaluation(**{**values, "source_names": tuple(values["source_names"].tolist())})


class Difference(NamedTuple):
    """A loss before and after, and the 95 % interval of after - before, in nats per token."""

    before: float
    after: float
    low: float
    high: float

    @property
    def fell(self) -> bool:
        return self.high < 0

    @property
    def rose(self) -> bool:
        return self.low > 0

    def __str__(self) -> str:
        sure = "; chance alone would do that" if self.low <= 0 <= self.high else ""
        return f"{self.after - self.before:+.4f}, 95 % interval {self.low:+.4f} to {self.high:+.4f}{sure}"


def compare(before: Evaluation, after: Evaluation) -> Difference:
    """Both losses, and the interval of `bootstrap_difference`."""
    _, low, high = bootstrap_difference(before, after)
    return Difference(before.loss, after.loss, low, high)


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


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator > 0 else math.nan
