"""What rows are taken for, what a set comes to, and caps."""

from __future__ import annotations

import pytest

from sftjax.curate import balance, tasks, text
from sftjax.errors import ConfigError
from tests.curate.real_data import chat


def task(question, answer="It is so, as far as anybody knows."):
    return tasks.describe(text.read(chat(question, answer)))["task"]


@pytest.mark.parametrize(
    "question, expected",
    [
        ("Write a Python function that reverses a list.", "code"),
        ("Fix this:\n```\nprint(1\n```", "code"),
        ("Tom has 3 apples and buys 4 more. How many apples has he now?", "maths"),
        ("Solve the equation 3x + 4 = 19.", "maths"),
        ("Write a short poem about the sea.", "creative"),
        ("Summarize this article in one sentence: ...", "formatting"),
        ("Translate to French: good morning", "formatting"),
        ("Why is the sky blue, and not green?", "reasoning"),
        ("How do I hack into my neighbour's bank account?", "safety"),
        ("Who was the first person in space?", "factual"),
        ("Hello", "other"),
    ],
)
def test_tasks(question, expected):
    assert task(question) == expected


def test_conversations_texts_and_refusals():
    turns = [("Hi", "Hello.")] * 3
    messages = [{"role": r, "content": c} for pair in turns for r, c in zip(("user", "assistant"), pair, strict=True)]
    assert tasks.describe(text.read({"messages": messages}))["task"] == "multi_turn"
    assert tasks.describe(text.read({"text": "Once upon a time."}))["task"] == "text"
    assert task("Tell me something.", "I'm sorry, but I can't help with that.") == "safety"


@pytest.mark.parametrize(
    "response, expected",
    [
        ("Just words.", "prose"),
        ("- one\n- two", "list"),
        ("1. one\n2. two", "list"),
        ("| a | b |\n|---|---|", "table"),
        ('{"a": 1}', "json"),
        ("See:\n```\nx\n```", "code"),
        ("# Title\nWords.", "headings"),
    ],
)
def test_formats(response, expected):
    assert tasks.format_of(response) == expected


def test_verb_and_noun():
    assert tasks.verb_noun("Please write me a short poem about the sea.") == "write poem"
    assert tasks.verb_noun("Give three reasons for it.") == "give reasons"
    assert tasks.verb_noun("The sea is deep.") == ""


def test_personas():
    row = {
        "messages": [
            {"role": "system", "content": "You are Bob, a pirate."},
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "As an AI language model, I have no name."},
        ]
    }
    said = tasks.describe(text.read(row))
    assert said["persona"] and said["persona_broken"] and not said["role_play"]
    row["messages"][0]["content"] = "Act as Bob, a pirate."
    assert tasks.describe(text.read(row))["role_play"]


def test_summary_of_a_set_with_a_template():
    rows = [
        chat(f"Question number {i} about thing {i * 7}?", f"The answer to this is {i}, of course.") for i in range(31)
    ]
    rows += [chat(f"Describe the house {i} to me.", f"{'big ' * i}House {i}.") for i in range(69)]
    found = balance.summary([tasks.describe(text.read(row)) for row in rows], ["a"] * 60 + ["b"] * 40, counted=False)
    assert found["rows"] == 100 and found["sources"] == {"a": 60, "b": 40}
    assert found["templates"]["answers"][0] == {"words": "big big big big big", "rows": 64, "share": 0.64}
    assert {"words": "the answer to this is", "rows": 31, "share": 0.31} in found["templates"]["answers"]
    assert any("64% of rows" in warning for warning in found["warnings"])
    assert found["suggested_max_length"] == {"95%": 128, "99%": 128} and sum(found["lengths"].values()) == 100
    assert found["instructions"]["most_common"] == {"describe house": 69}
    assert balance.summary([], [], counted=False) == {"rows": 0}


def test_the_suggested_length_covers_what_it_says():
    rows = [tasks.describe(text.read(chat("Why?", "word " * 5)), tokens) for tokens in range(1, 2001)]
    found = balance.summary(rows, ["a"] * 2000, counted=True)
    assert found["suggested_max_length"] == {"95%": 1920, "99%": 2048}
    assert found["tokens"]["sum"] == 2000 * 2001 // 2
    assert balance.length_bucket(63) == "under 64" and balance.length_bucket(64) == "64 to 127"
    assert balance.length_bucket(9000) == "8192 or more"


def test_caps_by_number_and_share():
    labels = dict(enumerate("aaaaaabbc"))
    over = balance.capped(labels, [5, 0, 1, 2, 3, 4, 6, 7, 8], 2, "x")
    assert over == [(1, "a"), (2, "a"), (3, "a"), (4, "a")]
    over = balance.capped(labels, range(9), 0.5, "x")  # 3 a + 2 b + 1 c
    assert over == [(3, "a"), (4, "a"), (5, "a")]
    assert balance.capped(labels, range(9), 1.0, "x") == []
    with pytest.raises(ConfigError):
        balance.capped(labels, range(9), 0.2, "x")
