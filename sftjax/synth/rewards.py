"""What an answer is worth: a scorer, a model's log-likelihood, or a reward model. All score many answers at once."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from sftjax import loading
from sftjax.data.encode import RowEncoder
from sftjax.data.types import RowError
from sftjax.score import score_samples
from sftjax.scorers.make import make_scorer, scorer_name
from sftjax.scorers.rows import messages_of
from sftjax.synth.reward_model import load_reward_model

Pair = tuple[Mapping[str, Any], str]  # a row (see scorers.rows), and an answer to it


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward by name.

    Attributes:
      score: pairs of row and answer -> a number for each; None where there is none (the text can't be encoded).
      fingerprint: of the function's file or the model's weights; "" for what comes with sftjax.
    """

    name: str
    score: Callable[[Sequence[Pair]], list[float | None]]
    fingerprint: str = ""


def make_reward(spec: str, *, dtype: str = "auto", allow_code: bool = False) -> Reward:
    """A reward from its name.

    Args:
      spec: `loglik:MODEL` (the mean log-probability a token that MODEL gives the answer), `reward_model:FOLDER` (an HF
        sequence-classification model with one label), or a scorer of `scorers.make.make_scorer` (`numeric`,
        `reasoning_gym`, `FILE.py:FUNCTION`, ...).
      dtype: of a model; "auto": float32 on a CPU, bfloat16 elsewhere.
      allow_code: see `make_scorer`.

    Raises:
      ConfigError: no such reward or model.
    """
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    kind, _, argument = spec.partition(":")
    if kind == "loglik" and argument:
        return _log_likelihood(spec, loading.load_model(argument, dtype=dtype))
    if kind == "reward_model" and argument:
        model = load_reward_model(argument, dtype)
        return Reward(spec, lambda pairs: model.score([_answered(*pair) for pair in pairs]), model.fingerprint)
    scorer = make_scorer(spec, allow_code=allow_code)
    own = Path(spec.rpartition(":")[0]) if ".py:" in spec else None
    fingerprint = hashlib.sha256(own.read_bytes()).hexdigest()[:16] if own else ""
    return Reward(scorer_name(spec), lambda pairs: [_finite(scorer(*pair)) for pair in pairs], fingerprint)


def _log_likelihood(name: str, model: loading.Model) -> Reward:
    encoder = RowEncoder(model.tokenizer, format="messages", train_on="last")

    def score(pairs: Sequence[Pair]) -> list[float | None]:
        samples, found = [], [None] * len(pairs)
        for number, pair in enumerate(pairs):
            try:
                samples += encoder({"messages": _answered(*pair)}, number)
            except RowError:
                continue
        for _, line in score_samples(model.config, model.runtime, model.variables, samples):
            if line["num_trained_tokens"]:
                found[line["index"]] = _finite(-line["nll"] / line["num_trained_tokens"])
        return found

    return Reward(name, score, model.opened.fingerprint())


def _answered(row: Mapping[str, Any], answer: str) -> list[dict[str, Any]]:
    return [*messages_of(row), {"role": "assistant", "content": answer}]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
