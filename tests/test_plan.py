"""The plan: its rules against worked examples, its predictions against what is measured, its tool as a user runs it."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sftjax import config as config_lib
from sftjax import costs, hardware, hlo, plan, plan_fit, plan_scaling, plan_search, topology
from sftjax.errors import ConfigError
from tests.measured_step import MODEL

ROOT = Path(__file__).resolve().parents[1]
SMALL = {**MODEL, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SMALL))
    return folder


def small_config(folder, **fields):
    config = config_lib.defaults()
    config.model.path = str(folder)
    config.data.train = ("unread.jsonl",)
    config.data.max_length = 128
    for path, value in fields.items():
        group, field = path.split("__")
        config[group][field] = value
    return config


def stand_in(count=1, chip="h100"):
    """A target of CPU devices under another chip's name: nothing is compiled for it."""
    return topology.Target(
        f"{chip}:{count}", hardware.CHIPS[chip].platform, hardware.CHIPS[chip], jax.devices()[:count], False
    )


# --- arithmetic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "method", "length", "expected"),
    [
        # worked by hand: 6 (or 4) N + 6 layers width context, N without the embedding; in GFLOP a token
        ("Llama-2-7b", "none", 2048, 41.25),
        ("Llama-2-7b", "none", 4096, 42.86),
        ("Llama-3-8B", "none", 8192, 51.47),
        ("Llama-3-8B", "lora", 4096, 33.49),
    ],
)
def test_flops_of_known_models(model, method, length, expected):
    config = small_config(f"meta-llama/{model}", data__max_length=length, peft__method=method)
    step = plan.settle(config, stand_in(8))
    assert costs.model_flops(step.program, length) / 1e9 == pytest.approx(expected, abs=0.01)


def test_a_sliding_window_bounds_attention(folder):
    config = plan.read_model("mistralai/Mistral-7B-v0.1")
    full = costs.attention_flops(config.replace(layers=tuple(s.__class__(rope=s.rope) for s in config.layers)), 32768)
    windowed = costs.attention_flops(config, 32768)
    assert windowed / full == pytest.approx(2 * 4096 * (1 - 4096 / 65536) / 32768)
    assert costs.attention_flops(config, 4096) == 6 * 32 * 32 * 128 * 4096


def test_recomputation_costs_what_the_policy_leaves_out(folder):
    def cost(remat):
        return costs.recomputed_flops(plan.settle(small_config(folder, model__remat=remat), stand_in(8)).program, 128)

    assert cost("none") == 0 < cost("dots") < cost("attention") < cost("full")
    assert cost("full") == cost("dots") + cost("attention")


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["none", "lora"])
def test_predicted_peak_is_what_a_process_uses(method):
    """Arguments + outputs - aliases + temporaries, against the rise in resident memory."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # freed blocks are given back
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.measured_step", method],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["measured"] == pytest.approx(found["predicted"], rel=0.1)


@pytest.mark.parametrize("method", ["none", "lora"])
def test_what_is_held_between_steps_is_exact(folder, method):
    config = small_config(folder, peft__method=method, train__batch_size=8)
    target = topology.Target("cpu:8", "cpu", None, jax.devices()[:8], True)
    result = plan.make(config, target)
    estimate, compiled = result["estimate"], result["compiled"]["bytes"]
    batch_and_counters = (
        5 * 4 * 128 + 2 * 4 + 2 * 4
    )  # a row of five arrays; step, skipped steps, the optimizer's counts
    held = estimate["trained"] + estimate["optimizer"] + estimate["frozen"]
    assert compiled["arguments"] == pytest.approx(held + batch_and_counters, abs=64)


def test_memory_by_rule_follows_the_settings(folder):
    def peak(devices=1, **fields):
        return plan.settle(small_config(folder, train__batch_size=64, **fields), stand_in(devices)).memory().peak

    whole = peak()
    assert peak(devices=8) < whole / 4
    assert peak(train__gradient_accumulation_steps=4) < whole
    assert peak(model__remat="none") > whole
    assert peak(peft__method="lora") < whole


# --- reading compiled programs -------------------------------------------------------------------------------------

TEXT = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (x: f32[8,16]) -> f32[2,16] {
  %all-reduce.9 = f32[8,16]{1,0} all-reduce(%x), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
}

%start (p: bf16[2,16]) -> bf16[8,16] {
  %all-gather.1 = bf16[8,16]{1,0} all-gather(%p), channel_id=1, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
}

%body (s: (s32[], f32[2,16])) -> (s32[], f32[2,16]) {
  %fusion.1 = bf16[8,16]{1,0} fusion(%q), kind=kCustom, calls=%start, metadata={op_name="step/layer"}
  %all-gather.2 = bf16[8,16]{1,0} all-gather(%q), channel_id=1, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
  %fusion.2 = f32[2,16]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}

%condition (s: (s32[], f32[2,16])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(32)
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

%windowed_body (s: (f32[4], u32[])) -> (f32[4], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %collective-permute-start = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%a), channel_id=7
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %tuple = (f32[4]{0}, u32[]) tuple(%b, %next)
}

%windowed_condition (s: (f32[4], u32[])) -> pred[] {
  %constant.2 = u32[]{:T(128)} constant(8)
  %i = u32[]{:T(128)} get-tuple-element(%s), index=1
  ROOT %lt = pred[] compare(%i, %constant.2), direction=LT
}

ENTRY %main (p: f32[2,16]) -> f32[] {
  %while.1 = (s32[], f32[2,16]{1,0}) while(%t), condition=%condition, body=%body
  %while.2 = (f32[4], u32[]) while(%u), condition=%windowed_condition, body=%windowed_body
  %splash_mha_fwd.3 = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call"
  %all-reduce.2 = (f32[16]{0}, f32[4]{0}) all-reduce(%x, %y), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %all-reduce.3 = f32[] all-reduce(%z), replica_groups={{0}}, to_apply=%add
}
"""


def test_collectives_count_once_a_channel_and_once_a_turn():
    found = {(one.kind, one.times): one for one in hlo.collectives(TEXT, 8)}
    assert set(found) == {("all-gather", 32), ("reduce-scatter", 32), ("all-reduce", 1), ("collective-permute", 4)}
    assert found["collective-permute", 4].received == 4 * 4 * 4
    gather, scatter = found["all-gather", 32], found["reduce-scatter", 32]
    assert (gather.arrays, gather.devices) == ((("bf16", (8, 16)),), 4)
    assert gather.received == 8 * 16 * 2 * 3 / 4 * 32
    assert (scatter.devices, scatter.received) == (4, 8 * 16 * 4 * 3 / 4 * 32)
    assert found["all-reduce", 1].received == 2 * (16 + 4) * 4 / 2
    assert hlo.kernels(TEXT) == ["splash_mha_fwd"]


def test_collectives_of_a_real_program():
    """Eight devices sum what each has, in a loop of five turns."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def turn(x, _):
        return x / jnp.sum(x), None

    def step(x):
        return jax.lax.scan(turn, x, None, 5)[0]

    abstract = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=cut)
    found = hlo.collectives(jax.jit(step, out_shardings=whole).lower(abstract).compile().as_text(), 8)
    assert [(one.times, one.arrays) for one in found if one.kind == "all-reduce"] == [(5, (("f32", ()),))]
    assert all(one.devices == 8 for one in found)


# --- targets -------------------------------------------------------------------------------------------------------


def test_unknown_targets_are_answered_with_the_known():
    for name in ("v9:2x2", "v4:2x2x1", "h100:0", "cpu:x"):
        with pytest.raises(ConfigError, match="--topology="):
            topology.find(name)


def test_tpus_need_libtpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sftjax\[tpu\]"):
        topology.find("v5e:2x4")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x"), ("Tesla T4", "t4"),
        ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA L40S", "l40s"), ("NVIDIA L4", "l4"), ("NVIDIA RTX A6000", "a6000"),
    ],
)  # fmt: skip
def test_devices_by_the_kind_that_jax_gives(kind, name):
    assert hardware.find(kind).name == name


def test_an_unknown_device_has_no_figures():
    assert hardware.find("cpu") is None


# --- the whole plan ------------------------------------------------------------------------------------------------


def test_hours_and_cost_come_from_the_ledger(folder):
    preflight = {"tokens_to_come": 1_000_000, "packing_efficiency": 0.5, "length": {"mean": 64.0}}
    result = plan.make(small_config(folder, train__batch_size=8), stand_in(8), preflight=preflight, price=2.0)
    assert result["data"]["steps"] == 1954  # 1,000,000 / (8 * 128 / 2), rounded up
    assert result["data"]["hours"] == pytest.approx(1954 * result["floor"]["step_seconds"] / 3600)
    assert result["cost"] == pytest.approx(result["data"]["hours"] * 16)
    assert result["flops"]["context"] == 64
    assert result["memory"]["source"] == "estimated"
    text = plan.describe(result)
    assert "not measured" in text and "by rule" in text


def test_search_prefers_what_needs_no_exchange(folder):
    config = small_config(folder, train__batch_size=8, train__gradient_accumulation_steps=1, peft__method="lora")
    result = plan_search.search(config, stand_in(8))
    assert result["memory"]["fits"]
    assert result["search"]["fields"]["mesh.data"] == 8
    assert result["search"]["fields"]["model.remat"] == "none"
    assert "--config.mesh.data=8" in plan_search.describe(result)


def test_search_goes_on_with_less_where_the_compiler_refuses(folder, monkeypatch):
    make = plan.make

    def refuse(config, target, **options):
        if config.model.remat != "full":
            raise plan.DoesNotFit("too much")
        return make(config, target, **options)

    monkeypatch.setattr(plan, "make", refuse)
    found = plan_search.search(small_config(folder, train__batch_size=8), stand_in(8))["search"]
    assert found["fields"]["model.remat"] == "full"
    assert 0 < len(found["refused"]) <= plan_search.COMPILES


def test_search_that_finds_nothing_names_the_smallest():
    config = small_config("meta-llama/Llama-3-70B", train__batch_size=8)
    with pytest.raises(plan.DoesNotFit, match=r"mesh.fsdp=\d.*GiB"):
        plan_search.search(config, stand_in(8, "t4"))


def test_what_would_save_memory_is_ordered(folder):
    config = small_config(folder, train__batch_size=64, model__remat="none")
    found = plan_fit.savings(config, stand_in(2))
    assert [saved for _, saved in found] == sorted((saved for _, saved in found), reverse=True)
    assert {"model.remat": "full"} in [fields for fields, _ in found]
    for fields, saved in found:
        peak = [plan.settle(one, stand_in(2)).memory().peak for one in (config, plan.with_fields(config, fields))]
        assert peak[0] - peak[1] == saved > 0
    error = plan_fit.out_of_memory(config, stand_in(2), RuntimeError("RESOURCE_EXHAUSTED: 3 GiB"))
    assert "3 GiB" in str(error) and "model.remat=full saves about" in str(error)


def small_device(memory):
    return dataclasses.replace(stand_in(), chip=dataclasses.replace(hardware.CHIPS["t4"], memory=memory))


def test_a_step_that_does_not_fit_is_answered_by_the_nearest_that_does(folder):
    few, many = (small_config(folder, train__batch_size=rows) for rows in (4, 4096))
    memory = 2 * plan.settle(few, stand_in()).memory().peak
    target = small_device(memory)
    assert plan_fit.warning(few, plan.settle(few, target)) == ""
    said = plan_fit.warning(many, plan.settle(many, target))
    fields, peak = plan_fit.nearest(many, target)
    assert said.startswith("warning: by rule this needs ") and f"there are {plan.gib(memory)}" in said
    # first what trains the same; what it names fits, and half of it doesn't
    assert list(fields) == ["train.gradient_accumulation_steps"]
    count = fields["train.gradient_accumulation_steps"]
    assert f"--config.train.gradient_accumulation_steps={count}" in said
    peaks = [
        plan.settle(plan.with_fields(many, {"train.gradient_accumulation_steps": n}), target).memory().peak
        for n in (count // 2, count)
    ]
    assert peaks[0] > memory >= peaks[1] == peak


def test_where_one_row_is_too_much_what_is_trained_has_to_change(folder):
    config = small_config(folder, train__batch_size=1, train__gradient_accumulation_steps=1)
    program = plan.settle(config, stand_in()).program
    memory = plan.settle(plan.with_fields(config, {"peft.method": "lora"}), stand_in()).memory().peak
    fields, peak = plan_fit.nearest(config, small_device(memory))
    assert "peft.method" in fields or "train.optim" in fields
    assert peak <= memory < plan.step_of(config, program, stand_in()).memory().peak
    impossible = small_device(1000)
    assert "no setting near it fits" in plan_fit.warning(config, plan.settle(config, impossible))


def test_memory_of_a_device_is_its_share_of_what_the_container_has():
    assert 0 < hardware.host_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert topology.here().memory == hardware.host_memory() // len(jax.devices())


def test_padding_free_rows_are_as_long_as_what_a_device_gets(folder):
    config = small_config(folder, data__packing="padding_free", train__batch_size=32)
    step = plan.settle(config, stand_in(8))
    assert (step.rows, step.length, step.tokens) == (8, 512, 32 * 128)


def test_a_run_on_these_devices_is_summed_up(folder):
    assert topology.here().devices == jax.devices() and topology.here().chip is None
    lines = plan.summary(plan.settle(small_config(folder, train__batch_size=8), stand_in(8))).splitlines()
    assert lines[0].startswith("memory a device") and lines[1].startswith("floor of a step on h100")


def test_weak_scaling_keeps_the_work_of_a_device(folder):
    config = small_config(folder, train__batch_size=2, train__gradient_accumulation_steps=1)
    plans = plan_scaling.weak(config, ["cpu:2", "cpu:4"])
    assert [one["tokens_per_step"] for one in plans] == [256, 512]
    assert plan_scaling.work(plans[0]) == plan_scaling.work(plans[1])
    assert plans[0]["compiled"]["bytes"]["arguments"] > plans[1]["compiled"]["bytes"]["arguments"]
    assert plan_scaling.table(plans).count("\n| cpu:") == 2
    assert plan_scaling.plot(plans).startswith("<svg") and "xmlns=" in plan_scaling.plot(plans)


def run_tool(folder, *flags):
    return subprocess.run(
        [
            sys.executable,
            "tools/plan.py",
            f"--config={ROOT}/configs/llama7b.py",
            f"--config.model.path={folder}",
            *flags,
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )


def test_the_tool_plans_and_writes_json(folder, tmp_path):
    out = tmp_path / "plan.json"
    small = ("--config.data.max_length=128", "--config.train.batch_size=8")
    done = run_tool(folder, "--topology=cpu:2", f"--out={out}", "--config.train.gradient_accumulation_steps=2", *small)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["memory"]["source"] == "compiled" and result["memory"]["fits"]
    assert result["compiled"]["network_bytes"] > 0
    assert "fits" in done.stdout


def test_the_tool_says_what_is_missing(folder):
    """Seven billion parameters in full on one device: a shortfall, and an exit code that scripts see."""
    done = run_tool("meta-llama/Llama-2-7b-hf", "--topology=a6000", "--config.train.gradient_accumulation_steps=512")
    assert done.returncode == 78
    assert "DOES NOT FIT" in done.stdout and "GiB short" in done.stdout


@pytest.mark.parametrize(
    ("capability", "lacks"),
    [("7.5", True), ("8.0", False), ("9.0", False), ("10.0", False), ("gfx90a", False), (None, False)],
)
def test_gpus_without_bfloat16(capability, lacks):
    fields = {} if capability is None else {"compute_capability": capability}
    assert hardware.lacks_bfloat16(types.SimpleNamespace(**fields)) is lacks
