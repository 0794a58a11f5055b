"""What the rules ask of a run folder: settings, the course of the losses, the answers. None where it isn't known."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import statistics
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

from sftjax import held_out, paths, report
from sftjax.held_out import Difference

# Learning rates that are usual for a method, and one to begin with.
USUAL = {"full": (1e-6, 5e-5, 2e-5), "lora": (2e-5, 3e-4, 2e-4), "bottleneck": (5e-5, 1e-3, 2e-4)}
SMALL_MODEL, SMALL_FACTOR = 500_000_000, 10  # parameters; small models stand, and want, higher rates
MIN_STEPS = 10  # logged ones, to speak of a course
Verdict = tuple[str, str] | None  # (evidence, remedy) of a rule
CJK = r"[぀-ヿ㐀-鿿가-힯]"


class Course(NamedTuple):
    """A row of figures as a whole: where it begins and ends, and whether it fell between, as far as can be told."""

    first: float
    last: float
    fell: bool
    tested: Difference | None = None  # what the verdict rests on, where it is more than the two figures
    spread: float = 0.0  # standard deviation of a single figure

    @classmethod
    def judge(cls, first: float, last: float, noise: float = 0.0, tested: Difference | None = None) -> Course:
        """With the interval where there is one, as the report does; else by the noise of last - first (two standard
        errors) and at least a hundredth of it."""
        fell = tested.fell if tested else last < first - max(noise, 0.01 * abs(first))
        return cls(first, last, fell, tested)

    def rose_from(self, first: float) -> bool:
        """Whether it ends a tenth above a single figure, and more than two deviations of such a figure."""
        return self.last > first + max(0.1 * abs(first), 2 * self.spread)


class Figures:
    """A run as the rules see it: the files of its folder, and figures made of them."""

    def __init__(self, folder: str, summary: Mapping[str, Any] | None = None):
        self.run = report.Run(folder, summary)
        self.preflight, self.summary, self.model = self.run.preflight, self.run.summary, self.run.model
        self.train = [line for line in self.run.train if _is_number(line.get("loss"))]
        self.evals = [line for line in self.run.evals if _is_number(line.get("eval_loss"))]
        self.answers, self.answers_before = self._answers()

    def setting(self, path: str) -> Any:
        """A field of the run's configuration, such as "train.learning_rate"; None where it isn't known."""
        value: Any = self.run.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    # --- the learning rate -------------------------------------------------------------------------------------------

    @property
    def method(self) -> str:
        """full, lora (and what is like it) or bottleneck."""
        name = self.setting("peft.method") or "none"
        return {"none": "full", "houlsby": "bottleneck", "pfeiffer": "bottleneck"}.get(name, "lora")

    @property
    def usual_rates(self) -> tuple[float, float, float]:
        """(lowest, highest, one to begin with) for the method and the size of the model."""
        low, high, start = USUAL[self.method]
        base = (self.model.get("parameters") or {}).get("base")
        return (low, SMALL_FACTOR * high, start) if base and base < SMALL_MODEL else (low, high, start)

    @property
    def highest_rate(self) -> float | None:
        """The highest that was reached: a warm-up may have ended early, or never."""
        rates = [line["learning_rate"] for line in self.train if _is_number(line.get("learning_rate"))]
        return max(rates) if rates else self.setting("train.learning_rate")

    def lower_rate(self) -> float:
        """A third of the learning rate, or what the method begins with if that is lower."""
        return _round(min((self.setting("train.learning_rate") or 1.0) / 3, self.usual_rates[2]))

    def higher_rate(self) -> float:
        """Three times the learning rate, within what is usual."""
        low, high, start = self.usual_rates
        rate = self.setting("train.learning_rate") or 0.0
        return start if rate < low else _round(min(3 * rate, high))

    # --- losses ------------------------------------------------------------------------------------------------------

    @property
    def training(self) -> Course | None:
        """Of the training loss: the first tenth of the steps against the last fifth."""
        losses = [line["loss"] for line in self.train]
        if len(losses) < MIN_STEPS:
            return None
        first, last = losses[: max(3, len(losses) // 10)], losses[-max(3, len(losses) // 5) :]
        between = statistics.median(abs(a - b) for a, b in itertools.pairwise(losses))  # neighbours
        spread = between / 0.95  # the median of |a - b| is 0.95 deviations
        error = spread * math.sqrt(1 / len(first) + 1 / len(last))
        course = Course.judge(statistics.fmean(first), statistics.fmean(last), 2 * error)
        return course._replace(spread=spread)

    @property
    def held_out(self) -> Course | None:
        """Of the held-out loss, from before training to what is exported, as the report has it; to the lowest after,
        where only that fell or nothing is exported."""
        reported, best = self.reported, None
        if len(self.evals) > 1:
            first, line = self.evals[0], min(self.evals[1:], key=lambda line: line["eval_loss"])
            tested = self.difference("evaluation", first["step"], line["step"])
            best = Course.judge(first["eval_loss"], line["eval_loss"], tested=tested)
        if reported and (reported.fell or not best or not best.fell):
            return Course.judge(reported.before, reported.after, tested=reported)
        return best

    @property
    def reported(self) -> Difference | None:
        """Held-out loss before training and of what is exported, as the report shows it."""
        return report.difference(self.summary)

    def difference(self, kind: str, first: int, last: int, source: str | None = None) -> Difference | None:
        """Of the held-out loss (of one source) between two steps; None where a step's sums aren't kept.

        Args:
          kind: "evaluation" or "plain-text", as the files of the run are called.
        """
        if (kind, source, first, last) == ("evaluation", None, 0, self.summary.get("exported_step")) and self.reported:
            return self.reported
        paths = [os.path.join(self.run.folder, f"{kind}-{step}.npz") for step in (first, last)]
        try:
            found = [held_out.load(path) for path in paths]
            return held_out.compare(*(one.of_source(source) if source else one for one in found))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # gone, torn, or the examples changed in between
            return None

    @property
    def falling(self) -> bool | None:
        """Whether training brought the loss down, on what it saw or on what it didn't; None: too little to tell."""
        courses = [course for course in (self.training, self.held_out) if course]
        return any(course.fell for course in courses) if courses else None

    @property
    def epochs(self) -> float:
        return self.train[-1].get("epoch") or 0.0 if self.train else 0.0

    def sources(self) -> dict[str, Course]:
        """Of the held-out loss of each source, where there are several, and of plain text: from before training to what
        is exported (the end, where that isn't known)."""
        names = sorted({name for line in self.run.evals for name in line if name.startswith("eval_loss/")})
        names.append("plain_text_loss")  # see eval.forgetting
        found = {}
        for name in names:
            lines = [line for line in self.run.evals if _is_number(line.get(name))]
            if len(lines) < 2:
                continue
            first, source = lines[0], name.removeprefix("eval_loss/")
            last = next((line for line in lines[1:] if line["step"] == self.summary.get("exported_step")), lines[-1])
            kind = ("plain-text", None) if name == "plain_text_loss" else ("evaluation", source)
            tested = self.difference(kind[0], first["step"], last["step"], kind[1])
            found[source] = Course.judge(first[name], last[name], tested=tested)
        return found

    # --- speed -------------------------------------------------------------------------------------------------------

    def timing(self, name: str) -> list[float]:
        return [line[name] for line in self.run.timing if _is_number(line.get(name))]

    # --- answers -----------------------------------------------------------------------------------------------------

    def _answers(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The answers of the step that was exported (the last, where that isn't known), and those before training."""
        lines = [line for line in self.run.samples if isinstance(line.get("answer"), str) and "step" in line]
        steps = sorted({line["step"] for line in lines})
        if not steps or steps[-1] == 0:
            return [], []
        chosen = self.summary.get("exported_step")
        chosen = chosen if chosen in steps else steps[-1]
        return [line for line in lines if line["step"] == chosen], [line for line in lines if line["step"] == 0]

    def base_files(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the exported model, or of the base that an exported adapter belongs to."""
        base = paths.found(str(self.setting("model.path") or ""), paths.working_folder(self.run.folder))
        for folder in (os.path.join(self.run.folder, "export"), base):
            if "://" in folder or not os.path.isfile(os.path.join(folder, name)):
                continue
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                try:
                    value = json.load(file)
                except ValueError:
                    return None
            return value if isinstance(value, dict) else None
        return None


def words(text: str) -> list[str]:
    """Words, and characters of scripts that don't part them."""
    return re.findall(rf"{CJK}|(?:(?!{CJK})\S)+", text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _round(rate: float) -> float:
    return float(f"{rate:.1g}")
