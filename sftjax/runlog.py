"""What a run writes down while it goes: figures, timing, samples, the line that people watch."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

import jax

from sftjax import phases
from sftjax.metrics import LineFile, MetricsLog, ProgressLine, Throughput


class RunLog:
    """The files of a run folder that grow, and the progress line. Other processes than the first keep silent.

    Args:
      folder: the run's folder.
      total_steps: of the whole run.
      continued_from: the step that a continued run goes on from.
    """

    def __init__(
        self,
        folder: str,
        *,
        total_steps: int,
        tensorboard: bool,
        wandb_project: str,
        config: dict[str, Any],
        continued_from: int | None = None,
    ):
        self._on = jax.process_index() == 0
        self.throughput = Throughput()
        self._loss, self._rate = math.nan, 0.0
        if self._on:
            self._metrics = MetricsLog(
                folder,
                tensorboard=tensorboard,
                wandb_project=wandb_project,
                config=config,
                continued_from=continued_from,
            )
            self._samples = LineFile(f"{folder}/samples.jsonl")
            self._bad = LineFile(f"{folder}/nonfinite.jsonl")
            self._line = ProgressLine(total_steps)

    def __enter__(self) -> RunLog:
        self.throughput.start()
        return self

    def __exit__(self, *_) -> None:
        if self._on:
            self._line.close()
            for file in (self._metrics, self._samples, self._bad):
                file.close()

    def finished(self, info, trained: float) -> None:
        """A step is finished: counts for the speed. `info` is the batch's `BatchInfo`."""
        total = info.real_tokens + info.padding_tokens
        self.throughput.step(real=info.real_tokens, trained=int(trained), padded=total)

    def figures(self, step: int, values: dict[str, Any]) -> None:
        """A line of metrics, and of timing."""
        self._loss, self._rate = values["loss"], values["learning_rate"]
        if self._on:
            self._metrics.log(step, values, self.throughput.rates.timing())

    def progress(self, step: int) -> None:
        """The line that people watch."""
        if self._on:
            self._line.update(step, self._loss, self._rate, self.throughput.rates)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        if self._on:
            self._metrics.log(step, values)
            parts = []
            if "eval_loss" in values:
                parts.append(f"held-out loss {values['eval_loss']:.4f}, perplexity {values['eval_perplexity']:.2f}")
                parts.append(f"accuracy {values['eval_mean_token_accuracy']:.3f}")
            if "plain_text_loss" in values:
                parts.append(f"plain text {values['plain_text_loss']:.4f}")
            if "kl_to_base" in values:
                parts.append(f"KL to the base {values['kl_to_base']:.4f}")
            self.say(f"step {step}: {', '.join(parts)}")

    def samples(self, step: int, answers: list[dict[str, Any]]) -> None:
        if self._on:
            for answer in answers:
                self._samples.write({"step": step, **answer})

    def not_finite(self, step: int, figures: dict[str, float], examples: list[tuple[int, int, int]]) -> None:
        """A step that wasn't applied: the rows of its batch are written down as [source, row, sample]."""
        if self._on:
            self._bad.write({"step": step, "loss": figures["nll"], "grad_norm": figures["grad_norm"], "rows": examples})
            self.say(f"step {step}: loss or gradient is not finite; the step is skipped (rows in nonfinite.jsonl)")

    @contextlib.contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """A stretch of work beside the steps; the progress line is left standing above it."""
        if self._on:
            self._line.close()
        with phases.phase(what):
            yield

    def flush(self) -> None:
        """Before a checkpoint: lines up to its step must not be lost later."""
        if self._on:
            for file in (self._metrics, self._samples, self._bad):
                file.flush()

    def counts(self) -> dict[str, int]:
        """How many lines each file has; sealed in a checkpoint, so that a lost file is noticed."""
        if not self._on:
            return {}
        return {**self._metrics.counts(), "samples.jsonl": self._samples.count, "nonfinite.jsonl": self._bad.count}

    def say(self, text: str) -> None:
        if self._on:
            self._line.note(text)


def read_lines(path: str) -> list[dict[str, Any]]:
    """The records of a JSONL file of a run; none if it isn't there."""
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except FileNotFoundError:
        return []
