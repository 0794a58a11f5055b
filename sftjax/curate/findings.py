"""`curation.json`: what was found, by rule, with row ids and a sample of each."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sftjax.curate import balance, personal
from sftjax.curate.chunks import Work
from sftjax.curate.decide import Decision, Rows
from sftjax.curate.dedup import Duplicate
from sftjax.curate.settings import Settings
from sftjax.curate.text import Dialogue

SCHEMA = 1
_EXAMPLES, _IDS, _PAIRS, _TEXT = 3, 20, 8, 700

Show = Callable[[int], str]


def gather(
    rows: Rows,
    decision: Decision,
    settings: Settings,
    work: Work,
    location: Show,
    dialogue: Callable[[int], Dialogue],
) -> dict[str, Any]:
    """Everything, as plain values. Where personal data is masked in the rows, it is in the samples shown too.

    Args:
      location: where a row stands ("data.jsonl:17"), by its running number.
      dialogue: reads a row again, by the same.
    """
    names = [one.name for one in work.inputs]
    staying = decision.staying(len(rows))
    readable = [row for row in range(len(rows)) if "error" not in rows.said[row]]

    def text(row: int) -> str:
        shown = _text(dialogue(row))
        return personal.mask(shown) if settings.personal.mode == "mask" else shown

    def place(row: int) -> dict[str, Any]:
        return {"row": location(row), "index": int(rows.index[row]), "source": names[rows.source[row]]}

    def shown(row: int) -> dict[str, Any]:
        if "error" in rows.said[row]:
            return place(row)
        return {**place(row), "score": float(rows.score[row]), "text": text(row)}

    def described(numbers: Sequence[int]) -> dict[str, Any]:
        said = [rows.said[row] for row in numbers]
        return balance.summary(said, [names[rows.source[row]] for row in numbers], counted=bool(work.tokenizer))

    return {
        "schema": SCHEMA,
        "settings": _plain(settings),
        "sources": _sources(rows, decision, work),
        "rows_read": len(rows),
        "rows_kept": len(staying),
        "removed": _removed(decision, shown),
        "quality": _quality(rows, readable, decision, settings, work, location, shown),
        "duplicates": {
            name: _duplicates(found, getattr(settings, name), place, text)
            for name, found in decision.duplicates.items()
        },
        "contamination": {
            "mode": settings.contamination.mode,
            "threshold": settings.contamination.threshold,
            "benchmarks": decision.verdict.benchmarks,
            "items": [{**item, "rows": [place(row) for row in item["rows"]]} for item in decision.verdict.items],
        },
        "personal": _personal(rows, readable, settings, place),
        "balance": {"before": described(readable), "after": described(staying)},
        "licences": dict(Counter(rows.said[row]["licence"] or "unknown" for row in staying).most_common()),
    }


def _text(dialogue: Dialogue) -> str:
    """Who says what, cut in the middle of each long message."""
    most = max(120, _TEXT // max(1, len(dialogue.messages)))
    parts = [
        f"{role}: {text if len(text) <= most else text[: most // 2] + ' … ' + text[-most // 2 :]}"
        for role, text in dialogue.messages
    ]
    if len(parts) > 8:
        parts = [*parts[:3], f"… {len(parts) - 6} more …", *parts[-3:]]
    return "\n".join(parts)


def _plain(settings: Settings) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(one) for one in value]
        if callable(value):
            return getattr(value, "__name__", type(value).__name__)
        return value if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__

    shallow = {one.name: getattr(settings, one.name) for one in dataclasses.fields(settings)}
    return {
        name: plain({one.name: getattr(value, one.name) for one in dataclasses.fields(value)})
        if dataclasses.is_dataclass(value)
        else plain(value)
        for name, value in shallow.items()
    }


def _sources(rows: Rows, decision: Decision, work: Work) -> list[dict[str, Any]]:
    read = Counter(rows.source.tolist())
    gone = Counter(rows.source[list(decision.removed)].tolist()) if decision.removed else Counter()
    return [
        {
            "name": one.name,
            "rows": read[number],
            "kept": read[number] - gone[number],
            "sha256": one.source.fingerprint(),
            "licence": one.licence,
        }
        for number, one in enumerate(work.inputs)
    ]


def _removed(decision: Decision, shown: Callable[[int], dict]) -> dict[str, Any]:
    by_rule: dict[str, list[int]] = {}
    for row, removal in sorted(decision.removed.items()):
        by_rule.setdefault(removal.rule, []).append(row)
    return {
        rule: {
            "count": len(found),
            "examples": [{**shown(row), "detail": decision.removed[row].detail} for row in _spread(found, _EXAMPLES)],
        }
        for rule, found in sorted(by_rule.items(), key=lambda one: -len(one[1]))
    }


def _spread(found: Sequence[Any], count: int) -> list[Any]:
    """Some, evenly from beginning to end."""
    return [found[round(at)] for at in np.linspace(0, len(found) - 1, min(count, len(found)))]


def _quality(
    rows, readable, decision: Decision, settings: Settings, work: Work, location: Show, shown
) -> dict[str, Any]:
    found: dict[str, list[int]] = {rule.name: [] for rule in work.table}
    for row in readable:
        for name in rows.said[row]["taken"]:
            found[name].append(row)
    scores = rows.score[readable]
    counts, _ = np.histogram(np.minimum(scores, 0.999), bins=10, range=(0, 1))
    gone = Counter(removal.rule for removal in decision.removed.values())
    return {
        "preset": settings.quality.preset,
        "threshold": settings.quality.threshold if not settings.quality.keep_top else None,
        "keep_top": settings.quality.keep_top or None,
        "mean": round(float(scores.mean()), 4) if len(scores) else None,
        "histogram": counts.tolist(),
        "rules": {
            rule.name: {
                "about": rule.about,
                "weight": rule.weight,
                "found": len(found[rule.name]),
                "removed": gone[rule.name],
                "rows": [location(row) for row in found[rule.name][:_IDS]],
                "example": shown(found[rule.name][0]) if found[rule.name] else None,
            }
            for rule in work.table
        },
    }


def _duplicates(found: Sequence[Duplicate], given: Any, place: Callable[[int], dict], text: Show) -> dict[str, Any]:
    """Counts, and the pairs nearest the threshold, by which a person sees whether it is right."""
    nearest = sorted(found, key=lambda one: one.similarity)[:_PAIRS]
    return {
        "mode": given.mode,
        "threshold": getattr(given, "threshold", None),
        "found": len(found),
        "pairs": [
            {
                "similarity": one.similarity,
                "row": {**place(one.row), "text": text(one.row)},
                "of": {**place(one.of), "text": text(one.of)},
            }
            for one in nearest
        ],
    }


def _personal(rows: Rows, readable: Sequence[int], settings: Settings, place: Callable[[int], dict]) -> dict[str, Any]:
    kinds: Counter = Counter()
    having = []
    for row in readable:
        if counts := rows.said[row].get("personal"):
            kinds.update(counts)
            having.append({**place(row), "kinds": counts})
    return {
        "mode": settings.personal.mode,
        "rows": len(having),
        "kinds": dict(kinds.most_common()),
        "where": having[:_IDS],
    }
