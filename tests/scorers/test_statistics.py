"""Figures of many answers."""

import math

import numpy as np

from sftjax.scorers.statistics import bootstrap_mean, describe, distinct, repeated


def answer(text, tokens=5, reason="stop"):
    return {"text": text, "num_tokens": tokens, "finish_reason": reason}


def test_describe():
    figures = describe(
        [answer("I am glad to help"), answer("I am glad to see you", 7), answer("No", 1), answer("", 60, "length")]
    )
    assert figures["count"] == 4 and figures["stop_rate"] == 0.75 and figures["empty"] == 0.25
    assert figures["mean_tokens"] == (5 + 7 + 1 + 60) / 4 and figures["mean_words"] == (5 + 6 + 1) / 4
    assert (figures["commonest_opening"], figures["commonest_opening_share"]) == ("I am glad to", 2 / 3)
    assert describe([]) == {"count": 0}
    assert describe([answer("", 0, "length")])["commonest_opening"] == ""


def test_repetition():
    assert repeated(["a", "b", "c", "d", "e", "f", "g", "h"]) == 0
    assert repeated(["a", "b", "c", "d", "a", "b", "c", "d"]) == 1 - 4 / 5  # abcd bcda cdab dabc | abcd again
    assert repeated(["x"] * 103) == 0.99 and repeated(["x"] * 4) == 0
    assert distinct([["a", "b"], ["a", "c"]], 1) == 3 / 4 and distinct([["a", "b"], ["a", "b"]], 2) == 0.5


def test_the_interval_of_a_mean_covers_it():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        mean, low, high = bootstrap_mean(rng.random(80) < 0.3, samples=400, seed=trial)
        assert low <= mean <= high
        covered += low <= 0.3 <= high
    assert 88 <= covered <= 100
    assert all(map(math.isnan, bootstrap_mean([]))) and bootstrap_mean([1.0]) == (1.0, 1.0, 1.0)
