"""An evaluation by generation, top to bottom: items, base, model, scores, comparison, files (`tools/evaluate.py`)."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orjson
from rich.console import Console
from rich.table import Table

from sftjax import divergence
from sftjax.assess import facts, judge, leaderboards, recorded
from sftjax.assess.answering import Answers, Model
from sftjax.assess.items import Item, read
from sftjax.errors import ConfigError
from sftjax.held_out import Evaluation, bootstrap_difference
from sftjax.scorers import Scorer, make_scorers
from sftjax.scorers.statistics import bootstrap_mean, describe
from sftjax.synth.teacher import UrlTeacher
from sftjax.utils import storage

KL_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Which:
    """A model and how to run it."""

    path: str
    adapter: str | None = None

    @property
    def name(self) -> str:
        return (self.adapter or self.path).rstrip("/")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What else to do with the answers.

    Attributes:
      judge: compares answers with `against`: "base" or "expected".
      alpaca_eval, mt_bench, contradictions: files to write; empty: not wanted.
      run: a run's folder, whose report gets the figures, under `run_name`.
    """

    judge: judge.Judge | None = None
    against: str = "base"
    alpaca_eval: str = ""
    mt_bench: str = ""
    contradictions: str = ""
    run: str = ""
    run_name: str = ""


def evaluate(
    model: Which,
    data: Sequence[str],
    out: str,
    *,
    base: Which | None = None,
    scorers: Sequence[Any] = (),
    allow_code: bool = False,
    limit: int | None = None,
    system: str = "",
    dtype: str = "float32",
    chat_template: str = "",
    batch_size: int = 32,
    completion: bool = False,
    wanted: Wanted | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Answers, scores, compares and writes.

    Args:
      data: files of rows. out: JSONL to write; its summary goes to `out` with the ending .summary.json.
      base: a model to compare with, on the same rows.
      scorers: names, see `scorers.make_scorer`.
      settings: of generation, see `Generator.generate`.

    Returns:
      The summary.

    Raises:
      ConfigError, DataError, StorageError: before a model is loaded, wherever that can be known.
    """
    wanted = wanted or Wanted()
    chosen = make_scorers(scorers, allow_code=allow_code)
    items = read(data, limit=limit, system=system)
    _check(items, base, chosen, wanted)
    loading = {"dtype": dtype, "chat_template": chat_template, "batch_size": batch_size, "completion": completion}
    with storage.whole_file(out) as file:
        before, contradictions = None, []
        if base is not None:
            before, contradictions = _base(base, items, loading, wanted, settings)
        after = _assess(model, items, before, loading, settings)
        columns = {"": _scored(chosen, items, after)}
        if before is not None:
            columns["base_"] = _scored(chosen, items, before)
        verdicts = _judged(wanted, items, after, before, int(settings.get("seed", 0)))
        lines = _lines(items, {"": after, "base_": before}, columns, verdicts)
        file.writelines(orjson.dumps(line) + b"\n" for line in lines)
    summary = {"data": list(data), "rows": len(items), "settings": {"dtype": dtype, "system": system, **settings}}
    summary["model"] = _part(model, items, after, columns[""])
    if before is not None:
        summary["base"] = _part(base, items, before, columns["base_"])
        summary["difference"] = _difference(items, before, after, columns)
        summary["kl_to_base"] = _finite(divergence.kl(before.log_probabilities, after.log_probabilities))
    if verdicts:
        summary["judge"] = judge.summary(verdicts) | {"model": wanted.judge.name, "against": wanted.against}
    if wanted.contradictions:
        facts.write(wanted.contradictions, contradictions)
        summary["contradictions"] = {"file": wanted.contradictions, "count": len(contradictions)}
    if wanted.alpaca_eval:
        leaderboards.write_alpaca_eval(wanted.alpaca_eval, items, after.outputs, generator=model.name)
    if wanted.mt_bench:
        leaderboards.write_mt_bench(wanted.mt_bench, items, after.outputs, model=model.name)
    with storage.whole_file(summary_path(out)) as file:
        file.write(json.dumps(summary, indent=2, ensure_ascii=False).encode() + b"\n")
    if wanted.run:
        recorded.record(wanted.run, wanted.run_name, recorded.of_summary(summary))
    return summary


def evaluate_from_flags(
    data: Sequence[str],
    out: str,
    *,
    model: str | None,
    adapter: str | None,
    base: str | None,
    run: str | None,
    judge_url: str | None,
    judge_model: str,
    judge_against: str,
    files: Mapping[str, str],
    dtype: str,
    **options: Any,
) -> dict[str, Any]:
    """`evaluate` with what `tools/evaluate.py` was given."""
    if run:
        model, adapter, base = recorded.models_of(run)
    against = judge_against or ("base" if base else "expected")
    teacher = UrlTeacher(judge_url, judge_model) if judge_url else None
    wanted = Wanted(
        judge=judge.Judge(teacher) if teacher else None,
        against=against,
        run=run or "",
        run_name=", ".join(os.path.basename(path) for path in data),
        **files,
    )
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    tuned, untuned = Which(model, adapter), Which(base) if base else None
    return evaluate(tuned, data, out, base=untuned, dtype=dtype, wanted=wanted, **options)


def summary_path(out: str) -> str:
    return out.removesuffix(".jsonl") + ".summary.json"


def _check(items: Sequence[Item], base: Which | None, scorers: Mapping[str, Scorer], wanted: Wanted) -> None:
    """What would otherwise be found out after hours."""
    if base is None and (wanted.contradictions or (wanted.judge and wanted.against == "base")):
        raise ConfigError("give --base: contradictions, and a judge's comparison with the base, need it")
    if wanted.judge and wanted.against == "expected" and not any(item.expected for item in items):
        raise ConfigError("--judge_against expected: no row has an expected answer")
    if wanted.mt_bench and not any("question_id" in item.row for item in items):
        raise ConfigError("--mt_bench: rows need question_id and turns, as in MT-Bench's question.jsonl")
    for score in scorers.values():
        for item in items[:: max(1, len(items) // 8)]:
            score(item.row, "")  # says so where a row lacks what the scorer wants


def _base(base: Which, items, loading, wanted: Wanted, settings) -> tuple[Answers, list[dict[str, Any]]]:
    model = Model(base.path, adapter=base.adapter, **loading)
    samples = [model.sample_of(item, item.expected) for item in items]
    answers = model.assess(items, samples, kl_tokens=KL_TOKENS, **settings)
    found = facts.contradictions(model, items, answers, **settings) if wanted.contradictions else []
    del model
    gc.collect()  # its weights, before the next model's
    return answers, found


def _assess(which: Which, items, before: Answers | None, loading, settings) -> Answers:
    model = Model(which.path, adapter=which.adapter, **loading)
    samples = [model.sample_of(item, item.expected) for item in items]
    return model.assess(items, samples, kl_tokens=0 if before is None else KL_TOKENS, **settings)


def _scored(scorers: Mapping[str, Scorer], items: Sequence[Item], answers: Answers) -> dict[str, list[float]]:
    texts = [output.text for output in answers.last]
    return {
        name: [score(item.row, text) for item, text in zip(items, texts, strict=True)]
        for name, score in scorers.items()
    }


def _judged(wanted: Wanted, items, after: Answers, before: Answers | None, seed: int) -> list[judge.Verdict | None]:
    if wanted.judge is None:
        return []
    ours = [output.text for output in after.last]
    if wanted.against == "expected":
        theirs = [item.expected for item in items]
    else:
        theirs = [output.text for output in before.last]
    return wanted.judge.compare([item.instruction for item in items], ours, theirs, seed=seed)


def _lines(items, answers: Mapping[str, Answers | None], columns, verdicts) -> list[dict[str, Any]]:
    lines = []
    for number, item in enumerate(items):
        line: dict[str, Any] = {"index": item.index, "source": item.source, "instruction": item.instruction}
        line |= {"expected": item.expected}
        for prefix, made in answers.items():
            if made is not None:
                line |= _line(prefix, made, number)
                line[f"{prefix}scores"] = {name: _finite(values[number]) for name, values in columns[prefix].items()}
        if verdicts:
            verdict = verdicts[number]
            line["judge"] = None if verdict is None else {"score": verdict.score, "said": list(verdict.said)}
        lines.append(line)
    return lines


def _line(prefix: str, answers: Answers, number: int) -> dict[str, Any]:
    turns = answers.outputs[number]
    last = turns[-1]
    line = {
        "generated": last.text,
        "finish_reason": last.finish_reason,
        "num_tokens": len(last.tokens),
        "mean_logprob": float(np.mean(last.logprobs)) if last.logprobs else None,
        "expected_nll": float(answers.nll[number]) if answers.tokens[number] else None,
        "expected_tokens": int(answers.tokens[number]),
    }
    if len(turns) > 1:
        line["turns"] = [turn.text for turn in turns]
    return {prefix + name: value for name, value in line.items()}


# --- summary ----------------------------------------------------------------------------------------------------------


def _part(which: Which, items, answers: Answers, scores: Mapping[str, list[float]]) -> dict[str, Any]:
    sources = sorted({item.source for item in items})
    rows = {name: [item.index for item in items if item.source == name] for name in sources}
    part: dict[str, Any] = {"path": which.path, "adapter": which.adapter, "loss": _losses(answers.evaluation(items))}
    part["scores"] = {name: _interval(bootstrap_mean(values)) for name, values in scores.items()}
    if len(sources) > 1:
        part["scores_by_source"] = {
            source: {name: float(np.mean([values[row] for row in rows[source]])) for name, values in scores.items()}
            for source in sources
        }
    told = [
        {"text": output.text, "num_tokens": len(output.tokens), "finish_reason": output.finish_reason}
        for turns in answers.outputs
        for output in turns
    ]
    part["answers"] = describe(told)
    return part


def _losses(evaluation: Evaluation) -> dict[str, Any]:
    """Response loss and perplexity over all sources, and of each."""
    losses = {}
    for name in ("all", *evaluation.source_names):
        chosen = np.ones(len(evaluation.keys), bool)
        if name != "all":
            chosen = evaluation.keys[:, 0] == evaluation.source_names.index(name)
        tokens = int(evaluation.trained[chosen].sum())
        if tokens:
            loss = float(evaluation.nll[chosen].sum() / tokens)
            perplexity = math.exp(min(loss, 700.0))
            losses[name] = {"loss": loss, "perplexity": perplexity, "tokens": tokens, "rows": int(chosen.sum())}
    return losses


def _difference(items, before: Answers, after: Answers, columns) -> dict[str, Any]:
    """Model minus base, on the same rows, with intervals."""
    difference: dict[str, Any] = {
        "scores": {
            name: _interval(bootstrap_mean(np.subtract(values, columns["base_"][name])))
            for name, values in columns[""].items()
        }
    }
    first, second = before.evaluation(items), after.evaluation(items)
    if len(first.keys) and np.array_equal(first.keys, second.keys) and np.array_equal(first.weight, second.weight):
        difference["loss"] = _interval(bootstrap_difference(first, second))
    return difference


def _interval(values: tuple[float, float, float]) -> dict[str, float | None]:
    return dict(zip(("mean", "low", "high"), map(_finite, values), strict=True))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# --- for a person -----------------------------------------------------------------------------------------------------


def print_summary(summary: Mapping[str, Any]) -> None:
    """The figures as a table, on stdout."""
    parts = {name: summary[name] for name in ("base", "model") if name in summary}
    table = Table(title=f"{summary['rows']} rows", title_justify="left")
    table.add_column("")
    for name in parts:
        table.add_column(name, justify="right")
    if "difference" in summary:
        table.add_column("difference, 95 % interval", justify="right")
    for name, cells, change in _rows(parts, summary.get("difference", {})):
        table.add_row(name, *cells, *([change] if "difference" in summary else []))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if summary.get("kl_to_base") is not None:
        print(f"KL(base || model) on answer tokens: {summary['kl_to_base']:.4f} nats")
    if "judge" in summary:
        print(judge.in_words(summary["judge"]))
    if "contradictions" in summary:
        found = summary["contradictions"]
        print(f"{found['count']} rows contradict what the base answers with confidence: {found['file']}")


def _rows(parts: Mapping[str, Any], difference: Mapping[str, Any]):
    first = next(iter(parts.values()))

    def over(value: Mapping[str, Any] | None, form: str) -> str:
        if not value or value.get("mean") is None:
            return ""
        return f"{value['mean']:{form}} ({value['low']:{form}} to {value['high']:{form}})"

    for source in first["loss"]:
        if source != "all" and len(first["loss"]) <= 2:
            continue
        losses = [part["loss"].get(source) for part in parts.values()]
        cells = [f"{one['loss']:.4f} (perplexity {one['perplexity']:.2f})" if one else "" for one in losses]
        name = "response loss" if source == "all" else f"  {source}"
        yield name, cells, over(difference.get("loss") if source == "all" else None, "+.4f")
    for scorer in first["scores"]:
        cells = [over(part["scores"][scorer], ".3f") for part in parts.values()]
        yield scorer, cells, over(difference.get("scores", {}).get(scorer), "+.3f")
    answers = [part["answers"] for part in parts.values()]
    yield "ended by themselves", [f"{one['stop_rate']:.1%}" for one in answers], ""
    yield "mean length, tokens", [f"{one['mean_tokens']:.1f}" for one in answers], ""
    yield "repeated 4-grams", [f"{one['repeated_4grams']:.1%}" for one in answers], ""
    openings = [f"{one['commonest_opening']!r} {one['commonest_opening_share']:.0%}" for one in answers]
    yield "commonest opening", openings, ""
