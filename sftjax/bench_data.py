"""What a choice of data is worth, measured: curation against the original and a random choice, and replayed text."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sftjax.bench import train_in
from sftjax.bench_methods import METHODS, short_run
from sftjax.curate import run as curation
from sftjax.curate.settings import Settings
from sftjax.runlog import read_lines

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Result:
    """What one run came to. `losses`: of the evaluation after training by name, nats a token; `before`: at step 0."""

    variant: str
    seed: int
    rows: int
    before: dict[str, float]
    losses: dict[str, float]


def curated(
    *, data: str, held_out: str, folder: str, seeds: Sequence[int], settings: dict[str, Any], say: Say
) -> list[Result]:
    """Trains on all rows, on what curation keeps of them, and on as many chosen at random; measured on held-out rows
    that curation would keep.

    Args:
      settings: of every run, see `bench.train_in`.
    """
    kept = _curate(data, f"{folder}/curated")
    clean = _curate(held_out, f"{folder}/held_out")
    lines = Path(data).read_text(encoding="utf-8").splitlines(keepends=True)
    count = len(kept.read_text(encoding="utf-8").splitlines())
    results = []
    for seed in seeds:
        chance = Path(folder) / f"random-{seed}.jsonl"
        chance.write_text("".join(random.Random(seed).sample(lines, count)), encoding="utf-8")
        for variant, path, rows in (("all", data, len(lines)), ("curated", kept, count), ("random", chance, count)):
            fields = {**settings, "data.train": f"('{path}',)", "data.eval": f"('{clean}',)", "seed": seed}
            results.append(_one(Path(folder) / f"{variant}-{seed}", variant, rows, fields))
            say(f"{variant}, seed {seed}: {results[-1].losses['eval_loss']:.4f}")
    return results


def _curate(data: str, folder: str) -> Path:
    """The file of the rows that are kept, by the default rules."""
    kept = Path(folder) / "kept.jsonl"
    if not kept.exists():
        curation.curate(Settings(sources=(data,), output=folder))
    return kept


def replayed(
    *,
    data: str,
    held_out: str,
    text: str,
    folder: str,
    seeds: Sequence[int],
    shares: Sequence[float],
    settings: dict[str, Any],
    say: Say,
) -> list[Result]:
    """Trains with shares of plain text (of the tokens) replayed; half of the text is held out."""
    lines = Path(text).read_text(encoding="utf-8").splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    parts = {"replay": lines[: len(lines) // 2], "plain": lines[len(lines) // 2 :]}
    for name, part in parts.items():
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    shared = {
        **settings,
        "data.train": f"('{data}',)",
        "data.eval": f"('{held_out}',)",
        "eval.forgetting": f"('{folder}/plain.jsonl',)",
        "data.shares_of": "tokens",
    }
    results = []
    for seed in seeds:
        for share in shares:
            replay = {"data.replay": f"('{folder}/replay.jsonl',)", "data.replay_share": share} if share else {}
            variant = f"replay {share:.0%}"
            result = _one(Path(folder) / f"replay-{share}-{seed}", variant, 0, {**shared, **replay, "seed": seed})
            results.append(result)
            say(f"{variant}, seed {seed}: {result.losses}")
    return results


def settings(**sizes: Any) -> dict[str, Any]:
    """A short LoRA run; see `bench_methods.short_run`. Rows that give nothing are a part of what is compared."""
    return {**short_run(**sizes), **METHODS["lora"], "data.max_dropped_fraction": 1.0}


def _one(folder: Path, variant: str, rows: int, fields: dict[str, Any]) -> Result:
    train_in(folder, fields)
    lines = [line for line in read_lines(f"{folder}/metrics.jsonl") if "eval_loss" in line]
    before, after = (
        {name: line[name] for name in ("eval_loss", "plain_text_loss") if name in line}
        for line in (lines[0], lines[-1])
    )
    return Result(variant, fields["seed"], rows, before, after)


def table(results: Sequence[Result]) -> str:
    """As Markdown: the loss of each seed, their mean, and the mean difference from the first variant, seed by seed."""
    names = list(results[0].losses)
    seeds = sorted({result.seed for result in results})
    titles = {"eval_loss": "held-out conversations", "plain_text_loss": "held-out plain text"}
    head = [f"{titles[name]}, seed {', '.join(map(str, seeds))}" for name in names]
    lines = ["| trained on | " + " | ".join(f"{title} | mean | difference" for title in head) + " |"]
    lines.append("|---|" + "---|---|---|" * len(names))
    first = {result.seed: result for result in results if result.variant == results[0].variant}
    before = [_cells([results[0].before[name]], None) for name in names]
    lines.append("| nothing | " + " | ".join(before) + " |")
    for variant in dict.fromkeys(result.variant for result in results):
        own = [result for result in results if result.variant == variant]
        rows = f" ({own[0].rows:,} rows)" if own[0].rows else ""
        cells = [
            _cells([r.losses[name] for r in own], [r.losses[name] - first[r.seed].losses[name] for r in own])
            for name in names
        ]
        lines.append(f"| {variant}{rows} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(losses: Sequence[float], differences: Sequence[float] | None) -> str:
    apart = "" if differences is None else f"{statistics.fmean(differences):+.4f}"
    if differences is not None and len(differences) > 1:
        apart += f" ({min(differences):+.4f} to {max(differences):+.4f})"
    return f"{', '.join(f'{loss:.4f}' for loss in losses)} | {statistics.fmean(losses):.4f} | {apart}"


def to_json(results: Sequence[Result]) -> str:
    return json.dumps([dataclasses.asdict(result) for result in results], indent=2)
