"""The preview page: what rows become, token by token, with search, filters and histograms, and how they will be packed.

One file that opens offline. Everything that comes from the data is escaped; it may hold any text.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from sftjax.curate import balance, report
from sftjax.data import packing
from sftjax.data.bins import lay_out
from sftjax.data.ledger import trained_tokens
from sftjax.data.preview import Row, visible
from sftjax.data.tokenizer import Tokenizer
from sftjax.data.types import Sample
from sftjax.errors import StorageError

MAX_PACKED_ROWS = 60  # drawn


@dataclasses.dataclass(frozen=True)
class Seen:
    """One row, the name of the source it stands in, and what a curation removed it for."""

    row: Row
    source: str
    removal: Mapping[str, Any] | None = None  # a line of removed.jsonl


def removals(path: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The lines of a curation's `removed.jsonl`, by source and index.

    Raises:
      StorageError: it isn't there, or isn't one.
    """
    try:
        lines = [orjson.loads(line) for line in Path(path).read_bytes().splitlines()]
        return {(line["source"], line["index"]): line for line in lines}
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}") from None
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise StorageError(f"{path} isn't a removed.jsonl, as tools/curate.py writes it") from None


def page(tokenizer: Tokenizer, seen: Iterable[Seen], title: str, *, rows_in_all: int, max_length: int = 0) -> str:
    """The page, as HTML.

    Args:
      rows_in_all: rows of the sources, more than are shown perhaps.
      max_length: draw the rows of so many tokens that these samples are packed into, in this order; 0: don't.
    """
    seen = list(seen)
    samples = [sample for one in seen for sample in one.row.samples]
    numbers = itertools.count(1)
    heaviest = max((float(sample.weights.max()) for sample in samples), default=1.0)
    cards = []
    for one in seen:
        if one.row.error is not None:
            cards.append({**_about(one), "refused": str(one.row.error), "rules": [*_rules(one), one.row.error.reason]})
        for sample in one.row.samples:
            cards.append(
                {
                    **_about(one),
                    "number": next(numbers),
                    "sample": sample.sample if len(one.row.samples) > 1 else None,
                    "tokens": len(sample.tokens),
                    "trained": trained_tokens(sample),
                    "pieces": pieces(tokenizer, sample, heaviest),
                    "rules": [*_rules(one), *sample.flags],
                }
            )
    lengths, trained = ([card[key] for card in cards if "number" in card] for key in ("tokens", "trained"))
    scores = [card["score"] for card in cards if card["score"] is not None]
    return (
        report.templates()
        .get_template("curate/preview.html.j2")
        .render(
            title=title,
            cards=cards,
            rows=len(seen),
            rows_in_all=rows_in_all,
            tokens=sum(lengths),
            trained=sum(trained),
            refused=sum("refused" in card for card in cards),
            sources=sorted({one.source for one in seen}),
            rules=Counter(rule for card in cards for rule in card["rules"]).most_common(),
            histograms=_histograms(lengths, trained, scores),
            packed=packed(samples, max_length) if max_length else None,
        )
    )


def pieces(tokenizer: Tokenizer, sample: Sample, heaviest: float) -> list[dict[str, Any]]:
    """Stretches of equal weight as text, control tokens one by one; `strength` is the weight's share of `heaviest`."""
    control = tokenizer.is_control[sample.tokens]
    cuts = np.flatnonzero((np.diff(sample.weights) != 0) | control[1:] | control[:-1]) + 1
    return [
        {
            "text": visible(tokenizer.decode(sample.tokens[start:end])),
            "weight": float(sample.weights[start]),
            "strength": float(sample.weights[start]) / heaviest if heaviest else 0.0,
            "control": bool(control[start]),
        }
        for start, end in itertools.pairwise([0, *cuts.tolist(), len(sample.tokens)])
    ]


def packed(samples: Sequence[Sample], max_length: int) -> dict[str, Any]:
    """The rows that best-fit packing makes of the samples in this order, each a list of {"number", "tokens"}.

    A sample longer than `max_length` is cut as in training (`overlong="truncate"`).

    Raises:
      ConfigError: a length that rows can't have.
    """
    # as many segments as a configuration has by default
    shape = packing.row_shape("best_fit", length=max_length, batch_size=1, max_segments=64)
    segments = [
        {"number": number, "tokens": len(piece.tokens)}
        for number, sample in enumerate(samples, 1)
        for piece in packing.fit_to_length(sample, max_length, "truncate").pieces
    ]
    lengths = [one["tokens"] for one in segments]
    bins = packing.open_bins("best_fit", shape, packing.default_bins(max_length))
    rows = [[segments[place] for place in row] for row in lay_out(lengths, bins)]
    used = sum(segment["tokens"] for row in rows for segment in row)
    return {
        "rows": [
            {"segments": row, "padding": max_length - sum(one["tokens"] for one in row)}
            for row in rows[:MAX_PACKED_ROWS]
        ],
        "count": len(rows),
        "length": max_length,
        "filled": used / (len(rows) * max_length) if rows else 0.0,
    }


def _about(one: Seen) -> dict[str, Any]:
    given = one.removal if one.removal is not None else one.row.record or {}
    score = given.get("score" if one.removal is not None else "_score")
    return {
        "place": one.row.location,
        "source": one.source,
        "score": float(score) if isinstance(score, (int, float)) else None,
        "removed": one.removal,
    }


def _rules(one: Seen) -> list[str]:
    return [one.removal["rule"]] if one.removal is not None else []


def _histograms(lengths: Sequence[int], trained: Sequence[int], scores: Sequence[float]) -> dict[str, dict[str, int]]:
    """Counts by label; those that would be empty are left out."""

    def by_length(values: Sequence[int]) -> dict[str, int]:
        counts = Counter(balance.length_bucket(value) for value in values)
        used = [place for place, name in enumerate(balance.LENGTHS) if counts[name]]
        return {name: counts[name] for name in balance.LENGTHS[min(used, default=0) : max(used, default=-1) + 1]}

    tenths = Counter(min(int(10 * score), 9) for score in scores)
    by_score = {f"{low / 10:.1f} to {(low + 1) / 10:.1f}": tenths[low] for low in range(10)} if scores else {}
    found = {
        "tokens of a sample": by_length(lengths),
        "trained tokens of a sample": by_length(trained),
        "score of a row": by_score,
    }
    return {name: counts for name, counts in found.items() if counts}
