"""A step that needs more memory than its device has: said before the run, with the nearest settings that fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sftjax import config as config_lib
from sftjax import plan, topology
from sftjax.errors import ConfigError


def warning(config: config_lib.ConfigDict, step: plan.Step) -> str:
    """A line for a step that doesn't fit by rule: what it needs, what there is, and what would fit; "" if it does."""
    needed, there = step.memory().peak, step.target.memory
    if needed <= there:
        return ""
    return f"warning: by rule this needs {plan.gib(needed)} of a device, and there are {plan.gib(there)}; " + advice(
        config, step.target
    )


def advice(config: config_lib.ConfigDict, target: topology.Target) -> str:
    """What to set so that a step fits, in words."""
    found = nearest(config, target)
    if found is None:
        return "no setting near it fits: use more devices, or a smaller model"
    fields, peak = found
    settings = " ".join(f"--config.{name}={value}" for name, value in fields.items())
    return f"the nearest that fits by rule, with {plan.gib(peak)}: {settings}"


def nearest(config: config_lib.ConfigDict, target: topology.Target) -> tuple[dict[str, Any], int] | None:
    """The least change that fits by rule: (fields to set, bytes of a device); None if none of those tried does.

    First what trains the same: smaller micro-batches, recomputation. Then a smaller optimizer, adapters, shorter rows.
    """
    for fields in _ladder(config):
        changed = plan.with_fields(config, fields)
        try:
            program = plan.settle(changed, target).program
        except ConfigError:  # such as settings that don't go with this one
            continue
        for accumulation in _accumulations(changed, program):
            more = {"train.gradient_accumulation_steps": accumulation}
            peak = plan.step_of(plan.with_fields(changed, more), program, target).memory().peak
            if peak <= target.memory:
                same = accumulation == config.train.gradient_accumulation_steps
                return fields | ({} if same else more), peak
    return None


def _accumulations(config: config_lib.ConfigDict, program: Any) -> Iterator[int]:
    """Numbers of micro-batches that a step's rows divide into on these devices, from the present one on."""
    rows = config_lib.rows_per_step(config) // plan.partition.batch_shards(program.mesh)
    return (n for n in range(config.train.gradient_accumulation_steps, rows + 1) if rows % n == 0)


def _ladder(config: config_lib.ConfigDict) -> Iterator[dict[str, Any]]:
    """Changes to try, the nearest first; each keeps what the one before it changed, where that goes with it."""
    yield {}
    fields: dict[str, Any] = {} if config.model.remat == "full" else {"model.remat": "full"}
    yield fields
    if config.mesh.data not in (1, -1):
        fields = fields | {"mesh.data": 1, "mesh.fsdp": -1}
        yield fields
    if config.peft.method == "none":
        yield fields | {"train.optim": "adamw_8bit"}
        yield fields | {"train.optim": "adamw_8bit", "model.params_dtype": "bfloat16"}
        fields = fields | {"peft.method": "lora"}
        yield fields
    if config.peft.quantization == "none":
        fields = fields | {"peft.quantization": "nf4"}
        yield fields
    length = config.data.max_length // 256 * 128
    while length >= 128:
        yield fields | {"data.max_length": length}
        length = length // 256 * 128


def savings(config: config_lib.ConfigDict, target: topology.Target) -> list[tuple[dict[str, Any], int]]:
    """What would need less memory, by rule: (fields to set, bytes saved on a device), the largest saving first."""
    now = plan.settle(config, target)
    tries = [
        {"train.gradient_accumulation_steps": 2 * now.accumulation},
        {"model.remat": "full"},
        {"train.optim": "adamw_8bit"},
        {"model.params_dtype": "bfloat16"},
        {"peft.method": "lora"},
        {"data.max_length": now.length // 256 * 128},
        {axis: 1 for axis in ("mesh.data", "mesh.tensor")} | {"mesh.fsdp": -1},
    ]
    found = []
    for fields in tries:
        try:
            saved = now.memory().peak - plan.settle(plan.with_fields(config, fields), target).memory().peak
        except ConfigError:  # such as rows that can't be divided further
            continue
        if saved > 0:
            found.append((fields, saved))
    return sorted(found, key=lambda one: -one[1])


def out_of_memory(config: config_lib.ConfigDict, target: topology.Target, error: Exception) -> plan.DoesNotFit:
    """What to tell a person whose run the device refused: its own report, the plan's figures, what would help."""
    report = " ".join(str(error).split())
    knobs = "; ".join(
        f"{' '.join(f'{name}={value}' for name, value in fields.items())} saves about {plan.gib(saved)}"
        for fields, saved in savings(config, target)
    )
    by_rule = plan.summary(plan.settle(config, target))
    return plan.DoesNotFit(f"out of memory: {report[:400]}. By rule: {by_rule}. {knobs}")
