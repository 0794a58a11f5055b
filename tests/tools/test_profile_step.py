"""The profile of a step: time booked once and on the right part, and the tool on a real run."""

from __future__ import annotations

import json
import os
import sys

import pytest

from sftjax import step_profile
from tests import tiny_run

LAYER = "jit(train_step)/transpose(jvp(Decoder))/while/body/closed_call/checkpoint/rematted_computation/layers_0/0"


def event(name, start, length, thread=1, **more):
    return {"name": name, "pid": 0, "tid": thread, "ts": start, "dur": length, **more}


def test_an_operation_counts_without_those_inside_of_it():
    #   while  |----------------------|      dot   on another thread |--|
    #     dot    |----|  |------|
    #       add            |--|
    events = [
        event("add", 60e6, 10e6),
        event("while", 0, 100e6),
        event("dot", 10e6, 20e6),
        event("dot", 50e6, 30e6),
        event("kernel", 120e6, 5e6, thread=2, args={"hlo_op": "dot"}),
    ]
    assert step_profile.self_seconds(events) == pytest.approx({"while": 50, "dot": 45, "add": 10})


@pytest.mark.parametrize(
    "path, part",
    [
        (f"{LAYER}/0.mlp/mlp/up_proj/cond/branch_0_fun/dot_general", "projections"),
        (f"{LAYER}/0.mlp/mlp/jit(silu)", "projections"),
        (f"{LAYER}/self_attn/self_attn.project/q_proj/dot_general", "projections"),
        (f"{LAYER}/self_attn/cond/branch_0_fun/while/body/exp", "attention"),
        (f"{LAYER}/input_layernorm/mul", "norms"),
        (f"{LAYER}/add", "the layers' rest"),
        ("jit(train_step)/jvp()/while/body/closed_call/dot_general", "head and loss"),
        ("jit(train_step)/mul", "optimizer"),
    ],
)
def test_the_part_that_a_path_names(path, part):
    assert step_profile.part_of(path) == part


def test_seconds_of_a_step_by_part():
    seconds = {"fusion.1": 4.0, "fusion.2": 1.0, "copy": 2.0, "python": 50.0}
    scopes = {
        "fusion.1": f"{LAYER}/q_proj/dot_general",
        "fusion.2": f"{LAYER}/q_proj/mul",
        "copy": "jit(train_step)/mul",
    }
    assert step_profile.add_up(seconds, {**scopes, "never": "jit(train_step)/add"}, steps=2) == [
        {"part": "projections", "products": 2.0, "other": 0.5},
        {"part": "optimizer", "products": 0.0, "other": 1.0},
    ]


def test_the_tool_on_a_run_as_it_would_begin(tmp_path):
    model, data = tiny_run.model(tmp_path / "model"), tiny_run.conversations(tmp_path / "chats.jsonl")
    command = tiny_run.command(model, data, tmp_path / "run", data__eval_fraction=0.0)
    line = [sys.executable, "tools/profile_step.py", *command[3:], "--steps=2", f"--out={tmp_path / 'out.json'}"]
    done = tiny_run.run(line)
    result = json.loads((tmp_path / "out.json").read_text())
    parts = {row["part"]: row["products"] + row["other"] for row in result["parts"]}
    assert {"projections", "attention", "norms", "head and loss", "optimizer"} <= set(parts)
    assert min(parts.values()) >= 0
    beside_each_other = os.cpu_count()
    assert 0.2 < sum(parts.values()) / result["traced_step_seconds"] <= 1.05 * beside_each_other
    assert "| projections |" in done.stdout and f"MFU {result['mfu']:.0%}" in done.stdout
    matmuls = (
        2 * ((2 * 64 * 64 + 2 * 64 * 32) + 3 * 64 * 96)
        + 64 * json.loads((model / "config.json").read_text())["vocab_size"]
    )
    attention = result["model_flops"] / result["real_tokens"] - 6 * matmuls
    assert 0 < attention < 12 * 2 * 64 * 128 / 2  # every parameter is trained; segments are shorter than the row
    assert not (tmp_path / "run").exists()
