"""Where the time of a training step goes, beside the speed at which this machine multiplies matrices.

A few real steps are traced, and the time of each compiled operation is booked on the part of the model it belongs to.

The compiler's operations carry the path of scopes they came from (`Decoder/…/self_attn/q_proj/dot_general`); the
profiler tells when each ran. An operation that runs others (a loop) counts only what they leave.
"""

from __future__ import annotations

import collections
import gzip
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sftjax import config as config_lib
from sftjax import costs, hlo, runs, train
from sftjax.errors import ConfigError
from sftjax.job import setup

_PEAK_SIZE = 2048  # of the square matrices by which the machine is measured
_PARTS = (  # of the decoder: the first that is found in an operation's path
    ("_proj/", "projections"),
    ("/mlp/", "projections"),
    ("norm", "norms"),
    ("/self_attn", "attention"),
    ("embed_tokens", "embedding"),
)


def profile(config: config_lib.ConfigDict, steps: int) -> dict[str, Any]:
    """Traces steps of a run as it would begin; nothing is kept of it.

    Args:
      config: of the run. Its folder isn't touched.
      steps: traced, behind as many that are only timed and one that compiles.

    Returns:
      JSON-able figures; seconds and FLOPs are of a step, `peak_flops` a second. `parts` are rows
      {"part", "products", "other"}: seconds in matrix products, and in everything else; together they are more than a
      step where operations run beside each other.

    Raises:
      ConfigError: several processes, or a configuration that can't be run.
    """
    if jax.process_count() > 1:
        raise ConfigError("a step is profiled in one process")
    config = config_lib.from_json(config_lib.to_json(config))
    config.train.max_steps = 2 * steps + 1
    config.eval.eval_steps = 0
    config_lib.check(config, num_devices=jax.device_count())
    with tempfile.TemporaryDirectory(prefix="sftjax-profile-") as folder:
        config.run_dir = f"{folder}/run"
        with runs.RunFolder.open(config.run_dir, primary=True) as run_folder:
            job = setup(config, run_folder, ())
            state, frozen, _ = train.restore(job)
            with train.train_pipeline(job, job.program.local_rows(job.batch_rows), None) as pipeline:
                items = list(itertools.islice(pipeline, 2 * steps + 1))
            batches = [job.program.put(item.batch, item.info.rows, job.batch_rows) for item in items]
            compiled = job.program.train_step.lower(state, frozen, batches[0]).compile()
            _, state = _timed(compiled, state, frozen, batches[:1])
            untraced, state = _timed(compiled, state, frozen, batches[1 : steps + 1])
            with jax.profiler.trace(f"{folder}/trace"):
                traced, state = _timed(compiled, state, frozen, batches[steps + 1 :])
        seconds = self_seconds(read_trace(Path(folder)))
    scopes = hlo.scopes(compiled.as_text())
    tokens = statistics.mean(item.info.real_tokens for item in items[1:])
    per_token = costs.model_flops(job.program, _context(items[1:]))
    flops = per_token * tokens
    peak = matmul_peak(job.program.runtime.compute_dtype)
    step = statistics.median(untraced)
    return {
        "model": config.model.path,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "rows": job.batch_rows,
        "length": config.data.max_length,
        "dtype": jnp.dtype(job.program.runtime.compute_dtype).name,
        "steps": steps,
        "step_seconds": step,
        "traced_step_seconds": statistics.mean(traced),
        "real_tokens": tokens,
        "tokens_per_second": tokens / step,
        "model_flops": flops,
        "recomputed_flops": costs.recomputed_flops(job.program, _context(items[1:])) * tokens,
        "peak_flops": peak,
        "mfu": flops / step / (peak * jax.device_count()),
        "parts": add_up(seconds, scopes, len(traced)),
    }


def _timed(compiled, state, frozen, batches):
    seconds = []
    for batch in batches:
        began = time.monotonic()
        state, _ = jax.block_until_ready(compiled(state, frozen, batch))
        seconds.append(time.monotonic() - began)
    return seconds, state


def _context(items: Iterable) -> float:
    """sum(l²) / sum(l) over the segments of some batches."""
    lengths = []
    for item in items:
        real = item.batch["source_ids"] >= 0
        segments = item.batch["segment_ids"]
        for row, is_real in zip(
            segments.reshape(-1, segments.shape[-1]), real.reshape(-1, real.shape[-1]), strict=True
        ):
            lengths += np.bincount(row[is_real]).tolist()
    lengths = np.array(lengths, np.float64)
    return float((lengths**2).sum() / lengths.sum())


def read_trace(folder: Path) -> list[dict[str, Any]]:
    """Events with a length, of the trace that JAX's profiler wrote somewhere in a folder."""
    (path,) = folder.rglob("*.trace.json.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def self_seconds(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each operation by name, without those of events inside of its own.

    Args:
      events: `name`, `pid`, `tid`, and `ts` and `dur` in microseconds.
    """
    threads = collections.defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    found: dict[str, float] = collections.defaultdict(float)
    for thread in threads.values():
        around: list[tuple[float, str]] = []  # (end, name) of the events that this one is in
        for event in sorted(thread, key=lambda event: (event["ts"], -event.get("dur", 0.0))):
            name, took = event.get("args", {}).get("hlo_op", event["name"]), event.get("dur", 0.0)
            while around and around[-1][0] <= event["ts"]:
                around.pop()
            if around:
                found[around[-1][1]] -= took / 1e6
            found[name] += took / 1e6
            around.append((event["ts"] + took, name))
    return dict(found)


def add_up(seconds: Mapping[str, float], scopes: Mapping[str, str], steps: int) -> list[dict[str, Any]]:
    """Seconds of a step by part of the model, the longest first.

    Args:
      seconds: by operation, of all steps.
      scopes: operation -> the path of scopes it was written in. Others aren't the program's.
      steps: how many.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, path in scopes.items():
        if name in seconds:
            part = part_of(path)
            row = rows.setdefault(part, {"part": part, "products": 0.0, "other": 0.0})
            row["products" if path.rsplit("/", 1)[-1].startswith("dot_general") else "other"] += seconds[name] / steps
    return sorted(rows.values(), key=lambda row: -row["products"] - row["other"])


def part_of(path: str) -> str:
    """The part of the model that an operation's path of scopes names."""
    if "Decoder" not in path:
        return "head and loss" if "jvp(" in path else "optimizer"  # what is differentiated, and the rest
    return next((part for sign, part in _PARTS if sign in path), "the layers' rest")


def matmul_peak(dtype) -> float:
    """FLOP/s of one device on square matrices of a type, the sum in float32: the best of ten."""
    left, right = (
        jax.random.normal(key, (_PEAK_SIZE, _PEAK_SIZE), dtype) for key in jax.random.split(jax.random.key(0))
    )
    dims = (((1,), (1,)), ((), ()))
    multiply = jax.jit(lambda a, b: jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32))
    multiply(left, right).block_until_ready()
    best = float("inf")
    for _ in range(10):
        began = time.monotonic()
        multiply(left, right).block_until_ready()
        best = min(best, time.monotonic() - began)
    return 2 * _PEAK_SIZE**3 / best


def describe(result: Mapping[str, Any]) -> str:
    """The figures as lines of text, the parts as a Markdown table."""
    step, traced, peak = result["step_seconds"], result["traced_step_seconds"], result["peak_flops"]
    products, other = (sum(row[kind] for row in result["parts"]) for kind in ("products", "other"))
    flops, again = result["model_flops"], result["recomputed_flops"]
    rows = [*result["parts"], {"part": "all", "products": products, "other": other}]
    return "\n".join(
        [
            f"{result['model']} on {result['device']}: {result['rows']} rows of {result['length']}, {result['dtype']}",
            f"{step * 1e3:,.0f} ms a step ({traced * 1e3:,.0f} traced), {result['tokens_per_second']:,.0f} tokens/s",
            f"products of {_PEAK_SIZE} x {_PEAK_SIZE}: {peak / 1e9:,.0f} GFLOP/s; at that speed the step's "
            f"{flops / 1e9:,.1f} G by the rule",
            f"take {flops / peak * 1e3:,.0f} ms (MFU {result['mfu']:.0%}), and the {again / 1e9:,.1f} G recomputed "
            f"{again / peak * 1e3:,.0f} ms",
            "",
            "| part | products, ms | all else, ms | share |",
            "| --- | --- | --- | --- |",
            *(
                f"| {row['part']} | {row['products'] * 1e3:,.1f} | {row['other'] * 1e3:,.1f} "
                f"| {(row['products'] + row['other']) / (products + other):.0%} |"
                for row in rows
            ),
        ]
    )
