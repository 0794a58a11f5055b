"""Speed as a user gets it, beside a peer's: real tokens per second, in training by the main program and generating."""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sftjax.errors import ConfigError
from sftjax.runlog import read_lines

ROOT = Path(__file__).resolve().parents[1]


def ours(
    *, model: str, data: str, method: str, max_length: int, batch_size: int, steps: int, packing: bool, dtype: str
) -> dict[str, Any]:
    """Runs `sftjax.main` for `steps` steps after the first, without evaluation or export."""
    with tempfile.TemporaryDirectory(prefix="sftjax-bench-") as folder:
        fields = {
            "run_dir": f"{folder}/run",
            "model.path": model,
            "model.compute_dtype": dtype,
            "data.train": f"('{data}',)",
            "data.eval_fraction": 0.0,
            "data.max_length": max_length,
            "data.packing": "best_fit" if packing else "none",
            "train.batch_size": batch_size,
            "train.max_steps": steps + 1,
            "train.learning_rate": 2e-4,
            "peft.method": "lora" if method == "lora" else "none",
            "export.enabled": False,
            "log.tensorboard": False,
        }
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        config = ROOT / "configs" / "smollm2_135m.py"
        _, peak = run([sys.executable, "-m", "sftjax.main", f"--config={config}", *flags])
        timing, metrics = read_lines(f"{folder}/run/timing.jsonl"), read_lines(f"{folder}/run/metrics.jsonl")
    total = [line["num_tokens"] for line in metrics if "num_tokens" in line]
    last = timing[-1]  # over the last twenty steps, so over all of them but the first
    return {
        "tokens_per_second": last["tokens_per_second"],
        "trained_tokens_per_second": last["trained_tokens_per_second"],
        "step_seconds": last["step_seconds"],
        "real_tokens": total[-1] - total[0],
        "peak_bytes": peak,
    }


def peer_trl(
    *,
    python: str,
    model: str,
    data: str,
    method: str,
    max_length: int,
    batch_size: int,
    steps: int,
    packing: bool,
    dtype: str,
) -> dict[str, Any]:
    """The same with TRL and PEFT, in the Python that has them."""
    line = [python, str(ROOT / "tests" / "parity" / "peer_trl.py"), "--model", model, "--data", data]
    line += ["--method", method, "--max_length", str(max_length)]
    line += ["--batch_size", str(batch_size), "--steps", str(steps)]
    line += ["--packing"] * packing + ["--float32"] * (dtype == "float32")
    output, peak = run(line)
    result = json.loads(output.strip().splitlines()[-1])
    seconds = sum(result["seconds"])
    return {
        "tokens_per_second": sum(result["real_tokens"]) / seconds,
        "step_seconds": statistics.mean(result["seconds"]),
        "real_tokens": sum(result["real_tokens"]),
        "peak_bytes": peak,
        "versions": result["versions"],
    }


def train_in(folder: Path, fields: dict[str, Any]) -> int:
    """Runs the main program in `folder` with these settings, unless such a run is finished there (0 then).

    Returns:
      the largest resident memory of its process in bytes.
    """
    flags = [f"--config.{name}={value}" for name, value in {**fields, "run_dir": str(folder)}.items()]
    line = [sys.executable, "-m", "sftjax.main", f"--config={ROOT / 'configs' / 'smollm2_135m.py'}", *flags]
    return 0 if (folder / "summary.json").exists() else run(line)[1]


def run(line: list[str]) -> tuple[str, int]:
    """Runs a program; its standard output, and the largest resident memory of its process in bytes."""
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    peak = [0]

    def watch() -> None:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak[0] = max(peak[0], int(status.split("VmHWM:")[1].split()[0]) * 1024)
            except (OSError, IndexError):
                return
            time.sleep(0.2)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    output, errors = process.communicate()
    watcher.join()
    if process.returncode:
        raise ConfigError(f"{' '.join(line[:3])} failed: {errors.strip().splitlines()[-1] if errors else '?'}")
    return output, peak[0]


def generation(*, model: str, data: str, prompts: int, new_tokens: int, batch_size: int, dtype: str) -> dict[str, Any]:
    """Greedy answers of `new_tokens` tokens each to the first messages of `prompts` conversations; compiled before."""
    from sftjax import chat

    generator = chat.load(model, dtype=dtype, batch_size=batch_size)
    conversations = [[{"role": "user", "content": text}] for text in openings(data, prompts)]
    answer = functools.partial(generator.generate, conversations, max_new_tokens=new_tokens, stop_ids=())
    answer()
    begun = time.monotonic()
    outputs = answer()
    seconds = time.monotonic() - begun
    return {"tokens_per_second": sum(len(output.tokens) for output in outputs) / seconds, "seconds": seconds}


def peer_generation(
    *, python: str, model: str, data: str, prompts: int, new_tokens: int, batch_size: int, dtype: str
) -> dict[str, Any]:
    """The same with transformers' `generate`, batched and padded in front, in the Python that has torch."""
    line = [python, str(ROOT / "tests" / "parity" / "peer_generate.py"), "--model", model, "--dtype", dtype]
    line += ["--new_tokens", str(new_tokens), "--batch_size", str(batch_size)]
    with tempfile.TemporaryDirectory(prefix="sftjax-bench-") as folder:
        path = Path(folder) / "prompts.json"
        path.write_text(json.dumps(openings(data, prompts)))
        output, _ = run([*line, "--prompts", str(path)])
    return json.loads(output.strip().splitlines()[-1])


def openings(data: str, count: int) -> list[str]:
    """The first message of each of the first `count` conversations in a JSONL with messages."""
    found = [line["messages"][0]["content"] for line in read_lines(data)[:count]]
    if len(found) < count:
        raise ConfigError(f"{data}: has {len(found)} conversations, {count} are wanted")
    return found


def compare_generation(*, peer_python: str, repeats: int, **settings: Any) -> dict[str, Any]:
    """`generation` and the peer in turn."""
    programs = {"sftjax": functools.partial(generation, **settings)}
    if peer_python:
        programs["transformers"] = functools.partial(peer_generation, python=peer_python, **settings)
    return in_turn(programs, repeats, settings, ("tokens_per_second", "seconds"))


def compare(*, peer_python: str, repeats: int, **settings: Any) -> dict[str, Any]:
    """Training, `ours` and the peer in turn."""
    programs = {"sftjax": functools.partial(ours, **settings)}
    if peer_python:
        programs["trl"] = functools.partial(peer_trl, python=peer_python, **settings)
    return in_turn(programs, repeats, settings, ("tokens_per_second", "step_seconds", "peak_bytes"))


def in_turn(
    programs: dict[str, Callable[[], dict[str, Any]]], repeats: int, settings: dict[str, Any], figures: tuple[str, ...]
) -> dict[str, Any]:
    """Each in turn, `repeats` times; medians of the figures, and of the ratio to the second, pair by pair."""
    pairs = [{name: program() for name, program in programs.items()} for _ in range(repeats)]
    result: dict[str, Any] = {"settings": settings, "pairs": pairs}
    for name in programs:
        result[name] = {key: statistics.median(pair[name][key] for pair in pairs) for key in figures}
    if len(programs) == 2:
        first, second = programs
        result["ratio"] = statistics.median(
            pair[first]["tokens_per_second"] / pair[second]["tokens_per_second"] for pair in pairs
        )
    return result
