"""The run's page and the model's card, made from the run folder's files and nothing else.

`report.html` is one file that opens offline: curves, samples before and after, the data ledger, coloured masks,
configuration, environment, throughput, verification. A missing file leaves out its section. Everything that comes
from the run is escaped; it may hold any text.

Files read: summary.json, config.json, environment.json, preflight.json, verification.json, metrics.jsonl, timing.jsonl,
samples.jsonl ({"step", "messages", "answer", ...}), doctor.json and masks.jsonl, one line for each sample shown:
{"row" (its place), "source", "index", "sample", "pieces": [{"text", "weight"}, ...]} (stretches of equal weight; 0 is
not trained).
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import fsspec
import jinja2

from sftjax.charts import NARROW, WIDE, Series, line_chart, number, smooth
from sftjax.held_out import Difference
from sftjax.utils import storage

MAX_MASKS, MAX_PROMPTS, MAX_TEXT = 12, 12, 6000
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write(folder: str, summary: Mapping[str, Any] | None = None) -> str:
    """Writes `report.html` into a run folder; returns its path.

    Args:
      summary: of a run that is about to be finished; else that of its summary.json.

    Raises:
      StorageError: it can't be written.
    """
    path = f"{folder}/report.html"
    text = templates().get_template("report.html.j2").render(page(folder, summary))
    storage.write_text(path, text)
    return path


def model_card(folder: str, summary: Mapping[str, Any] | None = None) -> str:
    """The README.md of the exported model, from the run's own numbers (no paths of this machine in it)."""
    return templates().get_template("model_card.md.j2").render(_card(Run(folder, summary)))


def templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sftjax", "."),
        autoescape=jinja2.select_autoescape(("html.j2",)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "percent": _percent, "yaml": json.dumps, "fence": _fence, "cell": _cell}
    return environment


# --- reading ----------------------------------------------------------------------------------------------------------


class Run:
    """What the files of a run folder hold; empty where they are missing or broken.

    Args:
      folder: the run's.
      summary: of a run that is about to be finished, which has no summary.json yet.
    """

    def __init__(self, folder: str, summary: Mapping[str, Any] | None = None):
        self.folder = folder
        self.name = os.path.basename(folder.rstrip("/")) or folder
        self.summary, self.config, self.environment, self.preflight, self.model = (
            self._json(f"{name}.json") for name in ("summary", "config", "environment", "preflight", "model")
        )
        if summary is not None:
            self.summary = dict(summary)
        self.verification = self._json("verification.json") or self._json("export/verification.json")
        metrics = self._lines("metrics.jsonl")
        self.train = [line for line in metrics if "loss" in line]
        self.evals = [line for line in metrics if "eval_loss" in line or "plain_text_loss" in line]
        self.timing = self._lines("timing.jsonl")
        self.samples = self._lines("samples.jsonl")
        self.masks = self._lines("masks.jsonl")
        self.nonfinite = self._lines("nonfinite.jsonl")
        self.evaluations = self._lines("evaluations.jsonl")  # of tools/evaluate.py and tools/harness.py
        self.findings = self._json("doctor.json").get("findings", [])

    def _text(self, name: str) -> str:
        try:
            with fsspec.open(f"{self.folder}/{name}", "r", encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError:
            return ""

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads(self._text(name))
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def _lines(self, name: str) -> list[dict[str, Any]]:
        lines = []
        for line in self._text(name).splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed
            if isinstance(value, dict):
                lines.append(value)
        return lines


# --- the page ---------------------------------------------------------------------------------------------------------


def page(folder: str, summary: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything that `report.html.j2` shows."""
    run = Run(folder, summary)
    return {
        "name": run.name,
        "subtitle": _subtitle(run),
        "tiles": _tiles(run),
        "findings": run.findings,
        "charts": _charts(run),
        "prompts": _prompts(run.samples),
        "evaluations": [_evaluation(line) for line in run.evaluations],
        "ledger": _ledger(run.preflight),
        "warnings": _strings(run.preflight.get("warnings")),
        "sources": _sources(run.preflight),
        "masks": [_mask(line) for line in run.masks[:MAX_MASKS]],
        "throughput": _throughput(run),
        "verification": _rows(run.verification),
        "config": _sections(run.config),
        "environment": _environment(run.environment),
    }


def _subtitle(run: Run) -> str:
    model = _get(run.config, "model", "path")
    method = _get(run.config, "peft", "method")
    devices = run.environment.get("device_count")
    kind = run.environment.get("device_kind")
    parts = [
        os.path.basename(str(model).rstrip("/")) if model else "",
        "full fine-tuning" if method in ("none", "full") else str(method or ""),
        f"{devices} × {kind}" if devices else "",
    ]
    return " · ".join(part for part in parts if part)


def _tiles(run: Run) -> list[dict[str, str]]:
    """The few figures that matter, largest first."""
    tiles = []
    before, after = _before_after(run)
    if before is not None and after is not None:
        found = difference(run.summary)
        note = str(found) if found else f"{after - before:+.4f}"
        good = "good" if found and found.fell else "bad" if found and found.rose else ""
        tiles.append({"label": "held-out loss", "value": f"{before:.3f} → {after:.3f}", "note": note, "class": good})
    elif run.train:
        tiles.append({"label": "training loss", "value": _number(run.train[-1]["loss"]), "note": "last step"})
    if run.train:
        last = run.train[-1]
        planned = run.preflight.get("steps")
        note = f"of {planned:,}" if isinstance(planned, int) and planned != last.get("step") else ""
        tiles.append({"label": "steps", "value": _number(last.get("step")), "note": note})
        if last.get("num_tokens"):
            trained = last.get("num_trained_tokens")
            note = f"{_number(trained)} with a loss" if trained else ""
            tiles.append({"label": "tokens read", "value": _number(last["num_tokens"]), "note": note})
    rates = [line["tokens_per_second"] for line in run.timing if line.get("tokens_per_second")]
    if rates:
        trained = [line["trained_tokens_per_second"] for line in run.timing if line.get("trained_tokens_per_second")]
        note = f"{statistics.median(trained):,.0f} trained" if trained else ""
        tiles.append({"label": "tokens / s", "value": f"{statistics.median(rates):,.0f}", "note": note})
    if "passed" in run.verification:
        passed = bool(run.verification["passed"])
        note = f"largest difference {_number(run.verification.get('max_difference'))}"
        value, style = ("verified", "good") if passed else ("differs", "bad")
        tiles.append({"label": "export", "value": value, "note": note, "class": style})
    return tiles


def _before_after(run: Run) -> tuple[float | None, float | None]:
    if "eval_loss_before" in run.summary:
        return run.summary["eval_loss_before"], run.summary.get("eval_loss_after")
    losses = [line["eval_loss"] for line in run.evals if isinstance(line.get("eval_loss"), int | float)]
    return (losses[0], losses[-1]) if len(losses) > 1 else (None, None)


def difference(summary: Mapping[str, Any], prefix: str = "") -> Difference | None:
    """What a run's summary says of its held-out loss, or (prefix "plain_text_") of the loss of plain text; None where
    it says nothing."""
    loss = prefix or "eval_"
    values = (summary.get(f"{loss}loss_before"), summary.get(f"{loss}loss_after"))
    interval = summary.get(f"{prefix}difference_95")
    if not isinstance(interval, list) or len(interval) != 2:
        return None
    found = Difference(*values, *interval)
    return found if all(isinstance(value, int | float) for value in found) else None


def _charts(run: Run) -> list[dict[str, Any]]:
    def of(lines: Iterable[Mapping[str, Any]], name: str, label: str, style: str, dots: bool = False) -> Series:
        chosen = [line for line in lines if name in line and "step" in line]
        return Series(label, [line["step"] for line in chosen], [line[name] for line in chosen], style, dots)

    loss = of(run.train, "loss", "training", "a")
    lines = [loss]
    if len(loss.xs) > 40:
        smoothed = smooth(loss.ys, len(loss.xs) / 50)
        lines = [loss._replace(style="faint"), Series("training, smoothed", loss.xs, smoothed, "a")]
    held_out = of(run.evals, "eval_loss", "held-out", "b", dots=True)
    accuracy = of(run.train, "mean_token_accuracy", "training", "a")
    charts = [
        chart("Loss", "nats per trained token", [*lines, held_out]),
        chart(
            "Token accuracy",
            "share of trained tokens guessed right",
            [accuracy, of(run.evals, "eval_mean_token_accuracy", "held-out", "b", dots=True)],
        ),
        chart("Gradient norm", "before clipping", [of(run.train, "grad_norm", "gradient norm", "c")], from_zero=True),
        chart("Learning rate", "", [of(run.train, "learning_rate", "learning rate", "d")], from_zero=True),
    ]
    plain = of(run.evals, "plain_text_loss", "plain text", "b", dots=True)
    moved = of(run.evals, "kl_to_base", "KL to the base", "c", dots=True)
    charts.append(chart("Forgetting", "nats per token of held-out plain text", [plain]))
    charts.append(chart("KL to the base", "nats, at answer tokens of held-out samples", [moved], from_zero=True))
    sources = sorted({name for line in run.evals for name in line if name.startswith("eval_loss/")})
    if sources:
        per_source = [
            of(run.evals, name, name.split("/", 1)[1], "abcd"[index % 4], dots=True)
            for index, name in enumerate(sources[:8])
        ]
        charts.insert(1, chart("Held-out loss by source", "nats per trained token", per_source))
    return [chart for chart in charts if chart]


def chart(title: str, unit: str, series: Sequence[Series], from_zero: bool = False) -> dict[str, Any] | None:
    series = [one for one in series if one.xs]
    svgs = [line_chart(series, title=title, from_zero=from_zero, frame=frame) for frame in (WIDE, NARROW)]
    if not svgs[0]:
        return None
    values = [
        {"name": one.name, "points": [[x, y] for x, y in zip(one.xs, one.ys, strict=True)][:: len(one.xs) // 2000 + 1]}
        for one in series
        if one.style != "faint"
    ]
    legend = [{"name": one.name, "style": one.style} for one in series] if len(series) > 1 else []
    return {"title": title, "unit": unit, "svgs": svgs, "legend": legend, "values": values}


def _prompts(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The answers to each prompt, in order of steps: first and last beside each other, the others below."""
    answers: dict[str, list[Mapping[str, Any]]] = {}
    for line in samples:
        answers.setdefault(json.dumps(line.get("messages")), []).append(line)
    prompts = []
    for lines in list(answers.values())[:MAX_PROMPTS]:
        messages = lines[0].get("messages")
        messages = messages if isinstance(messages, list) else []
        shown = [{"step": line.get("step"), "text": _cut(line.get("answer", ""))} for line in lines]
        prompts.append(
            {
                "messages": [
                    {"role": str(m.get("role", "")), "text": _cut(_content(m))} for m in messages if isinstance(m, dict)
                ],
                "before": shown[0],
                "after": shown[-1] if len(shown) > 1 else None,
                "between": shown[1:-1],
            }
        )
    return prompts


def _evaluation(line: Mapping[str, Any]) -> dict[str, Any]:
    """A figure of a later evaluation, before and after; the difference where both are known."""
    before, after = line.get("before"), line.get("after")
    change = ""
    if isinstance(before, int | float) and isinstance(after, int | float):
        change = f"{after - before:+.4g}"
        if isinstance(line.get("low"), int | float) and isinstance(line.get("high"), int | float):
            change += f" ({line['low']:+.4g} to {line['high']:+.4g})"
    return {name: str(line.get(name, "")) for name in ("name", "metric")} | {
        "before": before,
        "after": after,
        "change": change,
    }


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _ledger(preflight: Mapping[str, Any], with_rows: bool = True) -> list[dict[str, Any]]:
    """The data ledger as rows of name, text, and a share for a bar where it is one."""
    get = preflight.get
    rows: list[dict[str, Any]] = []

    def add(name: str, text: str, share: Any = None, indent: bool = False) -> None:
        rows.append({"name": name, "text": text, "share": share, "indent": indent})

    if get("rows_read") is not None:
        complete = "" if get("complete", True) else " (a sample; the rest while training)"
        add("rows read", f"{_number(get('rows_read'))} of {_number(get('rows_in_epoch'))}{complete}")
    if get("rows_dropped") is not None:
        add("rows dropped", _number(get("rows_dropped")))
    for reason, entry in (get("dropped") or {}).items():
        places = entry.get("rows", {}) if isinstance(entry, dict) else {}
        named = (
            (row if isinstance(row, str) else f"{name}[{row}]") for name, rows in places.items() for row in rows[:8]
        )
        where = ", ".join(named)  # a number: of an older run
        where = f" ({where})" if where and with_rows else ""
        add(str(reason).replace("_", " "), f"{_number(entry.get('count'))}{where}", indent=True)
    if get("samples") is not None:
        add("samples", f"{_number(get('samples'))}, {_number(get('tokens'))} tokens")
    if get("trained_share") is not None:
        add("trained share", _percent(get("trained_share")), get("trained_share"))
    if get("stop_trained") is not None:
        add("stop token trained", f"in {_percent(get('stop_trained'))} of conversations", get("stop_trained"))
    if isinstance(get("length"), dict):
        add("length", ", ".join(f"{name} {_number(value)}" for name, value in get("length").items()))
    if get("coverage") is not None:
        add(
            "fits into the length",
            f"{_percent(get('coverage'))} of samples ({_number(get('max_length'))} tokens)",
            get("coverage"),
        )
    if get("truncated") is not None:
        lost = f"{_number(get('lost_tokens'))} tokens lost, {_number(get('lost_trained_tokens'))} of them trained"
        add("cut to length", f"{_number(get('truncated'))} samples; {lost}")
    if get("packing_efficiency") is not None:
        add("real tokens in a batch", _percent(get("packing_efficiency")), get("packing_efficiency"))
    if get("double_bos"):
        add("double BOS", f"{_number(get('double_bos'))} samples")
    for name, count in (get("flags") or {}).items():
        add(f"noted: {str(name).replace('_', ' ')}", f"{_number(count)} samples")
    if get("steps") is not None:
        add("to come at the start", f"{_number(get('steps'))} steps, {_number(get('tokens_to_come'))} tokens")
    return rows


def _sources(preflight: Mapping[str, Any]) -> list[dict[str, Any]]:
    sources = preflight.get("per_source")
    if not isinstance(sources, dict) or len(sources) < 2:
        return []
    return [{"name": name, **counts} for name, counts in sources.items() if isinstance(counts, dict)]


def _mask(line: Mapping[str, Any]) -> dict[str, Any]:
    pieces, room = [], MAX_TEXT
    for piece in line.get("pieces") or []:
        text, weight = str(piece.get("text", "")), float(piece.get("weight") or 0.0)
        pieces.append({"text": text[: max(room, 0)], "weight": weight, "strength": min(1.0, abs(weight))})
        room -= len(text)
        if room < 0:
            pieces.append({"text": " … (cut here)", "weight": 0.0, "strength": 0.0})
            break
    place = str(line.get("row") or line.get("source", ""))
    return {"place": place + (f", sample {line['sample']}" if line.get("sample") else ""), "pieces": pieces}


def _throughput(run: Run) -> dict[str, Any]:
    def column(name: str) -> list[float]:
        return [line[name] for line in run.timing if isinstance(line.get(name), int | float)]

    seconds = column("step_seconds")
    if not seconds:
        return {}
    rows = [("step", f"{statistics.median(seconds):.3g} s (median)")]
    for name, label in (
        ("tokens_per_second", "real tokens / s"),
        ("trained_tokens_per_second", "trained tokens / s"),
        ("padded_tokens_per_second", "with padding / s"),
        ("mfu", "of the hardware's peak (MFU)"),
    ):
        if values := column(name):
            median = statistics.median(values)
            rows.append((label, _percent(median) if name == "mfu" else f"{median:,.0f}"))
    steps = [line["step"] for line in run.timing if isinstance(line.get("step_seconds"), int | float)]
    lines = (
        [Series("real", steps, column("tokens_per_second"), "a")]
        if len(column("tokens_per_second")) == len(steps)
        else []
    )
    if len(column("trained_tokens_per_second")) == len(steps):
        lines.append(Series("trained", steps, column("trained_tokens_per_second"), "b"))
    return {"rows": rows, "chart": chart("Tokens per second", "averaged over 20 steps", lines, from_zero=True)}


def _sections(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    top = {key: value for key, value in config.items() if not isinstance(value, dict)}
    sections = [{"name": "run", "rows": _rows(top)}] if top else []
    return sections + [{"name": key, "rows": _rows(value)} for key, value in config.items() if isinstance(value, dict)]


def _environment(environment: Mapping[str, Any]) -> list[dict[str, Any]]:
    plain = {key: value for key, value in environment.items() if not isinstance(value, dict)}
    parts = [
        ("machine", plain),
        ("versions", environment.get("versions")),
        ("fingerprints", environment.get("fingerprints")),
    ]
    return [{"name": name, "rows": _rows(part)} for name, part in parts if part]


def _rows(values: Any) -> list[tuple[str, str]]:
    """Name and value, nested names joined by dots."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict) and value:
            rows += [(f"{key}.{name}", text) for name, text in _rows(value)]
        elif isinstance(value, bool) or value is None:
            rows.append((key, {True: "yes", False: "no", None: "–"}[value]))
        elif isinstance(value, int | float):
            rows.append((key, _number(value)))
        else:
            rows.append((key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows


# --- the card ---------------------------------------------------------------------------------------------------------


def _card(run: Run) -> dict[str, Any]:
    model = str(_get(run.config, "model", "path") or "")
    adapter = _get(run.config, "peft", "method") not in (None, "", "none", "full") and not _get(
        run.config, "export", "merge"
    )
    before, after = _before_after(run)
    fields = (
        ("learning rate", "train", "learning_rate"),
        ("schedule", "train", "lr_scheduler_type"),
        ("optimizer", "train", "optim"),
        ("sequences per step", "train", "batch_size"),
        ("epochs", "train", "num_train_epochs"),
        ("weight decay", "train", "weight_decay"),
        ("maximal length", "data", "max_length"),
        ("packing", "data", "packing"),
        ("adapter", "peft", "method"),
        ("rank", "peft", "r"),
        ("alpha", "peft", "lora_alpha"),
    )
    settings = [(label, _get(run.config, section, key)) for label, section, key in fields]
    if _get(run.config, "peft", "method") in (None, "none", "full"):
        settings = settings[:-3]
    last = run.train[-1] if run.train else {}
    return {
        "name": run.name,
        "library": "peft" if adapter else "transformers",
        "adapter": adapter,
        # Only a hub id is a link that works for others; a path would only tell about this machine.
        "base": model if HUB_ID.fullmatch(model) and not os.path.exists(model) else "",
        "base_name": os.path.basename(model.rstrip("/")) or "the base model",
        "before": before,
        "after": after,
        "summary": run.summary,
        "last": last,
        "settings": [(label, _number(value)) for label, value in settings if value not in (None, "")],
        "data": _ledger(run.preflight, with_rows=False),
        "sources": [os.path.basename(str(name).rstrip("/")) for name in run.preflight.get("per_source") or {}],
        "prompts": [prompt for prompt in _prompts(run.samples) if prompt["after"]][:3],
        "verification": run.verification,
        "environment": run.environment,
    }


# --- small things -----------------------------------------------------------------------------------------------------


def _get(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _strings(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _cut(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " … (cut here)"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return number(value) if isinstance(value, float) else f"{value:,}"


def _percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else "–"


def _fence(text: str) -> str:
    """Text as a Markdown code block that it can't close itself."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}text\n{text}\n{marks}"


def _cell(text: Any) -> str:
    """Text for a Markdown table or line: no column breaks, no markup."""
    return str(text).replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
