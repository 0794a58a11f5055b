"""Figures of evaluations kept with a run, where its report finds them.

`evaluations.jsonl` in the run's folder, a figure a line: {"name", "metric", "before", "after", "low", "high"}; the last
two bound the difference (95 %), null where that isn't known. An evaluation takes an earlier one's place that has its
name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from sftjax import paths, report
from sftjax.errors import ConfigError
from sftjax.utils import storage

FILE = "evaluations.jsonl"


def models_of(run: str) -> tuple[str, str | None, str]:
    """(model, adapter, base) of a finished run: what it exported, and what it started from.

    Raises:
      ConfigError: not a run's folder, or one without an export.
    """
    try:
        with open(os.path.join(run, "config.json"), encoding="utf-8") as file:
            base = paths.found(json.load(file)["model"]["path"], paths.working_folder(run))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{run}: no config.json of a run in it") from error
    export = os.path.join(run, "export")
    if os.path.exists(os.path.join(export, "adapter_config.json")):
        return base, export, base
    if not os.path.exists(os.path.join(export, "config.json")):
        raise ConfigError(f"{run}: nothing was exported; let the run finish, or give --model and --base")
    return export, None, base


def record(run: str, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds an evaluation's figures to a run, and writes its report anew."""
    path = os.path.join(run, FILE)
    kept: list[dict[str, Any]] = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            kept = [row for row in map(json.loads, file) if row["name"] != name]
    with storage.whole_file(path) as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in [*kept, *({"name": name, **row} for row in rows)])
    report.write(run)


def of_summary(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of `evaluations.jsonl` that an evaluation's summary gives."""
    before, after, change = summary.get("base"), summary["model"], summary.get("difference", {})
    rows = []

    def add(metric: str, old: Any, new: Any, interval: Mapping[str, Any] | None = None) -> None:
        interval = interval or {}
        rows.append(
            {"metric": metric, "before": old, "after": new, "low": interval.get("low"), "high": interval.get("high")}
        )

    if "all" in after["loss"]:
        old = before["loss"]["all"]["loss"] if before and "all" in before["loss"] else None
        add("response loss", old, after["loss"]["all"]["loss"], change.get("loss"))
    for name, score in after["scores"].items():
        old = before["scores"][name]["mean"] if before else None
        add(name, old, score["mean"], change.get("scores", {}).get(name))
    for name in ("stop_rate", "mean_tokens", "repeated_4grams", "commonest_opening_share"):
        add(name.replace("_", " "), before["answers"][name] if before else None, after["answers"][name])
    if summary.get("kl_to_base") is not None:
        add("KL to the base", 0.0, summary["kl_to_base"])
    if "judge" in summary:
        add(f"win rate ({summary['judge']['model']})", None, summary["judge"]["win_rate"]["mean"])
    return rows


def of_harness(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same of two results of lm-evaluation-harness: {task: {"metric,filter": value, "metric_stderr,filter": ...}}.

    The interval is that of two independent means: wider than it is, as both answered the same items.
    """
    rows = []
    for task, figures in after.items():
        for key, value in figures.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or metric in ("alias", "sample_len"):
                continue
            old = (before or {}).get(task, {}).get(key)
            spread = [part.get(task, {}).get(f"{metric}_stderr,{filtered}") for part in (before or {}, after)]
            row = {"metric": f"{task}: {metric}", "before": old, "after": value, "low": None, "high": None}
            if old is not None and all(isinstance(one, int | float) for one in spread):
                width = 1.96 * sum(one**2 for one in spread) ** 0.5
                row |= {"low": value - old - width, "high": value - old + width}
            rows.append(row)
    return rows
