"""Training speed as a user gets it: real tokens per second and peak memory of the main program, and of a peer."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
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


def compare(*, peer_python: str, repeats: int, **settings: Any) -> dict[str, Any]:
    """Both in turn, `repeats` times; medians, and the ratio pair by pair."""
    pairs = []
    for _ in range(repeats):
        pair = {"sftjax": ours(**settings)}
        if peer_python:
            pair["trl"] = peer_trl(python=peer_python, **settings)
        pairs.append(pair)
    result: dict[str, Any] = {"settings": settings, "pairs": pairs}
    for name in pairs[0]:
        result[name] = {
            key: statistics.median(pair[name][key] for pair in pairs)
            for key in ("tokens_per_second", "step_seconds", "peak_bytes")
        }
    if peer_python:
        result["ratio"] = statistics.median(
            pair["sftjax"]["tokens_per_second"] / pair["trl"]["tokens_per_second"] for pair in pairs
        )
    return result
