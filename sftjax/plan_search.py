"""The fastest way to run a configuration on given devices: mesh, micro-batch and remat policy.

What a step trains stays the same (its rows, model and method); only where and in what portions it is computed varies.
Candidates are ranked by rule, those that can't fit by far are left out, and the rest are compiled in order until one
fits. Data sheets say what can't be beaten, not what will be reached: the order is a guess with reasons.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from sftjax import config as config_lib
from sftjax import costs, plan, topology
from sftjax.errors import ConfigError

REMAT = ("none", "dots", "attention", "full")
COMPILES = 6  # at most so many: each may take minutes
SLACK = 1.15  # estimates above capacity by less than this are worth compiling


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a step."""

    mesh: tuple[int, int, int]  # data, fsdp, tensor
    accumulation: int
    remat: str
    seconds: float  # `costs.Floor.guess`
    peak: int  # estimated

    @property
    def fields(self) -> dict[str, Any]:
        """What to set in the configuration."""
        return {
            "mesh.data": self.mesh[0],
            "mesh.fsdp": self.mesh[1],
            "mesh.tensor": self.mesh[2],
            "train.gradient_accumulation_steps": self.accumulation,
            "model.remat": self.remat,
        }


def search(
    config: config_lib.ConfigDict,
    target: topology.Target,
    *,
    preflight: Mapping[str, Any] | None = None,
    price: float | None = None,
) -> dict[str, Any]:
    """The plan of the fastest candidate that fits, with "search": its fields, and what became of those before it.

    Raises:
      ConfigError: nothing is known of the chip.
      DoesNotFit: nothing fits; names the smallest.
    """
    if target.chip is None:
        raise ConfigError("--search ranks by a chip's data sheet: give a TPU or GPU topology")
    ranked = sorted(candidates(config, target), key=lambda candidate: (candidate.seconds, candidate.peak))
    limit = target.chip.memory * (SLACK if target.compiles else 1)
    refused: list[dict[str, Any]] = []
    for candidate in ranked:
        if candidate.peak >= limit or len(refused) == COMPILES:
            continue
        try:
            result = plan.make(plan.with_fields(config, candidate.fields), target, preflight=preflight, price=price)
        except plan.DoesNotFit as error:
            refused.append({"fields": candidate.fields, "why": str(error)})
            limit = candidate.peak  # what needs more by rule won't fit either
            continue
        return result | {"search": {"fields": candidate.fields, "considered": len(ranked), "refused": refused}}
    smallest = min(ranked, key=lambda candidate: candidate.peak)
    raise plan.DoesNotFit(
        f"none of {len(ranked)} ways to run this fits {target.name} ({len(refused)} were compiled); the smallest, "
        f"{_settings(smallest.fields)}, needs about {plan.gib(smallest.peak)} of {plan.gib(target.chip.memory)}: "
        "use more devices, peft.method=lora, or a shorter data.max_length"
    )


def candidates(config: config_lib.ConfigDict, target: topology.Target) -> Iterator[Candidate]:
    """Every mesh of powers of two over data, fsdp and tensor; every division into micro-batches; every remat policy."""
    count, total = len(target.devices), config_lib.rows_per_step(config)
    for mesh in meshes(count):
        shards = mesh[0] * mesh[1]
        if total % shards:
            continue
        fields = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
        step = plan.settle(plan.with_fields(config, fields | {"train.gradient_accumulation_steps": 1}), target)
        if step.program.config.num_kv_heads % mesh[2]:
            continue
        accumulations = [n for n in range(1, total // shards + 1) if total // shards % n == 0]
        for accumulation in accumulations:
            for remat in REMAT:
                yield judged(step, mesh, accumulation, remat)


def meshes(count: int) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, tensor) whose product is `count`; at most eight on the tensor axis."""
    for tensor in (1, 2, 4, 8):
        data = 1
        while tensor * data <= count:
            if count % (tensor * data) == 0:
                yield data, count // (tensor * data), tensor
            data *= 2


def judged(step: plan.Step, mesh: tuple[int, int, int], accumulation: int, remat: str) -> Candidate:
    """By rule, from the program of another candidate on the same mesh."""
    program = dataclasses.replace(step.program, runtime=step.program.runtime.replace(remat=remat))
    step = dataclasses.replace(step, program=program, rows=step.rows // accumulation, accumulation=accumulation)
    limits = costs.floor(
        program,
        step.target.chip,
        context=float(step.length),
        network_bytes=costs.network_bytes(program, **step.shape),
        **step.shape,
    )
    return Candidate(mesh, accumulation, remat, limits.guess, step.memory().peak)


def describe(result: Mapping[str, Any]) -> str:
    """The plan, what to set, and what was tried before."""
    found = result["search"]
    lines = [
        plan.describe(result),
        f"  search      the fastest of {found['considered']} by rule that fits:",
        "              " + " ".join(f"--config.{name}={value}" for name, value in found["fields"].items()),
    ]
    lines += [f"              refused: {_settings(one['fields'])}" for one in found["refused"]]
    return "\n".join(lines)


def _settings(fields: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items())
