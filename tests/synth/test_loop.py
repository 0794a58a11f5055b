"""The experiment's parts; all of it on a tiny model is slow."""

import sys

import numpy as np
import pytest

from sftjax.errors import ConfigError
from sftjax.synth import loop
from tests import tiny_run

WHY = "the tasks are reasoning-gym's (extra eval)"
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_wilson_s_interval():
    # p = 0.5 of 100: 0.4038 to 0.5962; none of 10: 0 to 0.2775 (Newcombe 1998's method 3)
    assert loop.wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert loop.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)


def stage(right):
    return {"right": right, "accuracy": float(np.mean(right)), "interval": loop.wilson(sum(right), len(right))}


def test_gains_are_of_the_same_items():
    before, first, second = [False] * 4, [True, False, False, False], [True, True, False, False]
    seeds = [{"before": stage(before), "first": stage(first), "second": stage(second)}] * 2
    gains = loop._gains(seeds)
    assert gains["SFT"]["mean"] == gains["best of N"]["mean"] == 0.25
    assert gains["SFT"]["low"] <= 0.25 <= gains["SFT"]["high"] and set(gains) == {"SFT", "best of N"}


def test_the_table_has_a_row_for_each_seed_and_the_mean():
    stages = {"before": stage([False, False]), "first": stage([True, False]), "second": stage([True, True])}
    seeds = [{"seed": seed, **stages, "rejection": {"kept": 3, "prompts": 4}} for seed in (0, 1)]
    lines = list(loop.table({"seeds": seeds, "gains": loop._gains(seeds)}))
    assert lines[0] == "| seed | before | after SFT | after best of N, SFT again | prompts with a verified answer |"
    assert lines[2].startswith("| 0 | 0.0% (0.0% to 65.8%) | 50.0% (") and lines[2].endswith("| 3 of 4 |")
    assert lines[4] == "| mean | 0.0% | 50.0% | 100.0% | |"
    assert {line.count("|") for line in lines[:5]} == {6}
    assert lines[6] == "- SFT: +50.0 points (+0.0 to +100.0)"


def settings(folder, model="", **changes):
    return loop.Settings(model=str(model), output=str(folder), task_settings=SUMS, system="Add.", **changes)


def test_items_are_disjoint_and_made_from_their_seed(tmp_path):
    pytest.importorskip("reasoning_gym", reason=WHY)
    held_out = loop.make_items(settings(tmp_path), loop.HELD_OUT_SEED, 50, set())
    questions = {item["question"] for item in held_out}
    train = loop.make_items(settings(tmp_path), 1, 60, questions)
    assert len(questions) == 50 and len({item["question"] for item in train} - questions) == 60
    assert train == loop.make_items(settings(tmp_path), 1, 60, questions)
    assert train[0]["messages"][0] == {"role": "system", "content": "Add."}
    other = loop.make_items(settings(tmp_path), 1 + loop.SEED_DISTANCE, 60, questions)
    assert len({item["question"] for item in train + other}) > 80, "other seeds draw other items, of 360 or so"
    with pytest.raises(ConfigError, match="different items"):
        loop.make_items(settings(tmp_path), 1, 1000, questions)
    with pytest.raises(ConfigError, match="no_such_task"):
        loop.make_items(settings(tmp_path, task="no_such_task"), 1, 5, set())


@pytest.mark.nightly
def test_the_whole_loop_on_a_tiny_model(tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym", reason=WHY)
    model = tiny_run.model(tmp_path / "m")
    command = [
        sys.executable, "tools/improve.py", "--model", str(model), "--output", str(tmp_path / "out"), "--seeds", "0",
        "--held_out", "20", "--first", "40", "--second", "20", "--n", "8", "--temperature", "1", "--control",
        "--task_settings", '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}',
        "--max_new_tokens", "8", "--train=--config.model.compute_dtype=float32",
        "--train=--config.train.learning_rate=3e-3", "--train=--config.train.num_train_epochs=8.0",
    ]  # fmt: skip
    first = tiny_run.run(command, timeout=900)
    assert "| mean |" in first.stdout
    again = tiny_run.run(command, timeout=300)
    assert again.stdout == first.stdout, "all of it was kept"
    assert (tmp_path / "out" / "improve.md").read_text() == first.stdout
