"""A curation from end to end: look at every row, decide, write what stays and what was found.

OUTPUT/kept.jsonl (or .parquet)   the rows that stay, as they were, with _index, _source, _score, _sha256
OUTPUT/removed.jsonl              {"row", "index", "source", "rule", "score", "detail"}, in the order of the sources
OUTPUT/curation.json, .html       everything that was found, for programs and for people
OUTPUT/dataset_card.md            what the kept rows are and where they come from
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from sftjax.curate import benchmarks, chunks, contamination, findings, output, personal, report, rules, text
from sftjax.curate.chunks import Input, Work
from sftjax.curate.decide import Decision, Rows, collect, decide
from sftjax.curate.settings import Settings
from sftjax.data.files import digest, hash_file
from sftjax.data.sources import open_source
from sftjax.errors import ConfigError, StorageError
from sftjax.utils import storage

_STATE = ".work"


def curate(settings: Settings, *, dry_run: bool = False, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Curates; returns what `curation.json` holds.

    A run that was stopped or killed goes on with the chunks that it hadn't looked at, as long as sources and settings
    are the same.

    Args:
      dry_run: write the report and removed.jsonl, and no rows.
      say: told what is going on, one line at a time, where there is no terminal to show progress on.

    Raises:
      ConfigError, DataError, StorageError: as their messages say.
    """
    started = time.monotonic()
    say = say or (lambda line: None)
    folder = Path(settings.output)
    inputs = open_inputs(settings.sources)
    work = prepare(settings, inputs)
    state = _state_folder(folder, settings, work)

    total = len(work.chunks())
    progress = Progress("rows looked at", total, sum(len(one.source) for one in inputs), say)
    chunks.run(work, state, settings.workers, progress, say)
    rows = collect(work, state)
    names = [one.name for one in inputs]

    def dialogue(number: int) -> text.Dialogue:
        given = inputs[rows.source[number]]
        return text.read(given.source[int(rows.index[number])], given.format, given.fields)

    def place(number: int) -> str:
        return inputs[rows.source[number]].source.location(int(rows.index[number]))

    settings = _with_encoder(settings)
    decision = decide(rows, settings, work.index, names, place, dialogue, say)
    say("writing")
    found = findings.gather(rows, decision, settings, work, place, dialogue)
    found["dry_run"] = dry_run
    output.write_lines(folder / "removed.jsonl", removed_lines(rows, decision, names, place))
    if not dry_run:
        found["output"] = _write_kept(folder, settings, inputs, rows, decision)
    found["seconds"] = round(time.monotonic() - started, 1)
    storage.write_text(folder / "curation.json", orjson.dumps(found, option=orjson.OPT_INDENT_2, default=str).decode())
    storage.write_text(folder / "curation.html", report.page(found))
    if not dry_run:
        storage.write_text(folder / "dataset_card.md", report.card(found))
    shutil.rmtree(folder / _STATE, ignore_errors=True)
    return found


def open_inputs(specs: Sequence[str | Mapping[str, Any]]) -> tuple[Input, ...]:
    """Sources with names that tell them apart."""
    inputs: list[Input] = []
    for spec in [specs] if isinstance(specs, (str, Mapping)) else specs:
        spec = {"path": spec} if isinstance(spec, str) else dict(spec)
        licence = spec.pop("licence", "")
        format, fields = spec.get("format") or "auto", dict(spec.get("fields") or {})
        source = open_source(spec)
        path = spec["path"] if isinstance(spec["path"], str) else spec["path"][0]
        name = spec.get("name") or path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
        taken = [one.name for one in inputs]
        if name in taken:
            name = next(f"{name}#{number}" for number in range(2, len(taken) + 3) if f"{name}#{number}" not in taken)
        inputs.append(Input(name, source, format, fields, licence))
    return tuple(inputs)


def prepare(settings: Settings, inputs: tuple[Input, ...]) -> Work:
    """What is to be looked for in each row."""
    quality = settings.quality
    table = rules.build(
        quality.preset,
        weights=quality.weights,
        word_list=quality.word_list,
        language=quality.language,
        extra=quality.extra,
    )
    off = settings.contamination.mode == "off"
    specs = benchmarks.specs(() if off else settings.contamination.benchmarks, settings.contamination.folder)
    return Work(
        inputs,
        table,
        contamination.Index(contamination.load_items(specs)),
        near_words=0 if settings.near.mode == "off" else settings.near.words,
        personal=settings.personal.mode != "off",
        tokenizer=settings.tokenizer,
    )


def _with_encoder(settings: Settings) -> Settings:
    encoder = settings.semantic.encoder
    if encoder and isinstance(encoder, str):
        encoder = rules.resolve(encoder, "semantic.encoder")()
    if encoder and not hasattr(encoder, "encode"):
        raise ConfigError("semantic.encoder has no encode(texts)")
    return dataclasses.replace(settings, semantic=dataclasses.replace(settings.semantic, encoder=encoder))


def _state_folder(folder: Path, settings: Settings, work: Work) -> Path:
    """Where the chunks of a run with these sources and settings are; those of another run are dropped."""
    relevant = {
        "version": chunks.VERSION,
        "rules": [(rule.name, rule.weight, rule.spreads, rules.fingerprint(rule.check)) for rule in work.table],
        "items": digest(*(" ".join((item.benchmark, str(item.row), *item.words)) for item in work.index.items)),
        "work": (work.near_words, work.personal, work.tokenizer),
        "sources": [(one.source.fingerprint(), one.name, one.format, one.fields, one.licence) for one in work.inputs],
    }
    state = folder / _STATE / digest(orjson.dumps(relevant, default=str).decode())[:16]
    try:
        if (folder / _STATE).exists():
            for other in (folder / _STATE).iterdir():
                if other != state:
                    shutil.rmtree(other, ignore_errors=True)
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"output={folder}: can't be written ({error.strerror})") from None
    return state


def removed_lines(
    rows: Rows, decision: Decision, names: Sequence[str], place: Callable[[int], str]
) -> Iterator[dict[str, Any]]:
    for row, removal in sorted(decision.removed.items()):
        score = float(rows.score[row])
        yield {
            "row": place(row),
            "index": int(rows.index[row]),
            "source": names[rows.source[row]],
            "rule": removal.rule,
            "score": score if score == score else 0.0,  # NaN: unreadable
            "detail": removal.detail,
        }


def _write_kept(folder: Path, settings: Settings, inputs, rows: Rows, decision: Decision) -> dict[str, Any]:
    hide = settings.personal.mode == "mask"
    staying = decision.staying(len(rows))

    def kept() -> Iterator[dict[str, Any]]:
        for number in staying:
            given = inputs[rows.source[number]]
            row = given.source[int(rows.index[number])]
            if hide:
                row = personal.masked(row)
            extra = {"_index": int(rows.index[number]), "_source": given.name, "_score": float(rows.score[number])}
            yield {**row, **extra, "_sha256": output.row_hash(row)}

    path = folder / f"kept.{settings.output_format}"
    if settings.output_format == "parquet":
        count = output.write_parquet(path, kept)
    else:
        count = output.write_lines(path, kept())
    other = folder / ("kept.jsonl" if settings.output_format == "parquet" else "kept.parquet")
    other.unlink(missing_ok=True)  # of an earlier run
    return {"file": path.name, "rows": count, "sha256": hash_file(str(path)), "masked": hide}


class Progress:
    """Rows done, rows a second and the time left: a line that is written over on a terminal, else one now and then."""

    def __init__(self, what: str, chunks: int, rows: int, say: Callable[[str], None]):
        self._what, self._chunks, self._rows, self._say = what, chunks, rows, say
        self._start, self._first, self._shown = time.monotonic(), None, 0.0

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done  # of an earlier run
            if done:
                self._say(f"going on from {self._of(done):,} rows")
        last = done == self._chunks
        terminal = sys.stderr.isatty()
        if not last and now - self._shown < (0.2 if terminal else 10):
            return
        self._shown = now
        passed, fresh = now - self._start, done - self._first
        line = f"{self._of(done):,} of {self._rows:,} {self._what}"
        if fresh and passed:
            left = round((self._chunks - done) * passed / fresh)
            line += f", {self._of(fresh) / passed:,.0f} rows/s, {left // 60}:{left % 60:02d} left"
        if terminal:
            print(f"\r\x1b[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            self._say(line)

    def _of(self, done: int) -> int:
        return self._rows * done // max(1, self._chunks)


def summary_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """A curation in a few lines."""
    kept, read = found["rows_kept"], found["rows_read"]
    yield f"{kept:,} of {read:,} rows {'would be' if found['dry_run'] else 'are'} kept ({kept / max(1, read):.1%})"
    for rule, entry in found["removed"].items():
        yield f"  {rule}: {entry['count']:,}"
    for name, counts in found["contamination"]["benchmarks"].items():
        yield f"  {name}: {counts['contaminated']:,} of {counts['rows']:,} items are in the data"
    if found["personal"].get("rows"):
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in Counter(found["personal"]["kinds"]).most_common())
        yield f"  personal data in {found['personal']['rows']:,} rows ({found['personal']['mode']}): {kinds}"
    for warning in found["balance"]["after"].get("warnings", ()):
        yield f"  note: {warning}"
