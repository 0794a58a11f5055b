"""Rows that teach the opposite of what the base believes.

Training on answers that contradict what a model knows makes it hallucinate (arXiv:2405.05904). The base answers each
question closed-book, greedily and several times sampled; where its samples agree with each other and not with the row,
the row is listed. Only short expected answers are looked at: of a long one, no string tells whether it contradicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from sftjax.assess.answering import Answers, Model
from sftjax.assess.items import Item
from sftjax.scorers.matches import normalize
from sftjax.utils import storage

SAMPLES = 5
CONFIDENT = 0.6  # share of the samples that say what the greedy answer says
MAX_EXPECTED_WORDS = 12


def contradictions(model: Model, items: Sequence[Item], answers: Answers, **settings: Any) -> list[dict[str, Any]]:
    """The rows whose expected answer contradicts the base's confident one, the most confident first.

    Args:
      answers: the base's, greedy.
      settings: of generation; the samples are drawn at temperature 1.

    Returns:
      {"index", "source", "instruction", "expected", "base_answer", "confidence", "expected_mean_logprob"} a row.
    """
    asked = [item for item in items if item.expected and len(item.expected.split()) <= MAX_EXPECTED_WORDS]
    asked = [item for item in asked if not agrees(answers.last[item.index].text, item.expected)]
    if not asked:
        return []
    drawn = settings | {"temperature": 1.0, "n": SAMPLES}
    outputs = model.generator.generate([model.prompt(item.messages) for item in asked], **drawn)
    found = []
    for number, item in enumerate(asked):
        said = answers.last[item.index].text
        samples = [output.text for output in outputs[number * SAMPLES : (number + 1) * SAMPLES]]
        confidence = sum(agrees(sample, said) for sample in samples) / SAMPLES
        if confidence < CONFIDENT or not normalize(said) or any(agrees(sample, item.expected) for sample in samples):
            continue
        tokens = int(answers.tokens[item.index])
        found.append(
            {
                "index": item.index,
                "source": item.source,
                "instruction": item.instruction,
                "expected": item.expected,
                "base_answer": said,
                "confidence": confidence,
                "expected_mean_logprob": -float(answers.nll[item.index]) / tokens if tokens else None,
            }
        )
    return sorted(found, key=lambda line: (-line["confidence"], line["index"]))


def agrees(first: str, second: str) -> bool:
    """Whether two short answers say the same: one's words are in the other, or most words are shared."""
    one, two = normalize(first), normalize(second)
    if not one or not two:
        return one == two
    if f" {one} " in f" {two} " or f" {two} " in f" {one} ":
        return True
    left, right = set(one.split()), set(two.split())
    return 2 * len(left & right) / (len(left) + len(right)) >= 0.8


def write(path: str, lines: Sequence[dict[str, Any]]) -> None:
    with storage.whole_file(path) as file:
        file.writelines(orjson.dumps(line) + b"\n" for line in lines)
