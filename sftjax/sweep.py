"""Small sweeps: one run for each combination of some settings, one after the other, and a page that compares them.

    --sweep "train.learning_rate=1e-5|2e-5|5e-5;peft.r=8|16"        six runs

Each has a folder of its own in `run_dir`, named after its settings. The same command goes on where it was stopped:
finished runs aren't trained again, an interrupted one continues. `sweep.json` and `sweep.html` in `run_dir` are written
anew after each run.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import os
import re
import statistics
from collections.abc import Sequence
from typing import Any

import jax

from sftjax import config as config_lib
from sftjax import finished, report, runs, train
from sftjax.charts import Series, number, smooth
from sftjax.errors import ConfigError, Diverged, Preempted, UserError
from sftjax.job import check_finished
from sftjax.utils import storage
from sftjax.utils.storage import is_remote

MAX_CURVES = 8  # colours that an eye can tell apart
STYLES = "abcdefgh"


# --- what is swept ----------------------------------------------------------------------------------------------------


def parse(text: str, config: config_lib.ConfigDict) -> list[dict[str, Any]]:
    """The settings of each run: {field: value}, the last field changing fastest.

    Args:
      text: FIELD=VALUE|VALUE|...;FIELD=VALUE|...
      config: says which fields there are, and of which type.

    Raises:
      ConfigError: a field doesn't exist, is given twice or without values, or a value isn't of its type.
    """
    axes: dict[str, list[Any]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        field, equals, values = part.partition("=")
        field = field.strip().removeprefix("config.")
        if not equals or not values.strip():
            raise ConfigError(f"--sweep: {part!r}: give FIELD=VALUE|VALUE, several of them parted by ;")
        if field not in config_lib.field_names(config):
            raise ConfigError("--sweep: " + config_lib.unknown_field(field, config))
        if field in axes or field == "run_dir":
            reason = "each run has a folder of its own" if field == "run_dir" else "it is given twice"
            raise ConfigError(f"--sweep: {field}: {reason}")
        axes[field] = [_value(field, value.strip(), config) for value in values.split("|")]
        if len(set(map(repr, axes[field]))) < len(axes[field]):
            raise ConfigError(f"--sweep: {field}: a value is there twice in {values!r}")
    if not axes:
        raise ConfigError("--sweep is empty: give FIELD=VALUE|VALUE")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _value(field: str, text: str, config: config_lib.ConfigDict) -> Any:
    """Text as a value of the field's type."""
    now = _get(config, field)
    try:
        if isinstance(now, bool):
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if isinstance(now, int | float):
            return type(now)(text)
        if isinstance(now, str):
            return text
        value = ast.literal_eval(text)
        return value if isinstance(value, tuple) else (value,)
    except (KeyError, ValueError, SyntaxError) as error:
        raise ConfigError(f"--sweep: {field}: {text!r} is not of the type of {now!r}") from error


def names(grid: Sequence[dict[str, Any]]) -> list[str]:
    """A folder's name for each run: learning_rate=1e-05,r=8."""
    fields = list(grid[0])
    leaves = [field.rsplit(".", 1)[-1] for field in fields]
    short = leaves if len(set(leaves)) == len(leaves) else fields
    found = [
        ",".join(f"{name}={_word(value)}" for name, value in zip(short, settings.values(), strict=True))
        for settings in grid
    ]
    return [name if found.count(name) == 1 else f"{index},{name}" for index, name in enumerate(found)]


def _word(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "_", text).strip("_.")[-60:] or "none"


def _get(config: config_lib.ConfigDict, field: str) -> Any:
    for key in field.split("."):
        config = config[key]
    return config


def configs(config: config_lib.ConfigDict, grid: Sequence[dict[str, Any]]) -> list[config_lib.ConfigDict]:
    """The configuration of each run."""
    found = []
    for name, settings in zip(names(grid), grid, strict=True):
        one = config_lib.from_json(config_lib.to_json(config))
        for field, value in settings.items():
            group, _, key = field.rpartition(".")
            (_get(one, group) if group else one)[key] = value
        one.run_dir = f"{config.run_dir.rstrip('/')}/{name}"
        found.append(one)
    return found


# --- running ----------------------------------------------------------------------------------------------------------


def run(config: config_lib.ConfigDict, text: str, *, allow: Sequence[str] = (), dry_run: bool = False) -> int:
    """Trains each combination that isn't finished yet. A run that fails is noted, and the next one begins.

    Returns:
      0, or the exit code of the first run that failed.

    Raises:
      ConfigError: the sweep, or the settings of one of its runs, can't be; nothing has been trained then.
      Preempted: asked to stop; the same command continues.
    """
    grid = parse(text, config)
    each = configs(config, grid)
    earlier = {entry["name"]: entry for entry in _earlier(config.run_dir)}
    for one in each:
        config_lib.check(one, num_devices=jax.device_count())
        folder = runs.RunFolder.open(one.run_dir, dry_run=True)
        if folder.read_json(finished.SUMMARY):
            check_finished(one, folder)
    results = [{"name": name, "settings": settings} for name, settings in zip(names(grid), grid, strict=True)]
    code = 0
    for position, (one, result) in enumerate(zip(each, results, strict=True), 1):
        print(f"\nsweep: run {position} of {len(each)}, {result['name']}")
        before = earlier.get(result["name"], {})
        if before.get("status") == "diverged" and os.path.exists(f"{one.run_dir}/config.json"):
            print(f"it diverged before; remove {one.run_dir} to try it again")
            error: UserError | None = Diverged(before["error"])
        else:
            error = _train(one, allow, dry_run)
        if dry_run:
            if error:
                raise error
            continue
        if error:
            result |= {"status": "diverged" if isinstance(error, Diverged) else "failed", "error": str(error)}
            code = code or error.exit_code
            print(f"sweep: {result['name']} failed: {error}")
        write(config.run_dir, results)
    return code


def _train(config: config_lib.ConfigDict, allow: Sequence[str], dry_run: bool) -> UserError | None:
    try:
        train.run(config, allow=allow, dry_run=dry_run)
    except Preempted:
        raise
    except UserError as error:
        return error
    return None


def _earlier(folder: str) -> list[dict[str, Any]]:
    try:
        with open(f"{folder}/sweep.json", encoding="utf-8") as file:
            return json.load(file)["runs"]
    except (OSError, ValueError, KeyError):
        return []


# --- comparing --------------------------------------------------------------------------------------------------------


def write(folder: str, results: Sequence[dict[str, Any]]) -> None:
    """Writes `sweep.json` and `sweep.html`: {"best", "runs": [{"name", "settings", "status", "error"?, "figures"}]}.

    "best" is the name of the run with the lowest held-out loss (without held-out data: null).
    """
    if jax.process_index() != 0:
        return
    read = [report.Run(f"{folder}/{result['name']}") for result in results]
    entries = [
        {"status": "done" if one.summary else "waiting", **result, "figures": figures(one)}
        for result, one in zip(results, read, strict=True)
    ]
    done = [entry for entry in entries if entry["figures"].get("eval_loss") is not None and entry["status"] == "done"]
    best = min(done, key=lambda entry: entry["figures"]["eval_loss"], default=None)
    if not is_remote(folder):
        os.makedirs(folder, exist_ok=True)
    summary = {"best": best and best["name"], "runs": entries}
    storage.write_text(f"{folder}/sweep.json", json.dumps(runs.redact(summary), indent=2) + "\n")
    page = report.templates().get_template("sweep.html.j2").render(_page(folder, summary, read))
    storage.write_text(f"{folder}/sweep.html", page)
    if all(entry["status"] != "waiting" for entry in entries):
        print(f"sweep:   {folder}/sweep.html" + (f"  (lowest held-out loss: {best['name']})" if best else ""))


def figures(run: report.Run) -> dict[str, Any]:
    """What is compared; None where a run doesn't have it, or it is no number."""
    rates = [line["tokens_per_second"] for line in run.timing if line.get("tokens_per_second")]
    losses = [line["loss"] for line in run.train if line["loss"] is not None]
    last = losses[-max(1, len(losses) // 10) :]
    after = _finite(run.summary.get("eval_loss_after"))
    return {
        "steps": run.summary.get("steps"),
        "eval_loss_before": _finite(run.summary.get("eval_loss_before")),
        "eval_loss": after,
        "difference_95": run.summary.get("difference_95") if after is not None else None,
        "training_loss": statistics.fmean(last) if last else None,
        "tokens_per_second": statistics.median(rates) if rates else None,
        "findings": [finding["rule"] for finding in run.findings],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _page(folder: str, summary: dict[str, Any], read: Sequence[report.Run]) -> dict[str, Any]:
    fields = list(summary["runs"][0]["settings"])
    order = sorted(range(len(read)), key=lambda index: _rank(summary["runs"][index]))
    drawn = sorted(order[:MAX_CURVES])
    return {
        "name": os.path.basename(folder.rstrip("/")),
        "fields": fields,
        "best": summary["best"],
        "rows": [_row(entry) for entry in summary["runs"]],
        "left_out": len(read) - len(drawn),
        "charts": [chart for chart in _charts(summary["runs"], read, drawn) if chart],
    }


def _rank(entry: dict[str, Any]) -> tuple[bool, float]:
    loss = entry["figures"]["eval_loss"]
    loss = entry["figures"]["training_loss"] if loss is None else loss
    return loss is None, math.inf if loss is None else loss


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    values, interval = entry["figures"], entry["figures"]["difference_95"]
    return {
        "name": entry["name"],
        "settings": [number(value) if isinstance(value, float) else str(value) for value in entry["settings"].values()],
        "status": entry["status"],
        "error": entry.get("error", ""),
        "before": _loss(values["eval_loss_before"]),
        "after": _loss(values["eval_loss"]),
        "interval": f"{interval[0]:+.3f} to {interval[1]:+.3f}" if interval else "",
        "training": _loss(values["training_loss"]),
        "speed": f"{values['tokens_per_second']:,.0f}" if values["tokens_per_second"] else "",
        "findings": ", ".join(rule.replace("_", " ") for rule in values["findings"]),
    }


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _charts(entries, read: Sequence[report.Run], drawn: Sequence[int]) -> list[dict[str, Any] | None]:
    held_out, training = [], []
    for style, index in zip(STYLES, drawn, strict=False):
        name, run = entries[index]["name"], read[index]
        lines = [line for line in run.evals if "step" in line]
        held_out.append(
            Series(name, [line["step"] for line in lines], [line["eval_loss"] for line in lines], style, True)
        )
        lines = [line for line in run.train if "step" in line]
        losses = smooth([line["loss"] for line in lines], max(1.0, len(lines) / 50))
        training.append(Series(name, [line["step"] for line in lines], losses, style))
    return [
        report.chart("Held-out loss", "nats per trained token", held_out),
        report.chart("Training loss, smoothed", "nats per trained token", training),
    ]
