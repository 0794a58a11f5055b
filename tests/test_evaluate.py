"""Held-out figures: one ratio over everything, and an interval over conversations."""

import numpy as np

from sftjax.evaluate import Patience
from sftjax.held_out import Evaluation, bootstrap_difference


def evaluation(nll, weight, source=None, names=("a", "b")):
    count = len(nll)
    source = np.zeros(count, np.int64) if source is None else np.array(source)
    keys = np.stack([source, np.arange(count), np.zeros(count, np.int64)], 1)
    tokens = np.array(weight, np.int64)
    return Evaluation(keys, np.array(nll, float), np.array(weight, float), tokens, tokens // 2, names)


def test_the_loss_is_a_ratio_of_sums_not_a_mean_of_means():
    # 5 tokens at 4.0 nats and 1000 tokens at 1.0: (20 + 1000) / 1005
    metrics = evaluation([20.0, 1000.0], [5, 1000], source=[0, 1]).metrics()
    assert metrics["eval_loss"] == 1020 / 1005
    assert metrics["eval_loss/a"] == 4.0 and metrics["eval_loss/b"] == 1.0
    assert metrics["eval_mean_token_accuracy"] == 502 / 1005


def test_bootstrap_covers_the_true_difference_and_keeps_rows_together():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        weight = rng.integers(5, 60, 80)
        before = evaluation(weight * 2.0, weight)
        after = evaluation(weight * (1.9 + 0.3 * rng.standard_normal(80)), weight)
        difference, low, high = bootstrap_difference(before, after, samples=400, seed=trial)
        assert low <= difference <= high
        covered += low <= -0.1 <= high
    assert 180 <= covered <= 200  # 95 % of 200, give or take three standard deviations

    single = Evaluation(np.array([[0, 0, 0], [0, 0, 1]]), np.ones(2), np.ones(2), np.ones(2, int), np.ones(2, int))
    moved = Evaluation(single.keys, np.array([0.0, 3.0]), single.weight, single.trained, single.correct)
    assert bootstrap_difference(single, moved) == (0.5, 0.5, 0.5)  # one conversation: nothing to resample


def test_patience_counts_evaluations_without_a_better_loss():
    patience = Patience(2)
    assert [patience.update(loss) for loss in (3.0, 2.0, 2.5, 1.9, 2.0, 1.95)] == [False] * 5 + [True]
    resumed = Patience(2, **{"best": 1.9, "waited": 1})
    assert resumed.update(2.0)
    assert not any(Patience(0).update(1.0) for _ in range(9))
