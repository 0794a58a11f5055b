"""Which rows go, and why: the steps in order, each on what the steps before it left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sftjax.curate import balance, chunks, contamination, dedup, semantic
from sftjax.curate.contamination import Hit, Verdict
from sftjax.curate.dedup import Duplicate
from sftjax.curate.settings import Settings
from sftjax.curate.text import Dialogue

_ANSWERS = 0.5  # of the threshold: how similar the answers alone must be
_ROUNDS = 3


class Removal(NamedTuple):
    """Why a row is not kept."""

    rule: str
    detail: str


@dataclass
class Rows:
    """All rows of all sources, by a running number.

    Attributes:
      source, index: number of the source and row of it.
      score: float32; NaN where the row can't be read.
      said: what chunks.look said of each.
      keys: of exact duplicates.
      signs, shingles, offsets: as dedup.near_duplicates takes them.
      lessons: what duplicates have to share beside their words.
      hits: of benchmark items, by running number.
    """

    source: np.ndarray
    index: np.ndarray
    score: np.ndarray
    said: list[dict[str, Any]]
    keys: list[bytes]
    signs: np.ndarray
    shingles: np.ndarray
    offsets: np.ndarray
    lessons: dedup.Lessons
    hits: list[Hit]

    def __len__(self) -> int:
        return len(self.said)


_RAGGED = {"numbers": "number_counts", "shingles": "shingle_counts", "answers": "answer_counts"}


def collect(work: chunks.Work, folder: Path) -> Rows:
    """What the files of all chunks hold."""
    said: list[dict] = []
    hits, parts, sources, indices = [], [], [], []
    for number, (source, start, end) in enumerate(work.chunks()):
        part = chunks.load(chunks.path_of(folder, number))
        hits += [
            Hit(row + len(said), item, tuple(starts), tuple(long), whole)
            for row, item, starts, long, whole in part["hits"]
        ]
        said += part["rows"]
        parts.append(part)
        sources.append(np.full(end - start, source, np.int32))
        indices.append(np.arange(start, end))
    joined = {
        name: np.concatenate([part.pop(name) for part in parts])
        for name in ("keys", "kinds", "signs", *_RAGGED, *_RAGGED.values())
    }

    def shingled(name: str) -> dedup.Shingled:
        counts = np.cumsum(joined[_RAGGED[name]], dtype=np.int64)
        return dedup.Shingled(joined[name], np.concatenate([[0], counts]))

    texts = shingled("shingles")
    return Rows(
        source=np.concatenate(sources),
        index=np.concatenate(indices),
        score=np.array([one.get("score", math.nan) for one in said], np.float64),
        said=said,
        keys=[key.tobytes() for key in joined["keys"]],
        signs=joined["signs"],
        shingles=texts.flat,
        offsets=texts.offsets,
        lessons=dedup.Lessons(joined["kinds"], shingled("numbers"), shingled("answers")),
        hits=hits,
    )


@dataclass
class Decision:
    """What is removed, and what each step found (also where it only reports)."""

    removed: dict[int, Removal] = field(default_factory=dict)
    duplicates: dict[str, list[Duplicate]] = field(default_factory=dict)
    verdict: Verdict = field(default_factory=Verdict)

    def staying(self, count: int) -> list[int]:
        return [row for row in range(count) if row not in self.removed]


def decide(
    rows: Rows,
    settings: Settings,
    index: contamination.Index,
    names: Sequence[str],
    place: Callable[[int], str],
    dialogue: Callable[[int], Dialogue],
    say: Callable[[str], None],
) -> Decision:
    """Goes through the steps.

    Args:
      names: of the sources.
      place: where a row stands, by its running number.
      dialogue: reads a row again, by its running number.
      say: told what is going on.
    """
    decision = Decision()
    removed = decision.removed
    for row, said in enumerate(rows.said):
        if "error" in said:
            removed[row] = Removal("unreadable", f"{said['error']}: {said['detail']}")
    _by_quality(rows, settings, removed)

    if settings.contamination.mode != "off":
        decision.verdict = contamination.judge(index, rows.hits, settings.contamination.threshold)
        if settings.contamination.mode == "remove":
            for row, detail in decision.verdict.remove.items():
                removed.setdefault(row, Removal("contamination", detail))

    def best_first() -> list[int]:
        staying = np.array(decision.staying(len(rows)), np.int64)
        return staying[np.lexsort((staying, -rows.score[staying]))].tolist()

    def step(name: str, mode: str, search: Callable[[list[int]], list[Duplicate]]) -> None:
        if mode == "off":
            return
        say(f"{name} duplicates")
        decision.duplicates[name] = found = search(best_first())
        if mode == "remove":
            for one in found:
                removed[one.row] = Removal(f"{name}_duplicate", f"of {place(one.of)}, similarity {one.similarity:g}")

    step("exact", settings.exact.mode, lambda order: dedup.exact_duplicates(rows.keys, order))
    threshold = settings.near.threshold
    step(
        "near",
        settings.near.mode,
        lambda order: dedup.near_duplicates(
            rows.signs,
            rows.shingles,
            rows.offsets,
            order,
            threshold,
            alike=lambda row, other: rows.lessons.alike(row, other, _ANSWERS * threshold),
        ),
    )
    step("semantic", settings.semantic.mode, lambda order: _semantic(order, rows.lessons, settings, dialogue))
    _by_caps(rows, settings, names, removed, best_first)
    return decision


def _by_quality(rows: Rows, settings: Settings, removed: dict[int, Removal]) -> None:
    quality = settings.quality
    readable = [row for row in range(len(rows)) if row not in removed]
    if quality.keep_top:
        order = sorted(readable, key=lambda row: (-rows.score[row], row))
        for row in order[math.ceil(quality.keep_top * len(order) - 1e-9) :]:
            taken = _taken(rows.said[row]["taken"])
            removed[row] = Removal(
                "keep_top", f"not in the best {quality.keep_top:.0%}" + (f"; {taken}" if taken else "")
            )
        return
    for row in readable:
        if rows.score[row] < quality.threshold - 1e-9:
            taken = rows.said[row]["taken"]
            removed[row] = Removal(max(taken, key=taken.__getitem__), f"{_taken(taken)}; below {quality.threshold:g}")


def _taken(taken: dict[str, float]) -> str:
    return ", ".join(f"{name} -{value:g}" for name, value in sorted(taken.items(), key=lambda one: -one[1]))


def _semantic(
    order: list[int], lessons: dedup.Lessons, settings: Settings, dialogue: Callable[[int], Dialogue]
) -> list[Duplicate]:
    """Duplicates by an encoder; vectors are made a chunk of texts at a time."""
    if len(order) < 2:
        return []
    encoder, threshold = settings.semantic.encoder, settings.semantic.threshold
    rows = sorted(order)

    def texts(numbers: Sequence[int]) -> list[str]:
        return ["\n".join(part for _, part in dialogue(number).messages) for number in numbers]

    def vectors(numbers: Sequence[int], text_of: Callable[[Sequence[int]], list[str]]) -> np.ndarray:
        starts = range(0, len(numbers), chunks.ROWS)
        blocks = [semantic.normalised(encoder.encode(text_of(numbers[at : at + chunks.ROWS]))) for at in starts]
        return np.concatenate(blocks)

    if not encoder:
        encoder = semantic.Tfidf(texts(rows[:: max(1, len(rows) // semantic.SAMPLE)]))
    whole, place = vectors(rows, texts), {row: at for at, row in enumerate(rows)}

    def alike(found: Sequence[Duplicate]) -> list[bool]:
        said = {row: dialogue(row).answers for one in found for row in (one.row, one.of)}
        mine, others = (
            vectors(numbers, lambda numbers: [said[number] for number in numbers])
            for numbers in ([one.row for one in found], [one.of for one in found])
        )
        near = (mine * others).sum(axis=1) >= _ANSWERS * threshold
        return [
            lessons.may_be_alike(one.row, one.of) and (bool(yes) or said[one.row] == said[one.of])
            for one, yes in zip(found, near, strict=True)
        ]

    accepted: list[Duplicate] = []
    looked_at = list(order)
    for _ in range(_ROUNDS):  # a row that is like another and teaches something else may still be a third one's copy
        found = semantic.similar(whole, [place[row] for row in looked_at], threshold)
        found = [Duplicate(rows[one.row], rows[one.of], one.similarity) for one in found]
        if not found:
            break
        same = alike(found)
        accepted += [one for one, yes in zip(found, same, strict=True) if yes]
        looked_at = [one.row for one, yes in zip(found, same, strict=True) if not yes]
    return accepted


def _by_caps(rows: Rows, settings: Settings, names: Sequence[str], removed: dict, best_first: Callable) -> None:
    labels = {
        "max_per_source": lambda row: names[rows.source[row]],
        "max_per_task": lambda row: rows.said[row]["task"],
        "max_per_length": lambda row: balance.length_bucket(rows.said[row]["tokens"]),
    }
    for name, label in labels.items():
        limit = getattr(settings.balance, name)
        if not limit:
            continue
        order = best_first()
        of = {row: label(row) for row in order}
        for row, kind in balance.capped(of, order, limit, name):
            removed[row] = Removal(name, f"{kind}: over the cap of {limit:g}")
