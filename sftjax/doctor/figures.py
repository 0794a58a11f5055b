"""What the rules ask of a run folder: settings, the course of the losses, the answers. None where it isn't known."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import statistics
from typing import Any, NamedTuple

from sftjax import paths, report

# Learning rates that are usual for a method, and one to begin with.
USUAL = {"full": (1e-6, 5e-5, 2e-5), "lora": (2e-5, 3e-4, 2e-4), "bottleneck": (5e-5, 1e-3, 2e-4)}
SMALL_MODEL, SMALL_FACTOR = 500_000_000, 10  # parameters; small models stand, and want, higher rates
MIN_STEPS = 10  # logged ones, to speak of a course
Verdict = tuple[str, str] | None  # (evidence, remedy) of a rule
CJK = r"[぀-ヿ㐀-鿿가-힯]"


class Course(NamedTuple):
    """A row of figures as a whole: where it begins and ends, and what its noise would do to the difference."""

    first: float
    last: float
    noise: float  # two standard errors of last - first

    @property
    def fell(self) -> bool:
        return self.last < self.first - max(self.noise, 0.01 * abs(self.first))

    @property
    def rose(self) -> bool:
        return self.last > self.first + max(self.noise, 0.1 * abs(self.first))


class Figures:
    """A run as the rules see it: the files of its folder, and figures made of them."""

    def __init__(self, folder: str):
        self.run = report.Run(folder)
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
        spread = statistics.median(abs(a - b) for a, b in itertools.pairwise(losses))  # between neighbours
        error = spread / 0.95 * math.sqrt(1 / len(first) + 1 / len(last))  # median of |a - b|: 0.95 deviations
        return Course(statistics.fmean(first), statistics.fmean(last), 2 * error)

    @property
    def held_out(self) -> Course | None:
        """Of the held-out loss: before training, and the lowest after."""
        losses = [line["eval_loss"] for line in self.evals]
        if len(losses) < 2:
            return None
        interval = self.summary.get("difference_95")
        known = isinstance(interval, list) and len(interval) == 2
        return Course(losses[0], min(losses[1:]), abs(interval[1] - interval[0]) / 2 if known else 0.0)

    @property
    def falling(self) -> bool | None:
        """Whether training brought the loss down, on what it saw or on what it didn't; None: too little to tell."""
        courses = [course for course in (self.training, self.held_out) if course]
        return any(course.fell for course in courses) if courses else None

    @property
    def epochs(self) -> float:
        return self.train[-1].get("epoch") or 0.0 if self.train else 0.0

    def sources(self) -> dict[str, Course]:
        """Of the held-out loss of each source, where there are several, and of plain text: before, and at the end."""
        names = sorted({name for line in self.evals for name in line if name.startswith("eval_loss/")})
        names.append("plain_text_loss")  # see eval.forgetting
        found = {}
        for name in names:
            losses = [line[name] for line in self.evals if _is_number(line.get(name))]
            if len(losses) > 1:
                found[name.removeprefix("eval_loss/")] = Course(losses[0], losses[-1], 0.0)
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
