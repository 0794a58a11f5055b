"""A run's plan before it is paid for: does it fit, how long can it take at best, what will it cost.

The real training step is compiled for the devices asked for, without having them: the same program, shardings and
kernels as `train` runs. Out of memory here is out of memory there. Times are floors from data sheets, not measurements.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sftjax import config as config_lib
from sftjax import costs, hlo, job, topology
from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig
from sftjax.parallel import mesh as meshes
from sftjax.parallel import partition
from sftjax.program import Program
from sftjax.weights import families, hf, vocab

RULE = "6 a trained and 4 a frozen matrix parameter, 6 an adapter's, 6·layers·heads·head_dim·context"
# What the hub would say of the models that configs/ names, so that they can be planned without a network.
_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "head_dim": 128}
_LLAMA_3 = {
    **_LLAMA,
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "rope_theta": 5e5,
    "max_position_embeddings": 8192,
}
_LLAMA_3_8B = {
    **_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
}  # fmt: skip
_LLAMA_3_70B = {
    **_LLAMA_3, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
_LLAMA_2_7B = {
    **_LLAMA, "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "rope_theta": 1e4, "max_position_embeddings": 4096,
}  # fmt: skip
_MISTRAL_7B = {
    **_LLAMA_3_8B, "model_type": "mistral", "vocab_size": 32_000, "rope_theta": 1e4, "sliding_window": 4096,
    "max_position_embeddings": 32_768,
}  # fmt: skip
KNOWN = {
    "llama-2-7b": _LLAMA_2_7B,
    "llama-3-8b": _LLAMA_3_8B,
    "llama-3-70b": _LLAMA_3_70B,
    "mistral-7b": _MISTRAL_7B,
}


class DoesNotFit(ConfigError):
    """The step needs more memory than a device has."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step for a target: the program and the batches it takes."""

    program: Program
    target: topology.Target
    rows: int  # of a micro-batch, over all devices
    length: int
    accumulation: int

    @property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        sharding = partition.batch_sharding(self.program.mesh)
        shape = (self.accumulation, self.rows, self.length)
        dtypes = {name: jnp.float32 if name == "weights" else jnp.int32 for name in self.program.batch_arrays}
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the program's `train_step` takes, as shapes."""
        return self.program.abstract_state, self.program.abstract_frozen, self.batch

    @property
    def shape(self) -> dict[str, int]:
        return {"rows": self.rows, "length": self.length, "accumulation": self.accumulation}

    @property
    def tokens(self) -> int:
        """Token slots of an optimizer step."""
        return self.accumulation * self.rows * self.length

    def memory(self) -> costs.Memory:
        return costs.memory(self.program, self.target.platform, **self.shape)


def read_model(path: str) -> ModelConfig:
    """A model's configuration: from a folder (its config.json is enough) or GGUF file, else by the model's name.

    Raises:
      ConfigError: not found, or not understood.
    """
    if not os.path.exists(path):
        name = path.lower().replace("meta-", "").replace("llama3", "llama-3").replace("llama2", "llama-2")
        for known, raw in KNOWN.items():
            if known in name:
                return families.read_config(raw, known)
    return hf.load_config(path)


def settle(config: config_lib.ConfigDict, target: topology.Target) -> Step:
    """The step that `train` would run with this configuration on these devices; nothing is compiled.

    Raises:
      ConfigError: the configuration, or its mesh on so many devices, is wrong.
    """
    config_lib.check(config, num_devices=len(target.devices))
    model = read_model(config.model.path)
    rows = vocab.padded_size(model.vocab_size, config.model.pad_vocab_to_multiple_of)
    if rows != model.vocab_size:
        model = model.replace(vocab_size=rows, valid_vocab=model.vocab_size)
    mesh = meshes.make({axis: config.mesh[axis] for axis in meshes.AXES}, target.devices)
    spec = job.adapter_spec(config, model=model, grows=False)
    model = job.untied(config, model, spec)
    program, _ = job.build_program(config, model, spec, mesh, total_steps=config.train.max_steps or 1000)
    return step_of(config, program, target)


def step_of(config: config_lib.ConfigDict, program: Program, target: topology.Target) -> Step:
    """The largest step that a program is given. Padding-free rows are as long as all that a device gets."""
    accumulation, length = config.train.gradient_accumulation_steps, config.data.max_length
    rows = config_lib.rows_per_step(config) // accumulation
    if config.data.packing == "padding_free":
        shards = partition.batch_shards(program.mesh)
        rows, length = shards, length * rows // shards
    return Step(program, target, rows, length, accumulation)


def make(
    config: config_lib.ConfigDict,
    target: topology.Target,
    *,
    preflight: Mapping[str, Any] | None = None,
    price: float | None = None,
) -> dict[str, Any]:
    """The plan, as JSON-able figures: bytes of a device, seconds of a step, all else as the names say.

    Args:
      preflight: the data ledger of a run (`preflight.json`), for the whole run's tokens and hours.
      price: of a device and hour, in any currency.

    Raises:
      ConfigError: see `settle`.
      DoesNotFit: the compiler's report.
    """
    step = settle(config, target)
    program = step.program
    context = preflight["length"]["mean"] if preflight else float(step.length)
    result: dict[str, Any] = {
        "model": config.model.path,
        "topology": target.name,
        "devices": len(target.devices),
        "mesh": dict(program.mesh.shape),
        "parameters": program.count(),
        "micro_batch_rows": step.rows,
        "length": step.length,
        "gradient_accumulation_steps": step.accumulation,
        "tokens_per_step": step.tokens,
        "remat": program.runtime.remat,
        "estimate": dataclasses.asdict(step.memory()) | {"peak": step.memory().peak},
        "compiled": read(step, compile_step(step)) if target.compiles else None,
        "flops": {
            "rule": RULE,
            "context": context,
            "model_per_token": costs.model_flops(program, context),
            "recomputed_per_token": costs.recomputed_flops(program, context),
        },
    }
    result["memory"] = fit(result, target)
    if target.chip is not None:
        result["floor"] = floor(step, context, result["compiled"])
        if preflight:
            result["data"] = data(step, preflight, result["floor"]["step_seconds"])
            if price is not None:
                result["cost"] = result["data"]["hours"] * len(target.devices) * price
    return result


def compile_step(step: Step) -> jax.stages.Compiled:
    """The compiled training step.

    Raises:
      DoesNotFit: the compiler's report.
    """
    try:
        return step.program.train_step.lower(*step.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        report = " ".join(str(error).split())
        raise DoesNotFit(
            f"{step.target.name} is out of memory: {report[:600]}. Use fewer rows in a micro-batch "
            "(train.gradient_accumulation_steps), more devices, or --search for what fits"
        ) from error


def read(step: Step, executable: jax.stages.Compiled) -> dict[str, Any]:
    """What the compiler says of a step: bytes on a device, kernels, and what devices exchange."""
    analysis, text = executable.memory_analysis(), executable.as_text()
    exchanged = hlo.collectives(text, step.program.mesh.size)
    sizes = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
    }
    together = sizes["arguments"] + sizes["outputs"] - sizes["aliased"] + sizes["temporaries"]
    # Of a TPU's temporaries not all are alive at once, nor in HBM: its compiler gives the peak, and refuses too much.
    peak = analysis.peak_memory_in_bytes if step.target.platform == "tpu" else together
    return {
        "bytes": {**sizes, "peak": peak},
        "kernels": hlo.kernels(text),
        "network_bytes": sum(one.received for one in exchanged),
        "collectives": [dataclasses.asdict(one) | {"received": one.received} for one in exchanged],
    }


def fit(result: Mapping[str, Any], target: topology.Target) -> dict[str, Any]:
    """Peak against capacity. "source" tells a compiled figure from an estimated one."""
    measured = result["compiled"]
    peak = measured["bytes"]["peak"] if measured else result["estimate"]["peak"]
    capacity = target.memory
    return {
        "source": "compiled" if measured else "estimated",
        "peak": peak,
        "capacity": capacity,
        "fits": peak <= capacity,
        "free": capacity - peak,
    }


def floor(step: Step, context: float, compiled_step: Mapping[str, Any] | None) -> dict[str, Any]:
    """The roofline; without a compiled program the network's part is by rule."""
    network = compiled_step["network_bytes"] if compiled_step else costs.network_bytes(step.program, **step.shape)
    limits = costs.floor(step.program, step.target.chip, context=context, network_bytes=network, **step.shape)
    devices = len(step.target.devices)
    useful = costs.model_flops(step.program, context) * step.tokens / devices / step.target.chip.flops
    return {
        "compute_seconds": limits.compute,
        "memory_seconds": limits.memory,
        "network_seconds": limits.network,
        "step_seconds": limits.step,
        "limit": limits.limit,
        "tokens_per_second": step.tokens / limits.step,
        "tokens_per_second_per_device": step.tokens / limits.step / devices,
        "mfu": useful / limits.step,
    }


def data(step: Step, preflight: Mapping[str, Any], step_seconds: float) -> dict[str, Any]:
    """The whole run, from what its preflight counted."""
    steps = math.ceil(preflight["tokens_to_come"] / (step.tokens * preflight["packing_efficiency"]))
    return {"tokens": preflight["tokens_to_come"], "steps": steps, "hours": steps * step_seconds / 3600}


def with_fields(config: config_lib.ConfigDict, fields: Mapping[str, Any]) -> config_lib.ConfigDict:
    """A copy of the configuration in which these are set, `{"train.batch_size": 8}`."""
    changed = copy.deepcopy(config)
    for path, value in fields.items():
        group, field = path.split(".")
        changed[group][field] = value
    return changed


def summary(step: Step) -> str:
    """Two lines for the start of a run, without a compile."""
    memory = step.memory()
    parts = ", ".join(f"{name} {gib(size)}" for name, size in dataclasses.asdict(memory).items() if size)
    lines = [f"memory a device, by rule: {gib(memory.peak)} ({parts}), of {gib(step.target.memory)}"]
    if step.target.chip is not None:
        limits = floor(step, float(step.length), None)
        lines.append(
            f"floor of a step on {step.target.chip.name}: {limits['step_seconds']:.3f} s by the {limits['limit']}, "
            f"at most {limits['tokens_per_second']:,.0f} tokens/s"
        )
    return "\n".join(lines)


def describe(result: Mapping[str, Any]) -> str:
    """A plan for a person to read."""
    lines = [
        f"{result['model']} on {result['topology']}, {result['devices']} devices, mesh "
        + " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1 or axis == "fsdp"),
        f"  step        {result['gradient_accumulation_steps']} x {result['micro_batch_rows']} rows of "
        f"{result['length']:,} = {result['tokens_per_step']:,} tokens; remat {result['remat']}",
        f"  parameters  {result['parameters']['trainable']:,} trained, {result['parameters']['base']:,} in the base",
    ]
    lines += _memory_lines(result)
    lines.append(_flops_line(result["flops"]))
    if result["compiled"]:
        lines += _compiled_lines(result["compiled"])
    if "floor" in result:
        lines += _floor_lines(result["floor"])
    if "data" in result:
        run = result["data"]
        lines.append(
            f"  run         {run['tokens']:,} tokens, {run['steps']:,} steps: {run['hours']:.2f} hours at the least"
        )
    if "cost" in result:
        lines.append(f"  cost        {result['cost']:,.2f} at the least")
    return "\n".join(lines)


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:.1f} MiB"


def _flops_line(flops: Mapping[str, Any]) -> str:
    model, again = (flops[name] / 1e9 for name in ("model_per_token", "recomputed_per_token"))
    return (
        f"  FLOPs       {model:.2f} G a token and {again:.2f} G recomputed "
        f"(6 a trained, 4 a frozen parameter; attention over {flops['context']:,.0f} tokens)"
    )


def _floor_lines(limits: Mapping[str, Any]) -> list[str]:
    parts = ", ".join(f"{name} {limits[f'{name}_seconds']:.3f} s" for name in ("compute", "memory", "network"))
    rate = f"{limits['tokens_per_second_per_device']:,.0f} tokens/s a device, MFU {limits['mfu']:.0%}"
    return [
        f"  floor       {limits['step_seconds']:.3f} s a step by the {limits['limit']} ({parts}):",
        f"              at most {rate}; from data sheets, not measured",
    ]


def _memory_lines(result: Mapping[str, Any]) -> list[str]:
    memory, estimate = result["memory"], result["estimate"]
    verdict = f"fits, {gib(memory['free'])} free" if memory["fits"] else f"DOES NOT FIT, {gib(-memory['free'])} short"
    lines = [
        f"  memory      {gib(memory['peak'])} of {gib(memory['capacity'])} a device ({memory['source']}): {verdict}"
    ]
    if result["compiled"]:
        sizes = result["compiled"]["bytes"]
        lines.append(f"              arguments {gib(sizes['arguments'])}, temporaries {gib(sizes['temporaries'])}")
    else:
        parts = ", ".join(f"{name} {gib(size)}" for name, size in estimate.items() if name != "peak" and size)
        lines.append(f"              not compiled, by rule: {parts}")
    return lines


def _compiled_lines(compiled_step: Mapping[str, Any]) -> list[str]:
    by_kind: dict[str, float] = {}
    for one in compiled_step["collectives"]:
        by_kind[one["kind"]] = by_kind.get(one["kind"], 0.0) + one["received"]
    exchanged = ", ".join(f"{kind} {gib(size)}" for kind, size in by_kind.items()) or "nothing"
    return [
        f"  kernels     {', '.join(compiled_step['kernels']) or 'none: plain XLA'}",
        f"  network     {exchanged} received by each device in a step",
    ]
