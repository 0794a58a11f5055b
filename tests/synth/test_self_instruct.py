import pytest

from sftjax.errors import DataError
from sftjax.synth import self_instruct
from sftjax.synth.self_instruct import Task
from sftjax.synth.teacher import Reply, Sampling
from tests.synth.fakes import asker

SEEDS = [
    {"instruction": "Name the capital of a country.", "instances": [{"input": "France", "output": "Paris"}]},
    {"instruction": "Is the review positive or negative?", "is_classification": True,
     "instances": [{"input": "I loved it", "output": "positive"}]},
    {"instruction": "Write a joke.", "output": "A horse walks into a bar."},
]  # fmt: skip
LIST = """Sure!
4. Translate the sentence into German.
5. Write
6. Draw a picture of a house and a tree.
7. Tell whether the animal is wild or tame.
8. Name the capital of a country, please.
9) Write a program that adds two numbers.
10. Explain why the sky is"""


def teacher(prompt, sample, seed):
    if "Write 8 further tasks" in prompt:
        return Reply(LIST, "length")
    task = prompt.rsplit("Task: ", 1)[1]
    if prompt.startswith("Is this a classification"):
        return "Yes." if "wild or tame" in task else "No"
    if "wild or tame" in task:
        return "**Label:** wild\nInput: wolf\nLabel: tame\nInput: cow\nLabel: tame\nInput: cow\nLabel: big\nInput: Wolf"
    return "Input: Good morning.\nOutput: Guten Morgen.\n\nTask: another\nInput: x\nOutput: y"


def test_from_seeds_to_rows(tmp_path):
    seeds = self_instruct.read_seeds(SEEDS)
    with asker(tmp_path, teacher) as asking:
        made = self_instruct.grow(seeds, asking, Sampling(), count=5)
    rows = [(row["instruction"], row["input"], row["output"], row["classification"]) for row in made.rows]
    assert rows == [
        ("Translate the sentence into German.", "Good morning.", "Guten Morgen.", False),
        ("Tell whether the animal is wild or tame.", "cow", "tame", True),
    ]
    question = "Translate the sentence into German.\n\nGood morning."
    assert made.rows[0]["messages"][0] == {"role": "user", "content": question}
    found = made.report["filters"]
    assert found["instance_contradicts"] == 2, "wolf is both wild and big"
    assert found["instance_known"] == 1
    # the second to fourth list give nothing new: three of them end it
    assert found["instruction_not_new"] == 1 + 3 * 3
    assert {name: found[f"instruction_{name}"] for name in ("too_short", "beyond_text", "program")} == {
        "too_short": 4, "beyond_text": 4, "program": 4,
    }  # fmt: skip
    assert made.report["instructions"] == 2 and made.report["classification"] == 1


def test_enough_is_enough(tmp_path):
    numbers = iter(range(10**6))

    def endless(prompt, sample, seed):
        if "Write 8 further tasks" not in prompt:
            return "No" if prompt.startswith("Is this") else "Output: done"
        lines = (f"{k}. Count {next(numbers)} apples and {next(numbers)} pears quickly" for k in range(9, 17))
        return "\n".join(lines)

    with asker(tmp_path, endless) as asking:
        made = self_instruct.grow(self_instruct.read_seeds(SEEDS), asking, Sampling(), count=11, novelty=0.99)
    assert made.report["instructions"] == 11 == len(made.rows)


def test_examples_are_people_s_tasks_and_the_teacher_s_own():
    seeds = [Task(f"Seed {number}.") for number in range(20)]
    fresh = [f"Own {number}." for number in range(5)]
    text = self_instruct._more(seeds, fresh, seed=1)[0]["content"]
    assert (text.count("Seed "), text.count("Own ")) == (6, 2)
    assert text == self_instruct._more(seeds, fresh, seed=1)[0]["content"]
    assert text != self_instruct._more(seeds, fresh, seed=2)[0]["content"]
    assert self_instruct._more(seeds, [], seed=1)[0]["content"].count("Seed ") == 8


@pytest.mark.parametrize(
    "reply, classification, pairs",
    [
        ("Input: a\nOutput: b\nover two lines", False, [("a", "b\nover two lines")]),
        ("**Input:** none\n**Output:** b", False, [("", "b")]),
        ("Output: b", False, [("", "b")]),
        ("Just the answer.", False, [("", "Just the answer.")]),
        (Reply("Just the ans", "length"), False, []),
        (Reply("Input: a\nOutput: b and", "length"), False, []),
        ("Label: x\nInput: a\nLabel: y\nInput: b", True, [("a", "x"), ("b", "y")]),
        (Reply("Label: x\nInput: a\nLabel: y\nInput: b", "length"), True, [("a", "x")]),
        ("Label: x\nLabel: y\nInput: b", True, [("b", "y")]),
        ("positive", True, []),
    ],
)
def test_what_the_teacher_writes_is_read(reply, classification, pairs):
    reply = reply if isinstance(reply, Reply) else Reply(reply)
    assert self_instruct._parse(reply, classification) == pairs


@pytest.mark.parametrize(
    "rows", [[], [{"instruction": "x"}], [{"output": "x"}], [{"instruction": "x", "instances": ["y"]}]]
)
def test_seeds_that_are_none(rows):
    with pytest.raises(DataError, match="seed"):
        self_instruct.read_seeds(rows)
