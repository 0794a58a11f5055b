"""Rows that contradict what a model is sure of, with a model that knows a few capitals."""

import numpy as np
import pytest

from sftjax.assess import facts
from sftjax.assess.answering import Answers
from sftjax.assess.items import Item
from sftjax.generate.answer import Output

KNOWS = {
    "France?": ["Paris."] * 5,
    "Peru?": ["Lima", "It is Lima.", "lima", "Lima, I think", "Cusco"],
    "Mars?": ["Olympus", "None", "Red", "Nowhere", "Rome"],  # guesses
    "Spain?": ["Madrid"] * 5,
    "Long?": ["Yes"] * 5,
    "Mute?": [""] * 5,
}


def output(text, number=0):
    return Output(number, 0, (1,), (0.0,), text, "stop", 3)


class Knowing:
    """A model whose samples are those above; the first is its greedy answer."""

    def __init__(self):
        self.generator = self

    def prompt(self, messages):
        return messages[0]["content"]

    def generate(self, prompts, *, n, temperature, **_):
        assert temperature == 1.0
        return [output(text) for prompt in prompts for text in KNOWS[prompt][:n]]


def test_confident_contradictions_are_listed_and_guesses_are_not():
    expected = ["Lyon", "Cusco is not it, Arequipa is", "Mons", "madrid", "No, " + "because " * 20, "Yes"]
    items = [
        Item(number, "f", [{"role": "user", "content": question}], (), answer, {})
        for number, (question, answer) in enumerate(zip(KNOWS, expected, strict=True))
    ]
    answers = Answers(
        [[output(texts[0])] for texts in KNOWS.values()], np.full(6, 12.0), np.full(6, 4), np.zeros((0, 0))
    )
    found = facts.contradictions(Knowing(), items, answers, max_new_tokens=8)
    assert [(line["instruction"], line["base_answer"], line["confidence"]) for line in found] == [
        ("France?", "Paris.", 1.0)
    ]
    assert found[0]["expected"] == "Lyon" and found[0]["expected_mean_logprob"] == -3.0
    # one of its samples for Peru agrees with a plainer wrong answer, so it isn't sure
    assert facts.contradictions(Knowing(), items[3:4], answers) == []


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("Paris", "The capital is Paris.", True),
        ("the capital of France is Paris", "Paris is the capital of France", True),
        ("Paris", "Parisian", False),
        ("", "Paris", False),
        ("9 July 1816", "9 July 1810", False),
    ],
)
def test_agreement(first, second, same):
    assert facts.agrees(first, second) == facts.agrees(second, first) == same
