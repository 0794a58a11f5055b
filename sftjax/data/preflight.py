"""Preflight: what training would see, before it starts; and the refusal to start on data that can't work.

Up to `sample_rows` rows the first epoch is read whole, and packing is simulated over all epochs: the number of steps is
exact. Above, evenly spaced rows are read, the number of steps is an estimate (and fixed from then on), and `finish()`
completes the ledger while training runs, so that the first step never waits for a pass over the data.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sftjax.data import conservation, formats, lookalikes, packing
from sftjax.data.bins import Bins
from sftjax.data.ledger import Ledger
from sftjax.data.mixture import ENDLESS, Ingredient, Mixture
from sftjax.data.preview import visible
from sftjax.data.stream import account, explain_drops
from sftjax.data.types import RowError
from sftjax.data.workers import EncodedRow, encode_rows
from sftjax.errors import DataError

COVERAGE = 0.95  # share of samples that `max_length` should hold
_CHUNK = 256  # rows encoded at a time
_SIMULATED_SAMPLES = 100_000  # above, the packing of one epoch stands for all
_KIND_ROWS = 20  # rows tried to learn whether a source holds conversations
_IDLE = 3.0  # the background pass rests so many times as long as it works

log = logging.getLogger(__name__)


@dataclass
class Preflight:
    """The data ledger of a run.

    Attributes:
      complete: every row of the first epoch was read (else evenly spaced ones, and steps are estimated).
      rows_in_epoch: rows of the first epoch.
      rows_read, rows_dropped: rows read, and those without a sample.
      dropped: reason -> {"count", "rows": {source: places of the first 20 rows, such as "chats.jsonl:17"}}.
      samples, tokens, trained_tokens: what the encoder gave, before the over-length policy.
      trained_share: trained over all tokens.
      truncated, lost_tokens, lost_trained_tokens: what the over-length policy cost.
      flags: samples per flag, such as "straddle" or "prompt_differs".
      lost: kind -> {"rows", "share", "refused", "example"}: rows of which the text lacks a part (`conservation`), how
        many of them gave no sample for it, and what the first of them lacks.
      stop_trained: share of the conversations' samples in which a stop token is trained; None without conversations.
      double_bos: samples that begin with two BOS tokens.
      duplicates: samples whose tokens were there before, in an earlier row.
      length: {"p50", "p90", "p95", "p99", "max", "mean"} of the samples' tokens.
      coverage: share of samples that fit into `max_length`; proposed_length: the multiple of 128 that holds 95 %.
      packing_efficiency: real tokens over token slots.
      steps, tokens_to_come: of the whole run.
      per_source: name -> counts, and whether it holds conversations.
      warnings: lines for a person.
      problems: what `check()` refuses to start on.
    """

    complete: bool
    max_length: int
    rows_in_epoch: int
    rows_read: int
    rows_dropped: int
    dropped: dict[str, Any]
    samples: int
    tokens: int
    trained_tokens: int
    trained_share: float
    truncated: int
    lost_tokens: int
    lost_trained_tokens: int
    flags: dict[str, int]
    lost: dict[str, dict[str, Any]]
    stop_trained: float | None
    double_bos: int
    duplicates: int
    length: dict[str, float]
    coverage: float
    proposed_length: int
    packing_efficiency: float
    steps: int
    tokens_to_come: int
    per_source: dict[str, dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)  # reason -> what was said of the first row dropped for it
    survey: Survey | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what `preflight.json` holds."""
        return {name: value for name, value in vars(self).items() if name != "survey"}

    def check(self) -> None:
        """Raises DataError with the first reason not to start."""
        if self.problems:
            raise DataError(self.problems[0])

    def print(self, console: Any = None) -> None:
        """A short table, and the warnings below it."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = console or Console()
        table = Table(title="preflight" if self.complete else "preflight (a sample of the rows)", show_header=False)
        table.add_column(style="bold")
        table.add_column()
        for name, text in self._lines():
            table.add_row(name, Text(text))  # not markup: it may quote the data
        console.print(table)
        for warning in self.warnings:
            console.print(f"warning: {warning}", markup=False, highlight=False)

    def _lines(self) -> list[tuple[str, str]]:
        lines = [("rows", f"{self.rows_read:,} of {self.rows_in_epoch:,} read, {self.rows_dropped:,} without a sample")]
        for reason, entry in self.dropped.items():
            rows = "; ".join(", ".join(rows[:5]) for rows in entry["rows"].values())
            lines.append((f"  {reason}", f"{entry['count']:,}: {rows}"))
            if detail := self.details.get(reason):
                lines.append(("", visible(detail)))
        for kind, entry in self.lost.items():
            refused = f", {entry['refused']:,} refused" if entry["refused"] else ""
            lines.append((f"  {kind}", f"{entry['share']:.1%} of the rows{refused}: {entry['example']}"))
        lines.append(("samples", f"{self.samples:,}, {self.tokens:,} tokens, {self.trained_share:.1%} trained"))
        quantiles = ", ".join(f"{name} {value:,.0f}" for name, value in self.length.items())
        lines.append(("length", f"{quantiles}; {self.coverage:.1%} fit into {self.max_length}"))
        lost = f"{self.truncated:,} cut; {self.lost_tokens:,} tokens lost, {self.lost_trained_tokens:,} of them trained"
        lines.append(("over-length", lost))
        if self.stop_trained is not None:
            lines.append(("stop token", f"trained in {self.stop_trained:.1%} of conversations"))
        if self.flags:
            lines.append(("noted", ", ".join(f"{name} {count:,}" for name, count in sorted(self.flags.items()))))
        about = "" if self.complete else "about "
        lines.append(("packing", f"{self.packing_efficiency:.1%} real tokens"))
        lines.append(("to come", f"{self.steps:,} steps, {about}{self.tokens_to_come:,} tokens"))
        if len(self.per_source) > 1:
            for name, counts in self.per_source.items():
                share = f"{counts['tokens'] / max(1, self.tokens):.1%} of tokens, {counts['trained_share']:.1%} trained"
                lines.append((f"  {name}", f"{counts['rows']:,} rows, {share}"))
        return lines

    def finish(self, on_done: Callable[[Preflight], None] | None = None) -> Finishing | None:
        """Reads the rows that the sample left out, in a thread that leaves most of the time to training.

        `steps` stays. `on_done` gets the completed report (to write it down). None where nothing is left to read.
        """
        if self.complete:
            return None
        thread = Finishing(self, on_done)
        thread.start()
        return thread


class Finishing(threading.Thread):
    """The thread of `Preflight.finish`. Close it before the program ends."""

    def __init__(self, report: Preflight, on_done: Callable[[Preflight], None] | None):
        super().__init__(daemon=True, name="sftjax-preflight")
        self._report, self._on_done, self._closed = report, on_done, threading.Event()

    def run(self) -> None:
        try:
            survey = self._report.survey
            survey.use_own_encoders()
            survey.read(survey.places_left(), self._closed, idle=_IDLE)
            if self._on_done is not None and survey.complete:
                self._on_done(survey.report(steps=self._report.steps))
        except Exception:
            log.exception("the preflight ledger could not be completed; training goes on")

    def close(self) -> None:
        """Stops reading; what isn't complete by now stays a sample."""
        self._closed.set()
        self.join()


def run(
    mixture: Mixture,
    tokenizer: Any = None,
    *,
    length: int,
    batch_size: int,
    accumulation: int = 1,
    packing_strategy: str = "best_fit",
    max_segments: int = 64,
    packing_bins: int | None = None,
    static_lengths: int = 1,
    flat_rows: int = 1,
    fill: str = "sequences",
    overlong: str = "truncate",
    max_dropped: float = 1.0,
    max_lost: float = 1.0,
    sample_rows: int = 10_000,
    max_steps: int = 0,
) -> Preflight:
    """Surveys the training data; `report.check()` then refuses what can't work.

    Args:
      mixture: what will be trained on.
      tokenizer: for stop and BOS ids; None leaves these checks out.
      length .. overlong: as given to `pipeline.build`.
      max_dropped: the most rows, as a share, that may give no sample.
      max_lost: the most rows, as a share, whose text may lack a part of the prompt (of one kind).
      sample_rows: rows read at most; above, the report is of a sample.
      max_steps: steps of the run; 0 = as many as the mixture's epochs make.

    Raises:
      DataError: an over-long sample where `overlong` is "error".
    """
    shape = packing.row_shape(
        packing_strategy,
        length=length,
        batch_size=batch_size,
        max_segments=max_segments,
        static_lengths=static_lengths,
        flat_rows=flat_rows,
        fill=fill,
    )
    bins = packing.open_bins(packing_strategy, shape, packing_bins or packing.default_bins(length))
    survey = Survey(mixture, tokenizer, length, overlong, max_dropped, max_lost)
    survey.geometry = Geometry(shape, bins, accumulation)
    survey.read(survey.choose_places(sample_rows))
    return survey.report(steps=max_steps or None)


@dataclass(frozen=True)
class Geometry:
    """How rows become steps."""

    shape: packing.Shape
    bins: Bins
    accumulation: int

    def pack(self, lengths: Sequence[int]) -> tuple[int, int, int]:
        """(steps, real tokens, token slots) for samples of these lengths."""
        rows = packing.simulate(lengths, self.bins)
        slots = packing.slots(rows, self.shape, self.accumulation)
        return len(slots), int(rows.sum()), int(slots.sum())


class Survey:
    """What has been read so far; `report()` sums it up."""

    geometry: Geometry

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Any,
        length: int,
        overlong: str,
        max_dropped: float = 1.0,
        max_lost: float = 1.0,
    ):
        self.mixture, self.length, self.overlong = mixture, length, overlong
        self.max_dropped, self.max_lost = max_dropped, max_lost
        self.tokenizer = tokenizer
        self.lost: dict[str, dict[str, Any]] = {}  # as `Preflight.lost`, without the shares
        self.stop_ids = np.array(sorted(getattr(tokenizer, "stop_ids", ())), np.int32)
        self.bos_id = getattr(tokenizer, "bos_id", None)
        self.ledger = Ledger(mixture.names)
        self.chat = tuple(_holds_conversations(i) for i in mixture.ingredients)
        self.rows_in_epoch = min(mixture.rows_per_epoch, len(mixture))
        self.lengths = array("i")  # of the samples as encoded
        # Of the rows that the packing is judged by (not those read in the background, which can be very many):
        self.pieces: dict[tuple[int, int], list[int]] = {}  # (source, row) -> lengths as packed
        self.order: list[tuple[int, int]] = []
        self.stops = [0] * len(mixture.names)  # samples in which a stop token is trained
        self.double_bos = 0
        names = getattr(tokenizer, "added_tokens", ())
        self.unseen = {tokenizer.control_tokens[name]: name for name in names}  # new tokens that no sample has
        self.digests = array("q")  # of the samples' tokens, to count those that are there twice
        self.sample_rows, self.sampled = 0, range(0)

    def choose_places(self, sample_rows: int) -> range:
        """Places of the first epoch to read: all, or every k-th."""
        self.sample_rows = sample_rows
        self.sampled = range(0, self.rows_in_epoch, max(1, math.ceil(self.rows_in_epoch / sample_rows)))
        return self.sampled

    def places_left(self) -> list[int]:
        return [place for place in range(self.rows_in_epoch) if place not in self.sampled]

    @property
    def complete(self) -> bool:
        return self.ledger.total("rows") == self.rows_in_epoch

    def use_own_encoders(self) -> None:
        """Encoders keep what they have worked out; before reading in a thread they are copied, as for a process."""
        self.mixture = copy.copy(self.mixture)
        self.mixture.ingredients = tuple(
            replace(ingredient, encode=copy.deepcopy(ingredient.encode)) for ingredient in self.mixture.ingredients
        )

    def read(self, places: Sequence[int], stop: threading.Event | None = None, idle: float = 0.0) -> None:
        """Reads rows until `stop` is set; rests `idle` times as long as it works."""
        for start in range(0, len(places), _CHUNK):
            began = time.monotonic()
            for row in encode_rows(self.mixture, places[start : start + _CHUNK]):
                self._add(row)
            if stop is not None and stop.wait(idle * (time.monotonic() - began)):
                return

    def _add(self, row: EncodedRow) -> None:
        pieces = account(self.ledger, row, self.length, self.overlong, self.mixture.location)
        self._add_lost(row)
        if len(self.order) < len(self.sampled):
            self.order.append((row.source, row.row))
            self.pieces[row.source, row.row] = [len(piece.tokens) for piece in pieces]
        for sample in row.samples:
            self.lengths.append(len(sample.tokens))
            if self.unseen:
                self.unseen = {n: name for n, name in self.unseen.items() if not (sample.tokens == n).any()}
            self.digests.append(hash(sample.tokens.tobytes()))
            is_trained = sample.weights != 0
            is_trained[:1] = False
            self.stops[row.source] += bool(np.isin(sample.tokens[is_trained], self.stop_ids).any())
            begins_twice = len(sample.tokens) > 1 and sample.tokens[0] == sample.tokens[1] == self.bos_id
            self.double_bos += self.bos_id is not None and bool(begins_twice)

    def _add_lost(self, row: EncodedRow) -> None:
        """Counts a row once for each kind of part that it lacks."""
        kinds: dict[str, str] = {}
        if row.error is not None and row.error[0].startswith("lost_"):
            kinds[row.error[0]] = row.error[1]
        for sample in row.samples:
            for flag in sample.flags if sample.lost else ():
                if flag.startswith("lost_"):
                    kinds.setdefault(flag, next(n for n in sample.lost if n.startswith(flag)).partition(": ")[2])
        for kind, detail in kinds.items():
            example = f"{self.mixture.location(row.source, row.row)}: {detail}"
            entry = self.lost.setdefault(kind, {"rows": 0, "refused": 0, "example": example})
            entry["rows"] += 1
            entry["refused"] += row.error is not None

    def report(self, steps: int | None) -> Preflight:
        """Sums up. `steps`: of the run, where they are settled already."""
        ledger, lengths = self.ledger, np.array(self.lengths or [0], np.int32)
        planned, tokens_to_come, efficiency = self._plan(steps)
        tokens, trained = ledger.total("tokens"), ledger.total("trained")
        in_chat = sum(ledger.of(i, "samples") for i, chat in enumerate(self.chat) if chat)
        stopped = sum(stops for stops, chat in zip(self.stops, self.chat, strict=True) if chat)
        quantiles = {f"p{q}": float(np.percentile(lengths, q)) for q in (50, 90, 95, 99)}
        wanted = float(np.percentile(lengths, 100 * COVERAGE, method="higher"))
        report = Preflight(
            complete=self.complete,
            max_length=self.length,
            rows_in_epoch=self.rows_in_epoch,
            rows_read=ledger.total("rows"),
            rows_dropped=ledger.total("empty_rows"),
            dropped=ledger.reasons(self.mixture.location),
            samples=ledger.total("samples"),
            tokens=tokens,
            trained_tokens=trained,
            trained_share=trained / max(1, tokens),
            truncated=ledger.total("truncated"),
            lost_tokens=ledger.total("lost_tokens"),
            lost_trained_tokens=ledger.total("lost_trained"),
            flags=ledger.flags(),
            lost={k: {"share": e["rows"] / max(1, ledger.total("rows")), **e} for k, e in sorted(self.lost.items())},
            stop_trained=stopped / in_chat if in_chat and len(self.stop_ids) else None,
            double_bos=self.double_bos,
            duplicates=len(self.digests) - len(np.unique(np.array(self.digests, np.int64))),
            length={**quantiles, "max": int(lengths.max()), "mean": round(float(lengths.mean()), 1)},
            coverage=float((lengths <= self.length).mean()),
            proposed_length=max(128, math.ceil(wanted / 128) * 128),
            packing_efficiency=efficiency,
            steps=planned,
            tokens_to_come=tokens_to_come,
            per_source=self._per_source(),
            details=dict(ledger.details),
            survey=self,
        )
        report.problems = _problems(report, self)
        report.warnings = _warnings(report, self)
        return report

    def _plan(self, steps: int | None) -> tuple[int, int, float]:
        """(steps, real tokens, share of real tokens) of the whole run."""
        lengths = [n for row in self.order for n in self.pieces[row]]
        total = len(self.mixture)
        exact = self._lengths_of_the_run() if steps is None and self.complete and total != ENDLESS else None
        if exact is not None:
            planned, real, slots = self.geometry.pack(exact)
            return planned, real, real / max(1, slots)
        kept = lengths[:_SIMULATED_SAMPLES]
        packed, real, slots = self.geometry.pack(kept)
        per_step = real / max(1, packed)
        if steps is None:
            tokens = sum(lengths) / max(1, len(self.order)) * total
            steps = math.ceil(tokens / max(1.0, per_step)) if tokens else 0
        return steps, round(steps * per_step), real / max(1, slots)

    def _lengths_of_the_run(self) -> list[int] | None:
        """Lengths of everything packed in the run, in order; None where that is too much to read or to simulate."""
        total = len(self.mixture)
        if total * max(1, len(self.lengths)) / max(1, len(self.order)) > _SIMULATED_SAMPLES:
            return None
        rows = [self.mixture.locate(place)[1:] for place in range(total)]
        later = {row: place for place, row in enumerate(rows) if row not in self.pieces}  # not in the first epoch
        if len(self.order) + len(later) > self.sample_rows:
            return None
        apart = Ledger(self.mixture.names)  # the report is of the first epoch
        for row in encode_rows(self.mixture, list(later.values())):
            pieces = account(apart, row, self.length, self.overlong, self.mixture.location)
            self.pieces[row.source, row.row] = [len(piece.tokens) for piece in pieces]
        return [n for row in rows for n in self.pieces[row]]

    def _per_source(self) -> dict[str, dict[str, Any]]:
        found = self.ledger.snapshot()
        for i, name in enumerate(self.mixture.names):
            counts = found[name]
            for entry in counts["dropped"].values():
                entry["rows"] = [self.mixture.location(i, row) for row in entry["rows"]]
            counts["trained_share"] = counts["trained"] / max(1, counts["tokens"])
            counts["conversations"] = self.chat[i]
            counts["stop_trained"] = self.stops[i]
        return found


def _problems(report: Preflight, survey: Survey) -> list[str]:
    problems = []
    if report.trained_tokens == report.lost_trained_tokens:
        problems.append(
            f"nothing would be trained: {report.rows_dropped} of {report.rows_read} rows gave no sample: "
            f"{explain_drops(survey.ledger, survey.mixture.location)}; {_split_tokens(report, survey)}"
            "set data.format, data.max_length or the source's 'fields' to suit them"
        )
    elif report.rows_dropped > survey.max_dropped * report.rows_read:
        problems.append(
            f"{report.rows_dropped} of {report.rows_read} rows gave no sample, more than the share of "
            f"{survey.max_dropped:g} that data.max_dropped_fraction allows: "
            f"{explain_drops(survey.ledger, survey.mixture.location)}; "
            "mend the rows, or raise the limit"
        )
    problems += _losses(report, survey)
    for name, counts in report.per_source.items():
        if not counts["conversations"] or counts["samples"] == 0:
            continue
        if counts["trained"] == counts["tokens"] - counts["samples"]:
            problems.append(
                f"{name}: every token would be trained, the prompts too, though these are conversations: check the "
                "chat template (tools/preview.py shows what is trained)"
            )
        elif counts["stop_trained"] == 0 and len(survey.stop_ids):
            problems.append(
                f"{name}: no stop token (ids {survey.stop_ids.tolist()}) is trained in any of {counts['samples']} "
                "conversations, so the model would never learn to stop: check the chat template (tools/preview.py "
                "shows what is trained)"
            )
    return problems


def _losses(report: Preflight, survey: Survey) -> list[str]:
    """Parts of prompts that too many rows lack, unless the user allowed that by name."""
    policies = [getattr(ingredient.encode, "policy", None) for ingredient in survey.mixture.ingredients]
    allowed = {part for policy in policies if policy is not None for part in policy.allow_lost}
    problems = []
    for part in conservation.COUNTED:
        entry = report.lost.get(f"lost_{part}")
        kept = entry["rows"] - entry["refused"] if entry else 0
        if part not in allowed and kept > survey.max_lost * report.rows_read:
            problems.append(
                f"lost_{part}: the text of {kept} of {report.rows_read} rows lacks a part of the prompt, more than the "
                f"share of {survey.max_lost:g} that data.max_lost_fraction allows ({entry['example']}): use another "
                f"model.chat_template{_remedies(part)}, or set data.allow_lost=('{part}',) to train without"
            )
    return problems


def _remedies(part: str) -> str:
    return ", or data.fold_system=True" if part == "system" else ""


def _split_tokens(report: Preflight, survey: Survey) -> str:
    """What the template writes in pieces that look like one token, where that is its own doing or costs rows."""
    template = getattr(survey.tokenizer, "template", None)
    if template is None or not (template.is_file or "no_end_of_turn" in report.dropped):
        return ""
    told = lookalikes.explain(survey.tokenizer)
    return f"{told}; " if told else ""


def _warnings(report: Preflight, survey: Survey) -> list[str]:
    warnings = []
    if split := _split_tokens(report, survey):
        warnings.append(split.removesuffix("; "))
    if survey.unseen and report.complete:
        warnings.append(
            f"no sample holds {', '.join(survey.unseen.values())}: new tokens, whose rows stay as they begin (where a "
            "question or text of the data spells a special token, that is text)"
        )
    if not report.complete:
        warnings.append(
            f"a sample of {report.rows_read:,} of {report.rows_in_epoch:,} rows was read; the number of steps is "
            "estimated from it and now fixed; the ledger is completed while training runs"
        )
    if report.coverage < COVERAGE:
        warnings.append(
            f"max_length={report.max_length} holds {report.coverage:.1%} of the samples: "
            f"{report.proposed_length} would hold {COVERAGE:.0%}"
        )
    if report.lost_trained_tokens:
        share = report.lost_trained_tokens / report.trained_tokens
        warnings.append(f"{share:.2%} of the trained tokens are lost to the length limit and to dropped samples")
    if report.double_bos:
        warnings.append(f"{report.double_bos:,} samples begin with two BOS tokens: take one out of the chat template")
    if report.stop_trained is not None and 0 < report.stop_trained < 0.999:
        warnings.append(f"only {report.stop_trained:.1%} of the conversations train a stop token")
    if report.rows_dropped and not report.problems:
        warnings.append(f"{report.rows_dropped:,} rows gave no sample (see the table)")
    return warnings


def _holds_conversations(ingredient: Ingredient) -> bool:
    """Whether a source's rows are conversations, from the first one that can be read (False for own encoders)."""
    encode = ingredient.encode
    if ingredient.replay or not hasattr(encode, "examples"):
        return False
    for row in range(min(_KIND_ROWS, len(ingredient.source))):
        try:
            for example in encode.examples(ingredient.source[row]):
                return isinstance(example, formats.Conversation)
        except RowError:
            continue
    return False
