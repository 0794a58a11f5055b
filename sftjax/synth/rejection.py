"""Rejection sampling, best of N: several answers to each prompt, a reward for each, the best one kept if good enough.

    prompt --teacher--> N answers --reward--> N numbers --best >= threshold--> a training row
                                                        \\-- with `pairs` --> chosen and rejected

What the reward rewards may not be what is wanted: the report therefore has how the reward goes with length, how varied
the answers are before and after, and what an independent second reward says of the same answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sftjax.scorers.rows import messages_of
from sftjax.scorers.statistics import distinct
from sftjax.synth import text
from sftjax.synth.asking import Asker, Filters
from sftjax.synth.rewards import Pair, Reward
from sftjax.synth.teacher import Sampling

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Made:
    """What a method made: training rows, pairs for preference tuning (rejection sampling only), and its report."""

    rows: list[Row]
    report: dict[str, Any]
    pairs: list[Row] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Candidate:
    """An answer, numbered by its row and its sample."""

    index: int
    sample: int
    text: str
    score: float | None = None
    second: float | None = None


def best_of_n(
    rows: Sequence[Mapping[str, Any]],
    asker: Asker,
    reward: Reward,
    sampling: Sampling,
    *,
    n: int = 8,
    threshold: float = 0.5,
    second: Reward | None = None,
    pairs: bool = False,
) -> Made:
    """Answers each row n times and keeps the best answer.

    Answers that are empty, were cut off, or have no reward are never kept. Of equal rewards the first sample wins.

    Args:
      rows: prompts (see `scorers.rows`), with what the reward looks at.
      threshold: the least reward of a kept answer.
      second: scores the same answers, for the report only.
      pairs: give the worst answer too, where its reward is lower.
    """
    filters = Filters()
    conversations = [messages_of(row) for row in rows]
    replies = asker.chat(conversations, sampling, n=n, what="answers")
    candidates = []
    for number, reply in enumerate(replies):
        checks = [("empty", not reply.text.strip()), ("cut_off", reply.cut)]
        if filters.first(checks) is None:
            candidates.append(_Candidate(number // n, number % n, reply.text.strip()))
    for candidate, score in zip(candidates, _scores(asker, reward, rows, candidates), strict=True):
        candidate.score = score
    candidates = [each for each in candidates if not filters.take("no_reward", each.score is None)]
    if second is not None:
        for candidate, score in zip(candidates, _scores(asker, second, rows, candidates), strict=True):
            candidate.second = score
    made, preferences, chosen = [], [], []
    for index, group in _by_row(candidates, len(rows)):
        best = max(group, key=lambda each: (each.score, -each.sample), default=None)
        checks = [("no_answer_left", best is None), ("below_threshold", best is not None and best.score < threshold)]
        if filters.first(checks) is not None:
            continue
        chosen.append(best)
        made.append(_row(conversations[index], best, group))
        worst = min(group, key=lambda each: (each.score, each.sample))
        if pairs and not filters.take("no_worse_answer", worst.score >= best.score):
            preferences.append(_pair(conversations[index], best, worst))
    report = {
        "method": "rejection",
        "prompts": len(rows),
        "n": n,
        "threshold": threshold,
        "answers": len(replies),
        "rows": len(made),
        "pairs": len(preferences),
        "filters": filters.as_dict(),
        **_measures(candidates, chosen, reward.name, second and second.name),
    }
    return Made(made, report | {"warnings": list(_warnings(report))}, preferences)


def _scores(asker: Asker, reward: Reward, rows: Sequence[Mapping[str, Any]], candidates: Sequence[_Candidate]):
    def do(part: Sequence[tuple[int, str]]) -> list[float | None]:
        pairs: list[Pair] = [(rows[index], answer) for index, answer in part]
        return reward.score(pairs)

    return asker.remember(f"answers scored by {reward.name}", [(each.index, each.text) for each in candidates], do)


def _by_row(candidates: Iterable[_Candidate], count: int) -> list[tuple[int, list[_Candidate]]]:
    groups: list[list[_Candidate]] = [[] for _ in range(count)]
    for each in candidates:
        groups[each.index].append(each)
    return list(enumerate(groups))


def _row(conversation: Sequence[Mapping[str, Any]], best: _Candidate, group: Sequence[_Candidate]) -> Row:
    row = {
        "messages": [*conversation, {"role": "assistant", "content": best.text}],
        "method": "rejection",
        "index": best.index,
        "sample": best.sample,
        "score": best.score,
        "scores": [each.score for each in group],
    }
    return row if best.second is None else row | {"second_score": best.second}


def _pair(conversation: Sequence[Mapping[str, Any]], best: _Candidate, worst: _Candidate) -> Row:
    return {
        "prompt": list(conversation),
        "chosen": [{"role": "assistant", "content": best.text}],
        "rejected": [{"role": "assistant", "content": worst.text}],
        "index": best.index,
        "chosen_score": best.score,
        "rejected_score": worst.score,
    }


# --- the report --------------------------------------------------------------------------------------------------


def _measures(
    candidates: Sequence[_Candidate], chosen: Sequence[_Candidate], reward: str, second: str | None
) -> dict[str, Any]:
    first = {each.index: each for each in reversed(candidates)}  # what sampling once would have given
    before = [first[each.index] for each in chosen]
    lengths = [len(each.text.split()) for each in candidates]
    scores = [each.score for each in candidates]
    groups = [each.index for each in candidates]
    found = {
        "reward": {
            "name": reward,
            "answers": distribution(scores),
            "first_answers": distribution([each.score for each in first.values()]),
            "chosen": distribution([each.score for each in chosen]),
        },
        "words": {
            "first_answers": _mean([len(each.text.split()) for each in before]),
            "chosen": _mean([len(each.text.split()) for each in chosen]),
        },
        "reward_length_correlation": {
            "all": correlation(scores, lengths),
            "within_prompts": correlation(_centred(scores, groups), _centred(lengths, groups)),
        },
        "distinct": {
            name: {str(n): distinct([text.words(each.text) for each in group], n) for n in (1, 2, 3)}
            for name, group in (("before", before), ("after", chosen))
        },
    }
    if second is not None:
        both = [each for each in candidates if each.second is not None]
        found["second"] = {
            "name": second,
            "answers": distribution([each.second for each in both]),
            "first_answers": distribution([each.second for each in before if each.second is not None]),
            "chosen": distribution([each.second for each in chosen if each.second is not None]),
            "correlation": correlation([each.score for each in both], [each.second for each in both]),
        }
    return found


def distribution(values: Sequence[float]) -> dict[str, Any]:
    """Count, mean, standard deviation, quantiles, and a histogram of ten equal bins between the extremes."""
    if not values:
        return {"count": 0}
    array = np.asarray(values, np.float64)
    counts, edges = np.histogram(array, bins=10)
    names = ("min", "p10", "p50", "p90", "max")
    return {
        "count": len(array),
        "mean": float(array.mean()),
        "sd": float(array.std()),
        **dict(zip(names, map(float, np.quantile(array, [0, 0.1, 0.5, 0.9, 1])), strict=True)),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's; None where one of them doesn't vary."""
    if len(first) < 2 or np.ptp(first) < 1e-12 or np.ptp(second) < 1e-12:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _centred(values: Sequence[float], groups: Sequence[int]) -> np.ndarray:
    """Each value less the mean of its group."""
    array, number = np.asarray(values, np.float64), np.unique(groups, return_inverse=True)[1]
    return array - (np.bincount(number, array) / np.bincount(number))[number] if len(array) else array


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _warnings(report: Mapping[str, Any]) -> Iterable[str]:
    if report["rows"] == 0:
        yield "nothing was kept: lower the threshold, or ask a better teacher"
        return
    by_length = report["reward_length_correlation"]["within_prompts"]
    if by_length is not None and by_length > 0.5 and report["words"]["chosen"] > 1.2 * report["words"]["first_answers"]:
        yield f"the reward likes long answers (correlation {by_length:.2f}): what is kept is longer, not only better"
    before, after = (report["distinct"][name]["2"] for name in ("before", "after"))
    if after < 0.8 * before:
        yield f"the kept answers are less varied than the first ones (distinct-2 {after:.3f} against {before:.3f})"
    second = report.get("second")
    if second and second["chosen"]["count"] and second["chosen"]["mean"] <= second["first_answers"]["mean"]:
        yield (
            f"{second['name']} finds the chosen answers no better than the first ones "
            f"({second['chosen']['mean']:.3f} against {second['first_answers']['mean']:.3f}): over-optimisation?"
        )
