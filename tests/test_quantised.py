"""Training beside a quantised base, as a user runs it: resume, devices, export, and merging into either base."""

from __future__ import annotations

import json
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from sftjax import loading, tree
from sftjax.kernels import nf4
from sftjax.weights import hf
from tests import tiny_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    tiny_run.model(folder / "model", intermediate_size=128)  # rows of whole blocks of 64
    tiny_run.conversations(folder / "chats.jsonl")
    return folder


BASE = {
    "peft__method": "lora",
    "peft__quantization": "nf4",
    "peft__r": 4,
    "model__frozen_dtype": "float32",
    "train__batch_size": 8,
    "train__max_steps": 6,
    "train__learning_rate": 1e-2,
    "checkpoint__save_steps": 3,
    "data__eval_fraction": 0.0,
    "export__dtype": "float32",
}


def run(place, name, devices=1, **fields):
    arguments = tiny_run.command(place / "model", place / "chats.jsonl", place / name, **{**BASE, **fields})
    return tiny_run.run(arguments, devices=devices)


def curve(place, name):
    return [line["loss"] for line in tiny_run.lines(place / name / "metrics.jsonl") if "loss" in line]


def verification(place, name):
    return json.loads((place / name / "verification.json").read_text())


@pytest.fixture(scope="module")
def qlora(place):
    done = run(place, "nf4")
    # weights, not bytes: 2 tables of 912 x 64, 2 layers of 36,992, a norm
    assert "beside 190,784 in the base" in done.stdout
    return place / "nf4"


def test_nf4_trains_and_its_adapter_loads_on_the_plain_base(place, qlora):
    losses = curve(place, "nf4")
    assert losses[-1] < losses[0] - 0.05
    assert verification(place, "nf4")["passed"]
    loaded = loading.load_model(str(place / "model"), adapter=str(qlora / "export"))
    assert "lora_A" in loaded.variables["adapter"]["layers_0"]["0"]["self_attn"]["q_proj"]


def test_a_continued_run_quantises_the_base_again_and_ends_the_same(place, qlora):
    shutil.copytree(qlora, place / "again")
    (place / "again" / "summary.json").unlink()
    shutil.rmtree(place / "again" / "export")
    shutil.rmtree(place / "again" / "checkpoints" / "6")
    assert "continuing from step 3" in run(place, "again").stdout
    assert curve(place, "again") == curve(place, "nf4")
    first, second = (place / name / "export" / "adapter_model.safetensors" for name in ("nf4", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.nightly  # two more runs; tests/test_step.py has the same for one step's program
def test_eight_devices_follow_one(place, qlora):
    run(place, "spread", devices=8, mesh__tensor=2, data__packing="none", model__remat="none", export__enabled=False)
    run(place, "alone", data__packing="none", export__enabled=False)
    np.testing.assert_allclose(curve(place, "spread"), curve(place, "alone"), rtol=1e-4)


@pytest.mark.parametrize(
    ("into", "method"), [("dequantized", "dora"), pytest.param("original", "lora", marks=pytest.mark.nightly)]
)
def test_merged_into_either_base_and_said_so(place, into, method):
    name = f"merged-{into}"
    done = run(place, name, export__merge=True, export__merge_into=into, peft__method=method)
    figures, export = verification(place, name), place / name / "export"
    assert figures["passed"] and "nf4" in figures["merged_into"] and figures["merged_into"] in done.stdout
    assert figures["merged_into"] in (export / "README.md").read_text()
    files = hf.open_model(place / "model")
    base = tree.flatten(hf.load_params(files, files.config, jnp.float32))
    merged = tree.flatten(hf.load_params(export, hf.load_config(export), jnp.float32))
    path = "layers_0/0/mlp/up_proj/weight"
    rounded = nf4.dequantise(nf4.quantise(base[path]))
    error = float(jnp.abs(rounded - base[path]).max())
    if into == "dequantized":  # what was trained, to rounding
        assert figures["rounding"]["max_relative_difference"] < 1e-4
    else:
        assert figures["rounding"]["max_relative_difference"] > 1e-3
        np.testing.assert_array_equal(merged["norm/weight"], base["norm/weight"])
        change = np.asarray(merged[path] - base[path])
        assert np.linalg.matrix_rank(change[0], tol=error / 10) == 4  # a LoRA on the original, no rounding in it
    convert = [sys.executable, "tools/convert.py", "--from", str(place / name), "--to", str(place / f"{name}-c")]
    tiny_run.run(convert)
    again = tree.flatten(hf.load_params(place / f"{name}-c", hf.load_config(export), jnp.float32))
    for key, leaf in merged.items():
        np.testing.assert_allclose(again[key], leaf, rtol=1e-6, atol=1e-6, err_msg=key)


def test_what_cannot_be_quantised_or_exported_is_refused_at_once(place, tmp_path):
    narrow = tiny_run.model(tmp_path / "narrow")  # 96 wide
    arguments = tiny_run.command(narrow, place / "chats.jsonl", tmp_path / "a", **BASE)
    assert "use int8" in tiny_run.run(arguments, code=78).stderr
    arguments = tiny_run.command(narrow, place / "chats.jsonl", tmp_path / "b", peft__quantization="int8")
    assert "choose a peft.method" in tiny_run.run(arguments, code=78).stderr
