"""One synthesis from flags to files: opens the teacher, reads the prompts, calls the method, writes rows and report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from sftjax import chat, loading
from sftjax.curate.output import write_lines
from sftjax.data.sources import open_source
from sftjax.errors import ConfigError
from sftjax.synth import distill, evol_instruct, rejection, self_instruct
from sftjax.synth.asking import Asker
from sftjax.synth.memory import Memory
from sftjax.synth.rejection import Made
from sftjax.synth.rewards import make_reward
from sftjax.synth.teacher import LocalTeacher, Sampling, Teacher, UrlTeacher, query_prefix
from sftjax.utils.storage import write_text

ROWS, PAIRS, REPORT = "rows.jsonl", "pairs.jsonl", "report.json"


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
    """Who writes: `model` (a folder, file or hub id), or `url` with `name`. See `LocalTeacher` and `UrlTeacher`."""

    model: str = ""
    adapter: str | None = None
    dtype: str = "auto"
    batch_size: int = 32
    url: str = ""
    name: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    retries: int = 6


def open_teacher(settings: TeacherSettings) -> tuple[Teacher, dict[str, Any]]:
    """The teacher, and what tells it from others.

    Raises:
      ConfigError: neither or both are given; no such model.
    """
    if bool(settings.model) == bool(settings.url) or bool(settings.url) != bool(settings.name):
        raise ConfigError("give the teacher: --model DIR, or --teacher_url URL with --teacher_model NAME")
    if settings.url:
        teacher = UrlTeacher(
            settings.url,
            settings.name,
            api_key_env=settings.api_key_env,
            concurrency=settings.concurrency,
            retries=settings.retries,
        )
        return teacher, {"teacher": teacher.name}
    generator = chat.load(
        settings.model, adapter=settings.adapter, dtype=settings.dtype, batch_size=settings.batch_size
    )
    name = f"{settings.model} + {settings.adapter}" if settings.adapter else settings.model
    known = {"teacher": name, "dtype": settings.dtype, "batch_size": settings.batch_size}
    return LocalTeacher(generator, name), known | {"weights": loading.open_model(settings.model).fingerprint()}


def synthesize(
    method: str,
    *,
    output: str,
    teacher: TeacherSettings,
    sampling: Sampling,
    seed: int = 0,
    chunk: int = 64,
    input: str = "",
    limit: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs a method, or what is left of it, and writes its files; see `tools/synthesize.py` for the lines.

    Args:
      method: a key of METHODS.
      output: folder.
      chunk: prompts between two saves.
      input: prompts or seeds, any source that a config takes.
      limit: only so many of them.
      options: the method's own.

    Returns:
      the report.
    """
    rows, settings = [], {"method": method}
    if input:
        source = open_source({"path": input})
        count = len(source) if limit is None else min(limit, len(source))
        rows = [source[number] for number in range(count)]
        settings |= {"input": input, "input_content": source.fingerprint(), "limit": limit}
    options, fingerprints = _with_rewards(options, teacher.dtype)
    opened, known = open_teacher(teacher)
    settings |= known | {"seed": seed, "chunk": chunk, "sampling": dataclasses.asdict(sampling)} | fingerprints
    with Memory(output, settings) as memory:
        if memory.remembered:
            print(f"going on: {memory.remembered:,} calls are remembered", file=sys.stderr)
        made = METHODS[method](rows, Asker(opened, memory, seed=seed, chunk=chunk), sampling, options)
        report = made.report | {"teacher": opened.name, "seed": seed}
        _write(Path(output), made, report, pairs=bool(options.get("pairs")))
    return report


def _with_rewards(options: dict[str, Any], dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options with rewards in place of their names; and what to remember of the options."""
    known = {name: value for name, value in options.items() if value not in (None, False, "")}
    options = dict(options)
    allow_code = options.pop("allow_code", False)
    for name in ("reward", "second"):
        if options.get(name):
            options[name] = make_reward(options[name], dtype=dtype, allow_code=allow_code)
            known[f"{name}_content"] = options[name].fingerprint
    return options, known


def _write(folder: Path, made: Made, report: Mapping[str, Any], *, pairs: bool) -> None:
    write_lines(folder / ROWS, ({**row, "teacher": report["teacher"]} for row in made.rows))
    if pairs:
        write_lines(folder / PAIRS, made.pairs)
    write_text(folder / REPORT, orjson.dumps(report, option=orjson.OPT_INDENT_2).decode() + "\n")


# --- methods -----------------------------------------------------------------------------------------------------


def _rejection(rows, asker: Asker, sampling: Sampling, options: dict[str, Any]) -> Made:
    return rejection.best_of_n(rows, asker, options.pop("reward"), sampling, **options)


def _distill(rows, asker: Asker, sampling: Sampling, options: dict[str, Any]) -> Made:
    return distill.distill(rows, asker, sampling, **options)


def _magpie(rows, asker: Asker, sampling: Sampling, options: dict[str, Any]) -> Made:
    tokenizer_of = options.pop("template_of")
    if isinstance(asker.teacher, LocalTeacher):
        tokenizer = asker.teacher.tokenizer
    elif tokenizer_of:
        tokenizer = loading.open_model(tokenizer_of).tokenizer
    else:
        raise ConfigError("magpie behind a URL needs --template_of: a model whose chat template the teacher uses")
    end = tokenizer.decode([tokenizer.end_of_turn_id], skip_special=False)
    return distill.magpie(asker=asker, sampling=sampling, prefix=query_prefix(tokenizer), end_of_turn=end, **options)


def _self_instruct(rows, asker: Asker, sampling: Sampling, options: dict[str, Any]) -> Made:
    return self_instruct.grow(self_instruct.read_seeds(rows), asker, sampling, **options)


def _evol_instruct(rows, asker: Asker, sampling: Sampling, options: dict[str, Any]) -> Made:
    return evol_instruct.evolve(rows, asker, sampling, **options)


METHODS = {
    "rejection": _rejection,
    "distill": _distill,
    "magpie": _magpie,
    "self_instruct": _self_instruct,
    "evol_instruct": _evol_instruct,
}


def summary_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """A synthesis in a few lines."""
    yield f"{report['rows']:,} rows"
    for name, count in report["filters"].items():
        if count:
            yield f"  {name}: {count:,}"
    if report["method"] == "rejection" and report["rows"]:
        found = report["reward"]
        yield (
            f"  {found['name']}: mean {found['first_answers']['mean']:.3f} of first answers, "
            f"{found['chosen']['mean']:.3f} of chosen ones"
        )
        if "second" in report and report["second"]["chosen"]["count"]:
            found = report["second"]
            yield (
                f"  {found['name']}: mean {found['first_answers']['mean']:.3f} of first answers, "
                f"{found['chosen']['mean']:.3f} of chosen ones"
            )
    for warning in report.get("warnings", ()):
        yield f"  note: {warning}"
