"""Each format as people write it, and what rows that can't be used say."""

import json

import numpy as np
import pytest

from sftjax.data import formats
from sftjax.data.conversations import Conversation
from sftjax.data.formats import Text, Tokens
from sftjax.data.types import RowError
from sftjax.errors import ConfigError

Q, A, S = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("system", "s")))


def parse(row, format="auto", fields=None):
    return list(formats.parse(row, format, fields))


SAME = {
    "messages": {"messages": [S, Q, A]},
    "messages as JSON text": {"messages": json.dumps([S, Q, A])},
    "messages as columns": {"messages": {"role": ["system", "user", "assistant"], "content": ["s", "q", "a"]}},
    "messages with nulls": {"messages": [{**m, "name": None, "tool_calls": None} for m in (S, Q, A)], "tools": None},
    "content in parts": {"messages": [S, {**Q, "content": [{"type": "text", "text": "q"}]}, A]},
    "sharegpt": {
        "conversations": [{"from": f, "value": v} for f, v in (("system", "s"), ("human", "q"), ("gpt", "a"))]
    },
    "sharegpt, system apart": {
        "conversations": [{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"}],
        "system": "s",
    },
    "sharegpt with roles": {"conversations": [S, Q, A]},
    "alpaca": {"instruction": "q", "input": "", "output": "a", "system": "s"},
    "dolly": {"instruction": "q", "context": "", "response": "a", "category": "x", "system": "s"},
    "user_assistant": {"User": "q", "Assistant": "a", "Template": "s"},
    "user_assistant, lists": {"User": ["q"], "Assistant": ["a"], "Template": "s"},
    "prompt_completion, messages": {"prompt": [S, Q], "completion": [A]},
    "oasst": {"prompt": {"role": "system", "text": "s", "replies": [
        {"role": "prompter", "text": "q", "replies": [{"role": "assistant", "text": "a", "replies": []}]}]}},
}  # fmt: skip


@pytest.mark.parametrize("row", SAME.values(), ids=SAME.keys())
def test_one_conversation_in_every_format(row):
    (example,) = parse(row)
    assert isinstance(example, Conversation)
    assert example.messages == [S, Q, A] and example.weights == [0, 0, 1] and example.tools is None


def test_input_and_context_stand_behind_the_instruction():
    for row in (
        {"instruction": "q", "input": "x", "output": "a"},
        {"instruction": "q", "context": "x", "response": "a"},
    ):
        assert parse(row)[0].messages == [{"role": "user", "content": "q\n\nx"}, A]
    row = {"instruction": "q", "output": "a", "history": [["q", "a"]]}
    assert parse(row)[0].messages == [Q, A, Q, A]


def test_several_turns_as_lists_of_equal_length():
    (example,) = parse({"User": ["q", "q"], "Assistant": ["a", "a"], "Template": "s"})
    assert example.messages == [S, Q, A, Q, A]
    assert parse({"User": '["q", "q"]', "Assistant": '["a", "a"]', "Template": ""})[0].messages == [Q, A, Q, A]
    assert parse({"User": "[q", "Assistant": "[1] is a list"})[0].messages[1]["content"] == "[1] is a list"


def test_every_path_of_a_tree_once():
    def node(text, *replies, role="assistant", **more):
        return {"role": role, "text": text, "replies": list(replies), **more}

    tree = node("q", node("a", node("q2", node("a2"), role="prompter"), node("q3", role="prompter")), node("b"),
                node("c", deleted=True), role="prompter")  # fmt: skip
    paths = [[m["content"] for m in example.messages] for example in parse({"message_tree_id": 1, "prompt": tree})]
    assert paths == [["q", "a", "q2", "a2"], ["q", "b"]]  # "q3" has no answer, and its path is in the first


def test_texts():
    assert parse({"text": "x"}) == [Text("", "x")]
    assert parse({"prompt": "p", "completion": "c"}) == [Text("p", "c")]
    fields = {"prompt": "question", "completion": "answer"}
    assert parse({"question": "p", "answer": "c"}, fields=fields) == [Text("p", "c")]
    (example,) = parse({"question": "q", "answer": "a"}, "alpaca", {"instruction": "question", "output": "answer"})
    assert example.messages == [Q, A]


def test_only_the_completions_messages_are_trained():
    (example,) = parse({"prompt": [Q, A, Q], "completion": [A, Q, A]})
    assert example.weights == [0, 0, 0, 1, 0, 1]


def test_tokens():
    def tokens(**row):
        (example,) = parse({"input_ids": [5, 6, 7, 8], **row})
        assert isinstance(example, Tokens) and example.ids.dtype == np.int32 and example.weights.dtype == np.float32
        return example.ids.tolist(), example.weights.tolist()

    assert tokens() == ([5, 6, 7, 8], [1, 1, 1, 1])
    assert tokens(labels=[-100, -100, 7, 8]) == ([5, 6, 7, 8], [0, 0, 1, 1])
    assert tokens(weights=[0, 0.5, 0, 2]) == ([5, 6, 7, 8], [0, 0.5, 0, 2])
    assert tokens(loss_mask=[False, True, True, False]) == ([5, 6, 7, 8], [0, 1, 1, 0])
    assert tokens(labels=[-100, 6, 7, -100], attention_mask=[1, 1, 1, 0]) == ([5, 6, 7], [0, 1, 1])


def test_tools_and_calls():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": {"default": None}}}}
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": null}'}}
    row = {
        "messages": [
            Q,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "r"},
            A,
        ]
    }
    for tools in ([tool], json.dumps([tool]), [json.dumps(tool)]):
        (example,) = parse({**row, "tools": tools})
        assert example.tools == [tool]  # nothing added, and nulls that are there stay
        assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": None}
        assert "content" not in example.messages[1]
    assert example.weights == [0, 1, 0, 1]
    turns = (
        ("human", "q"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "r"),
        ("gpt", "a"),
    )
    (example,) = parse({"conversations": [{"from": who, "value": value} for who, value in turns]})
    assert example.messages[1] == {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}


def test_thoughts_under_any_of_their_names():
    for name in ("reasoning_content", "thinking", "reasoning"):
        (example,) = parse({"messages": [Q, {**A, name: "t"}]})
        assert example.messages[1]["reasoning_content"] == example.messages[1]["thinking"] == "t"


REFUSED = [
    ("not_an_object", [1]),
    ("unknown_format", {"x": 1}),
    ("unknown_format", {"message_id": 1, "parent_id": 2, "role": "prompter", "text": "x"}),
    ("empty_conversation", {"messages": []}),
    ("wrong_type", {"messages": "hello"}),
    ("wrong_type", {"messages": 3}),
    ("wrong_type", {"messages": [3]}),
    ("wrong_type", {"messages": {"role": ["user"], "content": ["a", "b"]}}),
    ("wrong_type", {"messages": [{"role": "user", "content": 3}]}),
    ("wrong_type", {"messages": [Q, {"role": "assistant", "tool_calls": 3}]}),
    ("wrong_type", {"messages": [Q, A], "tools": 3}),
    ("bad_arguments", {"messages": [Q, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]}),
    ("unknown_role", {"messages": [{"role": "usr", "content": "x"}]}),
    ("unknown_role", {"messages": [{"content": "x"}]}),
    ("unknown_role", {"conversations": [{"from": "x", "value": "y"}]}),
    ("empty_message", {"messages": [Q, {"role": "assistant", "content": None}]}),
    ("unsupported_content", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("nul_character", {"messages": [Q, {"role": "assistant", "content": "a\0b"}]}),
    ("not_unicode", {"messages": [Q, {"role": "assistant", "content": "\ud800"}]}),
    ("bad_weight", {"messages": [Q, {**A, "weight": "1"}]}),
    ("bad_weight", {"messages": [Q, {**A, "weight": -1}]}),
    ("bad_weight", {"messages": [Q, {**A, "weight": float("nan")}]}),
    ("bad_weight", {"messages": [Q, {**A, "train": "no"}]}),
    ("weight_on_prompt", {"messages": [{**Q, "train": True}, A]}),
    ("unequal_turns", {"User": ["q", "q"], "Assistant": ["a"]}),
    ("wrong_type", {"User": 1, "Assistant": "a"}),
    ("wrong_type", {"instruction": None, "output": "a"}),
    ("wrong_type", {"text": None}),
    ("empty_text", {"text": " "}),
    ("empty_answer", {"prompt": "p", "completion": ""}),
    ("wrong_type", {"prompt": "p", "completion": [A]}),
    ("wrong_type", {"input_ids": ["a"]}),
    ("wrong_type", {"input_ids": []}),
    ("bad_ids", {"input_ids": [-1]}),
    ("bad_labels", {"input_ids": [1, 2], "labels": [2, -100]}),
    ("unequal_lengths", {"input_ids": [1, 2], "weights": [1]}),
    ("bad_weight", {"input_ids": [1, 2], "weights": [1, float("inf")]}),
    ("no_assistant_turn", {"prompt": {"role": "prompter", "text": "q", "replies": []}}),
]


@pytest.mark.parametrize(("reason", "row"), REFUSED, ids=[f"{i}-{r[0]}" for i, r in enumerate(REFUSED)])
def test_rows_that_can_not_be_used_say_why_in_one_line(reason, row):
    with pytest.raises(RowError) as caught:
        parse(row)
    assert caught.value.reason == reason
    assert caught.value.detail and "\n" not in caught.value.detail and len(caught.value.detail) < 300


def test_unknown_format_name_lists_the_choices():
    with pytest.raises(ConfigError, match="messages, sharegpt"):
        parse({"messages": [Q, A]}, "openai")
