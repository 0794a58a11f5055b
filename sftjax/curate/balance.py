"""What a data set is made of: kinds of tasks, lengths, variety, templates; and caps on what there is too much of.

`tasks.describe` looks at one row; `summary` adds up what it said of the rows that stay.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sftjax.curate.tasks import OPENING
from sftjax.errors import ConfigError

_EDGES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
LENGTHS = (f"under {_EDGES[0]}", *(f"{low} to {2 * low - 1}" for low in _EDGES[:-1]), f"{_EDGES[-1]} or more")


def length_bucket(tokens: int) -> str:
    return LENGTHS[int(np.searchsorted(_EDGES, tokens, side="right"))]


# --- all rows -------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Mapping[str, Any]], sources: Sequence[str], *, counted: bool) -> dict[str, Any]:
    """What the rows that stay come to.

    Args:
      rows: what `describe` said.
      sources: the name of each row's source.
      counted: whether tokens were counted rather than estimated.
    """
    if not rows:
        return {"rows": 0}
    total = len(rows)

    def values(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows])

    tokens, said, asked = values("tokens"), values("said"), values("asked")
    buckets = Counter(length_bucket(one) for one in tokens.tolist())
    verbs = Counter(row["verb_noun"] for row in rows if row["verb_noun"])
    persona = sum(row["persona"] for row in rows)
    several = [row for row in rows if row["turns"] > 1]
    refusing = sum(row["refusals"] > 0 for row in rows)
    adversarial = [row for row in rows if row["adversarial"]]
    out = {
        "rows": total,
        "tokens": {"counted": counted, "sum": int(tokens.sum()), **_quantiles(tokens)},
        "suggested_max_length": {f"{share}%": _multiple(np.quantile(tokens, share / 100)) for share in (95, 99)},
        "lengths": {name: buckets[name] for name in LENGTHS if buckets[name]},
        "verbosity": {
            "response_words": _quantiles(said),
            "words_per_word_asked": _quantiles(said / np.maximum(asked, 1)),
        },
        "turns": _quantiles(values("turns")),
        "sources": dict(Counter(sources).most_common()),
        "tasks": dict(Counter(row["task"] for row in rows).most_common()),
        "formats": dict(Counter(row["format"] for row in rows).most_common()),
        "refusal_ratio": round(refusing / total, 4),
        "adversarial": {"rows": len(adversarial), "refused": sum(row["refusals"] > 0 for row in adversarial)},
        "role_play_ratio": round(sum(row["role_play"] for row in rows) / total, 4),
        "persona": {"rows": persona, "broken": sum(row["persona_broken"] for row in rows)},
        "format_kept": round(sum(row["format"] != "changing" for row in several) / len(several), 4)
        if several
        else None,
        "instructions": {
            "verb_nouns": len(verbs),
            "evenness": _evenness(verbs),
            "most_common": dict(verbs.most_common(15)),
            "distinct_openings": round(len({row["asking"] for row in rows}) / total, 4),
        },
        "templates": {
            "answers": _templates(Counter(row["opening"] for row in rows), total),
            "prompts": _templates(Counter(row["asking"] for row in rows), total),
        },
    }
    out["warnings"] = _warnings(out)
    return out


def _quantiles(values: np.ndarray) -> dict[str, float]:
    shares = {"min": 0, "p5": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1}
    out = {name: round(float(np.quantile(values, share)), 2) for name, share in shares.items()}
    return {**out, "mean": round(float(values.mean()), 2)}


def _multiple(tokens: float) -> int:
    return max(128, math.ceil(tokens / 128) * 128)


def _evenness(counts: Counter) -> float:
    """Entropy over the highest that it could be: 1 = all alike, 0 = one only."""
    shares = np.array(list(counts.values()), float)
    if len(shares) < 2:
        return 0.0
    shares /= shares.sum()
    return round(float(-(shares * np.log(shares)).sum() / np.log(len(shares))), 4)


def _templates(counts: Counter, total: int) -> list[dict[str, Any]]:
    found = [(text, n) for text, n in counts.most_common(10) if len(text.split()) == OPENING and n > 1]
    return [{"words": text, "rows": n, "share": round(n / total, 4)} for text, n in found]


def _warnings(found: Mapping[str, Any]) -> list[str]:
    warnings = []
    for side, top in found["templates"].items():
        if top and top[0]["share"] >= 0.05 and found["rows"] >= 20:
            warnings.append(
                f"{side} start with the same five words in {top[0]['share']:.0%} of rows: “{top[0]['words']} …”"
            )
    for kind in ("tasks", "sources"):
        name, count = next(iter(found[kind].items()))
        if len(found[kind]) > 1 and count > 0.8 * found["rows"]:
            warnings.append(f"{count / found['rows']:.0%} of rows are of one {kind[:-1]}: {name}")
    if found["refusal_ratio"] > 0.1:
        warnings.append(f"{found['refusal_ratio']:.0%} of rows refuse: a model learns to refuse what is harmless")
    attacks = found["adversarial"]
    if attacks["rows"] >= 20 and attacks["refused"] < 0.5 * attacks["rows"]:
        warnings.append(f"only {attacks['refused']} of {attacks['rows']} adversarial prompts are refused: look at them")
    return warnings


# --- caps -----------------------------------------------------------------------------------------------------------


def capped(labels: Mapping[int, str], order: Iterable[int], limit: float, name: str) -> list[tuple[int, str]]:
    """(row, its label) of the rows over a cap, going through the rows in this order, best first.

    Args:
      labels: row -> what it is counted as.
      order: rows that are there.
      limit: above 1 the most rows of a label; else the largest share of the rows that stay.
      name: of the cap, for the message.

    Raises:
      ConfigError: there are too few labels for such a share.
    """
    order = list(order)
    counts = Counter(labels[row] for row in order)
    most = int(limit) if limit > 1 else _water_level(sorted(counts.values()), limit)
    if order and most < 1:
        raise ConfigError(
            f"balance.{name}={limit:g}: {len(counts)} kinds can't all stay at or below that share; give a share above "
            f"{1 / len(counts):.2g}, or a number of rows"
        )
    seen: Counter = Counter()
    over = []
    for row in order:
        seen[labels[row]] += 1
        if seen[labels[row]] > most:
            over.append((row, labels[row]))
    return over


def _water_level(counts: Sequence[int], share: float) -> int:
    """The most rows of a kind so that none is above its share of what stays."""
    for most in range(max(counts, default=0), 0, -1):
        if most <= share * sum(min(count, most) for count in counts):
            return most
    return 0
