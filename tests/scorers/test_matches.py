"""Answers compared with what was expected, and scorers by name."""

import sys
from decimal import Decimal

import pytest

from sftjax.errors import ConfigError, DataError
from sftjax.scorers import expected_of, make_scorer, make_scorers, messages_of, scorer_name
from sftjax.scorers.matches import number_in


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 48/2 = 24 left.\n#### 72", "72"),
        ("#### 1,234.50 dollars, not 9", "1234.50"),
        ("so 3 + 4 = 7", "7"),
        ("it costs $1,299.", "1299"),
        ("-5 degrees", "-5"),
        ("12-5", "5"),  # a difference, not a negative number
        ("from 3 to \\boxed{42} in 7 steps", "42"),
        ("1.5e3", "1500"),
        ("no number", None),
        ("####", None),
        ("", None),
    ],
)
def test_the_number_that_an_answer_settles_on(text, number):
    assert number_in(text) == (None if number is None else Decimal(number))


def test_numbers_are_equal_however_they_are_written():
    row = {"question": "?", "answer": "48 / 2 = <<48/2=24>>24\n#### 1,072"}
    score = make_scorer("numeric")
    assert [score(row, answer) for answer in ("It is 1072.00.", "1071", "none", "1072 or 1073")] == [1, 0, 0, 0]
    assert make_scorer("gsm8k")(row, "1072") == 0 and make_scorer("gsm8k")(row, "1\n#### 1072") == 1
    assert make_scorer("numeric:0.01")(row, "1075") == 1
    assert make_scorer("numeric")({"answer": ["3", 4]}, "4.0") == 1


@pytest.mark.parametrize(
    ("spec", "expected", "right", "wrong"),
    [
        ("exact", "Paris", " Paris\n", "paris"),
        ("normalized", "The Paris!", "paris", "in Paris"),
        ("contains", "New York", "It is in new york, I think.", "It is in newyork"),
        ("contains", "10", "It took 10 years", "It took 100 years"),
        ("choice", "B", "Not A: the answer is (B).", "The answer is C, not B"),
        ("choice", "(b)", "B) because a cat can", "I don't know"),
        (r"regex:^\d+ apples$", "", "12 apples", "12 apples!"),
    ],
)
def test_matches(spec, expected, right, wrong):
    score = make_scorer(spec)
    assert (score({"expected": expected}, right), score({"expected": expected}, wrong)) == (1.0, 0.0)


def test_nothing_expected_matches_nothing():
    assert make_scorer("contains")({"expected": "..."}, "whatever ...") == 0.0
    assert make_scorer("regex")({"pattern": "a+b"}, "caab") == 1.0


def test_what_rows_ask_and_expect():
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert messages_of({"messages": chat}) == chat[:1] and expected_of({"messages": chat}) == ["A"]
    assert messages_of({"instruction": "Add", "input": "1 2", "output": "3"})[0]["content"] == "Add\n\n1 2"
    assert messages_of({"prompt": chat[:1]}) == chat[:1]
    assert expected_of({"instruction": "Add", "output": "3"}) == ["3"]
    assert expected_of({"question": "?", "answer": 72}) == ["72"]
    with pytest.raises(DataError, match=r"nothing to answer.*it has text"):
        messages_of({"text": "plain"})
    with pytest.raises(DataError, match=r"no right answer.*it has question"):
        make_scorer("exact")({"question": "?"}, "x")


def test_functions_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def shout(row, answer):\n    return answer.isupper()\n\ndef broken(row, answer):\n    return row['x']\n"
    )
    score = make_scorer(f"{file}:shout")
    assert (score({}, "HEY"), score({}, "hey")) == (1.0, 0.0)
    assert scorer_name(f"{file}:shout") == "mine.py:shout"
    with pytest.raises(DataError, match="broken: KeyError: 'x'"):
        make_scorer(f"{file}:broken")({}, "")
    with pytest.raises(ConfigError, match="AttributeError"):
        make_scorer(f"{file}:nothing")
    with pytest.raises(ConfigError, match="no such file"):
        make_scorer(f"{tmp_path}/other.py:f")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exakt", "'exakt' is unknown: choose one of exact, "),
        ("tests", "add --allow_code"),
        ("length", "needs an argument"),
        ("length:long", "LOW-HIGH"),
        ("length:-", "LOW-HIGH"),
        ("exact:Paris", "takes no argument"),
        ("regex:(", "no regular expression"),
        ("numeric:much", "relative, between 0 and 1"),
        ({"name": "x"}, "give scorer"),
        ("json_schema:missing.json", "not a JSON file"),
    ],
)
def test_bad_specs_are_said_at_once(spec, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        make_scorer(spec)


def test_several_by_name():
    scorers = make_scorers(
        ["exact", {"scorer": "length:1-2words", "name": "short"}, {"scorer": "regex", "argument": "x:y"}]
    )
    assert list(scorers) == ["exact", "short", "regex:x:y"]
    assert scorers["short"]({}, "two words") == 1 and scorers["regex:x:y"]({}, "x:y") == 1


def test_reasoning_gyms_verifiers(tmp_path):
    pytest.importorskip("reasoning_gym", reason="the extra `eval` is not installed")
    import reasoning_gym

    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=7)[0]
    for spec in ("reasoning_gym", "reasoning_gym:chain_sum"):
        score = make_scorer(spec)
        assert score(entry, entry["answer"]) == 1.0
        assert score(entry, f"I add. <answer> {entry['answer']} </answer>") == 1.0
        assert score(entry, "nonsense") < 0.1
    with pytest.raises(DataError, match="no metadata"):
        make_scorer("reasoning_gym")({"question": "?"}, "1")
    with pytest.raises(ConfigError, match="reasoning_gym:no_such_task"):
        make_scorer("reasoning_gym:no_such_task")


def test_without_the_package_reasoning_gym_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match="pip install reasoning-gym"):
        make_scorer("reasoning_gym:any_task_at_all")
