"""Training on several sources with replayed text: shares, losses by source, interruption in the middle, processes."""

import itertools
import json
import subprocess
import time

import pytest

from sftjax.runlog import read_lines
from tests import tiny_run

FIELDS = {
    "train__max_steps": 0,
    "train__num_train_epochs": 1.0,
    "eval__eval_steps": 8,
    "eval__num_samples": 0,
    "data__eval_fraction": 0.0,
    "data__replay_share": 0.2,
    "data__shares_of": "tokens",
    "data__over_length": "split",
    "log__tensorboard": False,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    tiny_run.model(folder / "model")
    for seed, name in enumerate(("first", "second", "held_out")):
        tiny_run.conversations(folder / f"{name}.jsonl", count=60 if name != "held_out" else 8, seed=seed)
    words = tiny_run.WORDS
    texts = [" ".join(words[(7 * row + i) % len(words)] for i in range(30)) for row in range(40)]
    (folder / "plain.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def command(place, name, **fields):
    train = (
        {"path": str(place / "first.jsonl"), "name": "first", "proportion": 3.0},
        {
            "path": str(place / "second.jsonl"),
            "name": "second",
            "proportion": 1.0,
            "max_epochs": 2,
            "loss_weight": 0.5,
        },
    )
    mixed = {
        "data__train": train,
        "data__replay": ({"path": str(place / "plain.jsonl"), "name": "plain"},),
        "data__eval": (str(place / "held_out.jsonl"),),
        "eval__forgetting": (str(place / "plain.jsonl"),),
    }
    return tiny_run.command(place / "model", place / "first.jsonl", place / name, **{**FIELDS, **mixed, **fields})


@pytest.fixture(scope="module")
def unbroken(place):
    tiny_run.run(command(place, "unbroken"))
    return place / "unbroken"


def test_shares_are_kept_and_every_source_has_its_loss(unbroken):
    lines = [line for line in read_lines(str(unbroken / "metrics.jsonl")) if "loss" in line]
    last = lines[-1]
    tokens = {name: last[f"num_tokens/{name}"] for name in ("first", "second", "plain")}
    assert sum(tokens.values()) == last["num_tokens"]
    assert tokens["plain"] / last["num_tokens"] == pytest.approx(0.2, abs=0.05)
    assert tokens["first"] / tokens["second"] == pytest.approx(3, rel=0.35)
    for name in tokens:  # a step without a row of a source has no loss of it
        losses = [line[f"loss/{name}"] for line in lines if f"loss/{name}" in line]
        assert losses[-1] < losses[0] - 0.5
    for line in lines:  # the whole is between its parts (sums in float32)
        parts = [value for name, value in line.items() if name.startswith("loss/")]
        assert min(parts) - 1e-5 <= line["loss"] <= max(parts) + 1e-5


def test_killed_in_mid_mixture_it_goes_on_bit_for_bit(place, unbroken):
    line = command(place, "killed")
    process = subprocess.Popen(line, cwd=tiny_run.ROOT, env=tiny_run.environment(), stderr=subprocess.PIPE, text=True)
    while not (place / "killed" / "checkpoints" / "8").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert "continuing from step" in tiny_run.run(line).stdout
    assert (place / "killed" / "metrics.jsonl").read_text() == (unbroken / "metrics.jsonl").read_text()


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_that_prepare_the_data_change_nothing(place, unbroken, workers):
    tiny_run.run(command(place, f"workers{workers}", data__workers=workers, export__enabled=False))
    written = (place / f"workers{workers}" / "metrics.jsonl").read_text()
    assert written == (unbroken / "metrics.jsonl").read_text()


def test_a_curriculum_orders_the_rows(place):
    fields = {"data__curriculum": "length", "data__replay": (), "data__replay_share": 0.0}
    one = f"('{place / 'first.jsonl'}',)"
    fields |= {"data__packing": "none", "eval__eval_steps": 0, "data__train": one}
    tiny_run.run(command(place, "short-first", **fields, export__enabled=False, data__over_length="truncate"))
    lines = [line for line in read_lines(str(place / "short-first" / "metrics.jsonl")) if "loss" in line]
    each = [b["num_tokens"] - a["num_tokens"] for a, b in itertools.pairwise(lines)]
    assert sum(each[: len(each) // 2]) < 0.7 * sum(each[len(each) // 2 :])


def test_what_contradicts_itself_is_refused(place):
    done = tiny_run.run(command(place, "none", data__replay=()), code=78)
    assert "data.replay_share and data.replay need each other" in done.stderr
    train = ({"path": str(place / "first.jsonl"), "proportion": 1.0}, str(place / "second.jsonl"))
    done = tiny_run.run(command(place, "none", data__train=train), code=78)
    assert "proportion" in done.stderr and "every source" in done.stderr
