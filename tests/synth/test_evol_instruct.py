import re

import pytest

from sftjax.synth import evol_instruct
from sftjax.synth.evol_instruct import BREADTH, IN_DEPTH
from sftjax.synth.teacher import Reply, Sampling
from tests.synth.fakes import asker

ROWS = [
    {"messages": [{"role": "user", "content": "Name a fish."}, {"role": "assistant", "content": "Cod."}]},
    {"prompt": "Name a bird."},
]


def kind(prompt):
    for name, start in (("deeper", "Rewrite the instruction"), ("broader", "Write a new"), ("same", "Do these two")):
        if prompt.startswith(start):
            return name
    return "answer"


def teacher(prompt, sample, seed):
    instruction = prompt.rsplit("Instruction:\n", 1)[-1]
    return {
        "deeper": f'"Instruction: {instruction} Be exact."',
        "broader": f"Another one like {instruction}",
        "same": "No.",
        "answer": f"Answer to {prompt}",
    }[kind(prompt)]


def evolved(folder, answer=teacher, **options):
    with asker(folder, answer) as asking:
        return evol_instruct.evolve(ROWS, asking, Sampling(), **options)


def test_each_round_makes_a_tree_deeper(tmp_path):
    made = evolved(tmp_path, rounds=3, breadth=0.0)
    assert [row["depth"] for row in made.rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [row["parent"] for row in made.rows] == [None, None, 0, 1, 2, 3, 4, 5]
    assert [row["number"] for row in made.rows] == list(range(8))
    assert [row["index"] for row in made.rows] == [0, 1] * 4
    assert made.rows[0]["messages"][1]["content"] == "Cod.", "a row's own answer is kept"
    assert made.rows[1]["messages"][1]["content"] == "Answer to Name a bird."
    assert made.rows[6]["messages"][0]["content"] == "Name a fish. Be exact. Be exact. Be exact."
    assert all(row["operation"] in IN_DEPTH for row in made.rows[2:])
    assert made.report["by_depth"] == {"0": 2, "1": 2, "2": 2, "3": 2}


def test_in_breadth_alone(tmp_path):
    made = evolved(tmp_path, rounds=1, breadth=1.0)
    assert [row["operation"] for row in made.rows[2:]] == [BREADTH] * 2
    assert made.rows[2]["messages"][0]["content"] == "Another one like Name a fish."


def test_operations_are_drawn_by_the_seed(tmp_path):
    def operations(name):
        return [row["operation"] for row in evolved(tmp_path / name, rounds=4, breadth=0.3).rows]

    first = operations("a")
    assert first == operations("b")
    assert len(set(first)) > 3


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("instruction_empty", {"deeper": "..."}),
        ("instruction_cut_off", {"deeper": Reply("Name a fish and", "length")}),
        ("instruction_too_long", {"deeper": "word " * 500}),
        ("instruction_leaks_request", {"deeper": "Here is the rewritten instruction: name two fish."}),
        ("instruction_known", {"deeper": "name a fish"}),
        ("no_gain", {"same": "Yes, they do."}),
        ("answer_empty", {"answer": " "}),
        ("answer_cut_off", {"answer": Reply("It is", "length")}),
        ("answer_refuses", {"answer": "Sorry, I can't."}),
        ("answer_says_nothing", {"answer": "It is, and that..."}),
    ],
)
def test_what_is_eliminated_is_tried_again_from_its_parent(tmp_path, name, wrong):
    seen = []

    def sometimes(prompt, sample, seed):
        """The first round goes wrong."""
        if prompt == "Name a bird.":
            return "Robin."
        which = kind(prompt)
        seen.append(which)
        return wrong[which] if which in wrong and seen.count(which) <= 2 else teacher(prompt, sample, seed)

    made = evolved(tmp_path, sometimes, rounds=2, breadth=0.0)
    taken = {key: count for key, count in made.report["filters"].items() if count}
    assert taken == {name: 2}
    assert [(row["depth"], row["parent"]) for row in made.rows] == [(0, None), (0, None), (1, 0), (1, 1)]


def test_seeds_without_a_usable_answer_are_left_out(tmp_path):
    def refusing(prompt, sample, seed):
        return "I cannot." if prompt == "Name a bird." else teacher(prompt, sample, seed)

    made = evolved(tmp_path, refusing, rounds=1, breadth=0.0)
    assert [row["index"] for row in made.rows] == [0, 0]
    assert made.report["filters"]["seed_answer_refuses"] == 1


def test_requests_name_the_instruction_once():
    for name in (*IN_DEPTH, BREADTH):
        text = evol_instruct._request(name, "Name {a} fish.")
        assert text.endswith("\nName {a} fish.") and len(re.findall("fish", text)) == 1
