"""What many answers have in common: whether they end, how long they are, whether they repeat themselves."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

OPENING_WORDS = 4


def describe(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of a set of answers.

    Args:
      answers: each with "text", "num_tokens" and "finish_reason" ("stop" or "length").

    Returns:
      count; stop_rate: share that ended by themselves; mean_tokens; mean_words; empty: share without a word;
      repeated_4grams: mean share of an answer's word 4-grams that it had before (0 for answers under five words);
      commonest_opening: the first words that most answers share, and commonest_opening_share (of answers with a word);
      distinct_1, distinct_2: different words and word pairs over all of them, in all answers.
    """
    if not answers:
        return {"count": 0}
    words = [answer["text"].split() for answer in answers]
    openings = collections.Counter(" ".join(each[:OPENING_WORDS]) for each in words if each)
    opening, count = min(openings.items(), key=lambda item: (-item[1], item[0])) if openings else ("", 0)
    return {
        "count": len(answers),
        "stop_rate": float(np.mean([answer["finish_reason"] == "stop" for answer in answers])),
        "mean_tokens": float(np.mean([answer["num_tokens"] for answer in answers])),
        "mean_words": float(np.mean([len(each) for each in words])),
        "empty": float(np.mean([not each for each in words])),
        "repeated_4grams": float(np.mean([repeated(each) for each in words])),
        "commonest_opening": opening,
        "commonest_opening_share": count / max(1, sum(openings.values())),
        "distinct_1": distinct(words, 1),
        "distinct_2": distinct(words, 2),
    }


def repeated(words: Sequence[str], n: int = 4) -> float:
    """The share of a text's n-grams that came before in it."""
    grams = [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams over all n-grams of all texts (distinct-n, arXiv:1510.03055); 0 without any."""
    grams = [tuple(words[place : place + n]) for words in texts for place in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def bootstrap_mean(values: Sequence[float], *, samples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """(mean, lower, upper): a mean and its 95 % interval, resampling rows."""
    array = np.asarray(values, np.float64)
    if not len(array):
        return float("nan"), float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = [array[rng.integers(0, len(array), len(array))].mean() for _ in range(samples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(array.mean()), float(low), float(high)
