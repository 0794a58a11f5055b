"""Pairwise judging by a model behind an OpenAI-compatible endpoint (or any teacher of `synth.teacher`).

A judge prefers the answer that stands first, and the longer one. So each pair is asked twice, with the answers' places
swapped, and beside the win rate there is the one at equal length: the preferences are explained by a constant and the
difference in length (a logistic regression, as in arXiv:2404.04475 without its term for each instruction), and what the
constant alone gives is reported.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sftjax.scorers.statistics import bootstrap_mean
from sftjax.synth.teacher import Sampling, Teacher

SYSTEM = (
    "You compare two answers to the same request and say which one serves the person who asked better. Look at whether "
    "it is right, whether it does what was asked, and whether it is clear. Neither length nor the order in which the "
    "answers are shown is a merit. Reason briefly, then end with a line that is exactly [[A]], [[B]], or [[tie]]."
)
PAIR = "# Request\n\n{instruction}\n\n# Answer A\n\n{first}\n\n# Answer B\n\n{second}\n\n# Which is better?"
_VERDICT = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
_PENALTY = 0.01  # on the squares of the regression's two numbers: keeps them finite where every pair is won


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of one pair.

    Attributes:
      score: of our answer: 1 won, 0 lost, 0.5 a tie or one win in each order.
      said: what the judge said with our answer first, and with it second: "ours", "theirs", "tie" or "unclear".
      longer: by how many characters our answer is longer.
    """

    score: float
    said: tuple[str, str]
    longer: int


class Judge:
    """Args:
    teacher: who judges. max_new_tokens: for its reasoning.
    """

    def __init__(self, teacher: Teacher, *, max_new_tokens: int = 512):
        self.teacher, self.name = teacher, teacher.name
        self._sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens)

    def compare(
        self, instructions: Sequence[str], ours: Sequence[str], theirs: Sequence[str | None], *, seed: int = 0
    ) -> list[Verdict | None]:
        """A verdict for each pair; None where there is no other answer, or the judge never said anything clear.

        Raises:
          ConfigError, StorageError: the endpoint refuses, or doesn't answer.
        """
        pairs = [number for number, other in enumerate(theirs) if other is not None]
        asked = []
        for number in pairs:
            for first, second in ((ours[number], theirs[number]), (theirs[number], ours[number])):
                text = PAIR.format(instruction=instructions[number], first=first, second=second)
                asked.append([{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}])
        replies = self.teacher.chat(asked, self._sampling, seed)
        verdicts: list[Verdict | None] = [None] * len(ours)
        for place, number in enumerate(pairs):
            said = (
                read_verdict(replies[2 * place].text, ours_is="A"),
                read_verdict(replies[2 * place + 1].text, ours_is="B"),
            )
            points = [{"ours": 1.0, "theirs": 0.0, "tie": 0.5}[one] for one in said if one != "unclear"]
            if points:
                longer = len(ours[number]) - len(theirs[number])
                verdicts[number] = Verdict(sum(points) / len(points), said, longer)
        return verdicts


def read_verdict(text: str, *, ours_is: str) -> str:
    """The last [[A]], [[B]] or [[tie]] ([[C]]) of a judge's reply."""
    found = _VERDICT.findall(text)
    if not found:
        return "unclear"
    if found[-1].upper() in ("C", "TIE"):
        return "tie"
    return "ours" if found[-1].upper() == ours_is else "theirs"


def summary(verdicts: Sequence[Verdict | None]) -> dict[str, Any]:
    """{"win_rate", "length_controlled_win_rate": {"mean", "low", "high"}, "won", "tied", "lost", "unclear",
    "changed_with_order" (a share), "mean_longer" (characters)} over the pairs that were judged."""
    clear = [verdict for verdict in verdicts if verdict is not None]
    scores = np.array([verdict.score for verdict in clear])
    longer = np.array([verdict.longer for verdict in clear], np.float64)
    both = [verdict.said for verdict in clear if "unclear" not in verdict.said]
    return {
        "win_rate": dict(zip(("mean", "low", "high"), bootstrap_mean(scores), strict=True)),
        "length_controlled_win_rate": _length_controlled(scores, longer),
        "won": int(np.sum(scores > 0.5)),
        "tied": int(np.sum(scores == 0.5)),
        "lost": int(np.sum(scores < 0.5)),
        "unclear": len(verdicts) - len(clear),
        "changed_with_order": float(np.mean([first != second for first, second in both])) if both else None,
        "mean_longer": float(longer.mean()) if len(clear) else None,
    }


def _length_controlled(scores: np.ndarray, longer: np.ndarray, samples: int = 200) -> dict[str, float]:
    rng = np.random.default_rng(0)
    rates = [equal_length_rate(scores, longer)]
    for _ in range(samples if len(scores) else 0):
        drawn = rng.integers(0, len(scores), len(scores))
        rates.append(equal_length_rate(scores[drawn], longer[drawn]))
    low, high = np.quantile(rates[1:] or rates, [0.025, 0.975])
    return {"mean": rates[0], "low": float(low), "high": float(high)}


def equal_length_rate(scores: np.ndarray, longer: np.ndarray) -> float:
    """The win rate were all answers of equal length: sigmoid(a) of score ~ sigmoid(a + b tanh(longer / its spread)).

    Args:
      scores: [N] in [0, 1]. longer: [N] by how much our answer is the longer one.
    """
    if not len(scores):
        return float("nan")
    spread = float(np.sqrt(np.mean(longer**2)))
    features = np.stack([np.ones(len(scores)), np.tanh(longer / spread) if spread else np.zeros(len(scores))], axis=1)
    weights = np.zeros(2)
    for _ in range(50):  # Newton's method
        chance = 1 / (1 + np.exp(-features @ weights))
        gradient = features.T @ (chance - scores) + _PENALTY * weights
        hessian = (features * (chance * (1 - chance))[:, None]).T @ features + _PENALTY * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        weights = weights - step * min(1.0, 2.0 / max(1e-12, float(np.abs(step).max())))
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-weights[0])))


def in_words(figures: Mapping[str, Any]) -> str:
    rate, fair = figures["win_rate"], figures["length_controlled_win_rate"]
    changed = figures["changed_with_order"]
    return (
        f"judge {figures['model']}: win rate {rate['mean']:.1%} ({rate['low']:.1%} to {rate['high']:.1%}) against "
        f"{figures['against']}, {fair['mean']:.1%} at equal length; {figures['won']} won, {figures['tied']} tied, "
        f"{figures['lost']} lost, {figures['unclear']} unclear"
        + ("" if changed is None else f"; {changed:.0%} changed with the order")
    )
