"""Tuning methods beside each other on one model: the same data, seed and steps, one run of the main program each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sftjax.bench import train_in
from sftjax.errors import ConfigError
from sftjax.runlog import read_lines

ADAPTER = {"peft.r": 16, "peft.lora_alpha": 32.0, "train.learning_rate": 3e-4}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"peft.method": "lora", **ADAPTER},
    "qlora": {"peft.method": "lora", "peft.quantization": "nf4", **ADAPTER},
    "dora": {"peft.method": "dora", **ADAPTER},
    "adapters": {"peft.method": "houlsby", "peft.bottleneck_size": 64, "train.learning_rate": 1e-3},
    "full": {"train.learning_rate": 5e-5},
    "full_8bit": {"train.learning_rate": 5e-5, "train.optim": "adamw_8bit"},
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What one method came to.

    Attributes:
      loss_before, loss_after: held-out response loss, nats per trained token.
      trainable: parameters; state_bytes: what the optimizer keeps for them; frozen_bytes: of the weights not trained.
      peak_bytes: largest resident memory of the process.
      tokens_per_second: real tokens, over the last twenty steps.
    """

    method: str
    seed: int
    loss_before: float
    loss_after: float
    trainable: int
    state_bytes: int
    frozen_bytes: int
    peak_bytes: int
    tokens_per_second: float


def compare(
    *,
    model: str,
    data: str,
    held_out: str,
    folder: str,
    methods: Sequence[str] = tuple(METHODS),
    seeds: Sequence[int] = (0,),
    steps: int = 40,
    batch_size: int = 1,
    max_length: int = 1024,
    eval_rows: int = 40,
    say: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Trains with each method and seed, in `folder/METHOD-SEED`; a run that is finished there isn't repeated.

    Raises:
      ConfigError: a method isn't known, or a run fails.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ConfigError(f"unknown method {unknown[0]!r}: choose from {', '.join(METHODS)}")
    shared = short_run(model=model, steps=steps, batch_size=batch_size, max_length=max_length, eval_rows=eval_rows) | {
        "data.train": f"('{data}',)",
        "data.eval": f"('{held_out}',)",
    }
    results = []
    for seed in seeds:
        for method in methods:
            result = _one(Path(folder) / f"{method}-{seed}", method, seed, {**shared, **METHODS[method]})
            say(f"{method}, seed {seed}: {result.loss_before:.4f} -> {result.loss_after:.4f}")
            results.append(result)
    return results


def short_run(*, model: str, steps: int, max_length: int, eval_rows: int, batch_size: int = 1) -> dict[str, Any]:
    """Settings of a run that is there to be measured: evaluated before and after, nothing exported."""
    return {
        "model.path": model,
        "data.eval_fraction": 0.0,
        "data.max_eval_rows": eval_rows,
        "data.max_length": max_length,
        "data.over_length": "split",
        "train.batch_size": batch_size,
        "train.max_steps": steps,
        "train.warmup_ratio": 0.1,
        "eval.num_samples": 0,
        "eval.eval_steps": 0,
        "export.enabled": False,
        "log.tensorboard": False,
    }


def _one(folder: Path, method: str, seed: int, fields: dict[str, Any]) -> Result:
    done = folder / "method.json"
    if done.exists():
        return Result(**json.loads(done.read_text()))
    peak = train_in(folder, {**fields, "seed": seed})
    summary = json.loads((folder / "summary.json").read_text())
    sizes = json.loads((folder / "model.json").read_text())
    result = Result(
        method,
        seed,
        summary["eval_loss_before"],
        summary["eval_loss_after"],
        sizes["parameters"]["trainable"],
        sizes["bytes"]["optimizer"],
        sizes["bytes"]["frozen"],
        peak,
        read_lines(str(folder / "timing.jsonl"))[-1]["tokens_per_second"],
    )
    done.write_text(json.dumps(dataclasses.asdict(result)))
    return result


def table(results: Sequence[Result]) -> str:
    """As Markdown; figures of several seeds are means, with the range of the loss."""
    lines = [
        "| method | held-out loss | trainable | optimizer state | frozen weights | peak memory | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == method]
        losses = [result.loss_after for result in own]
        spread = f" ({min(losses):.4f} to {max(losses):.4f})" if len(own) > 1 else ""
        first = own[0]
        lines.append(
            f"| {method} | {first.loss_before:.4f} → {sum(losses) / len(own):.4f}{spread} | {first.trainable:,} "
            f"| {first.state_bytes / 2**20:,.1f} MiB ({first.state_bytes / first.trainable:.2f} bytes each) "
            f"| {first.frozen_bytes / 2**20:,.1f} MiB | {max(r.peak_bytes for r in own) / 2**30:.2f} GiB "
            f"| {sum(r.tokens_per_second for r in own) / len(own):.0f} |"
        )
    return "\n".join(lines)
