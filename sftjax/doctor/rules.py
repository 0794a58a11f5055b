"""The table of rules. Each is a function of a run's figures: None, or (evidence, remedy).

A remedy names the field of the configuration and a value for it. The order is that of causes before effects: of several
findings the first explains most. Thresholds are there to keep a healthy run silent; each is named where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sftjax.doctor import answers, running, training
from sftjax.doctor.figures import Figures, Verdict
from sftjax.errors import ConfigError

RULES: tuple[Callable[[Figures], Verdict], ...] = (
    training.learning_rate_too_high,
    training.steps_not_finite,
    training.learning_rate_too_low,
    training.template_mismatch,
    training.mask_leaves_little,
    training.dead_adapters,
    training.adapter_too_small,
    training.loss_not_falling,
    training.length_too_short,
    answers.stop_token_untrained,
    answers.stop_token_missing,
    training.duplicates,
    training.validation_rising,
    training.forgetting,
    training.full_for_a_small_change,
    answers.empty_answers,
    answers.garbled_answers,
    answers.refusals,
    answers.loops,
    answers.style_collapse,
    answers.endless_answers,
    running.gradient_spikes,
    running.learning_rate_unusual,
    running.padding_waste,
    running.data_bound,
    running.slow_device,
)


class Finding(NamedTuple):
    rule: str
    evidence: str
    remedy: str


def diagnose(folder: str, summary: Mapping[str, Any] | None = None) -> list[Finding]:
    """What is wrong with a run, the likeliest cause first; empty for a healthy one. Files that aren't there (yet) leave
    out what would be read from them.

    Args:
      folder: the run's.
      summary: of a run that is about to be finished, which has no summary.json yet.

    Raises:
      ConfigError: it is no run's folder.
    """
    figures = Figures(str(folder), summary)
    if not figures.run.config:
        raise ConfigError(f"{folder}: no config.json that can be read, so this is no run's folder")
    found = [(rule.__name__, rule(figures)) for rule in RULES]
    return [Finding(name, *verdict) for name, verdict in found if verdict]


def text(findings: Sequence[Finding]) -> str:
    """For a person."""
    if not findings:
        return "doctor: nothing found"
    lines = []
    for finding in findings:
        lines += [f"doctor:  {finding.rule.replace('_', ' ')}: {finding.evidence}", f"         -> {finding.remedy}"]
    return "\n".join(lines)
