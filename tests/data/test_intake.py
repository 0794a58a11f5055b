"""Rows as people have them: what each is read as, what it says of its weight, what is refused, and what is noted."""

import json
import random

import pytest

from sftjax.curate import text
from sftjax.data import formats
from sftjax.data.conversations import Conversation
from sftjax.data.encode import RowEncoder
from sftjax.data.types import RowError
from sftjax.errors import ConfigError

Q, A, S = ({"role": r, "content": c} for r, c in (("user", "2 + 2?"), ("assistant", "It is 4"), ("system", "Be kind")))
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def parse(row, format="auto", fields=None):
    return list(formats.parse(row, format, fields))


q, a, s = Q["content"], A["content"], S["content"]
READ = {
    "question, answer": {"question": q, "answer": a},
    "Question, Answer": {"Question": q, "Answer": a},
    "query, response": {"query": q, "response": a},
    "instruction, response": {"instruction": q, "response": a, "context": ""},
    "instruction, answer": {"instruction": q, "answer": a},
    "inputs, targets": {"inputs": q, "targets": a},
    "input, output": {"input": q, "output": a},
    "input, target": {"input": q, "target": a},
    "prompt, response": {"prompt": q, "response": a},
    "problem, solution": {"problem": q, "solution": a, "level": "Level 5"},
    "user, assistant": {"user": q, "assistant": a},
    "prompt as messages, text answer": {"input": [Q], "output": a},
    "conversation": {"conversation": [Q, A]},
    "conversation of pairs": {"conversation": [{"human": q, "assistant": a}]},
    "conversation of inputs and outputs": {"conversation": [{"system": "", "input": q, "output": a}]},
    "conversations of texts": {"conversations": [q, a]},
    "data of texts": {"id": "7", "data": [q, a]},
    "messages as JSON text": {"messages": json.dumps([q, a])},
    "speaker, text": {"dialogue": [{"speaker": "Human", "text": q}, {"speaker": "AI", "text": a}]},
    "from and content": {"conversations": [{"from": "Human", "content": q}, {"from": "GPT", "content": a}]},
    "from and value in messages": {"messages": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "chosen behind a prompt": {"prompt": q, "chosen": a, "rejected": "5"},
    "chosen with its prompt": {"prompt": q, "chosen": [Q, A], "rejected": [Q, {**A, "content": "5"}], "score": 3.0},
    "chosen messages behind messages": {"prompt": [Q], "chosen": [A], "rejected": [{**A, "content": "5"}]},
    "chosen alone": {"chosen": [Q, A], "rejected": [Q]},
    "chosen as a transcript": {"chosen": f"\n\nHuman: {q}\n\nAssistant: {a}", "rejected": f"\n\nHuman: {q}"},
    "chosen as JSON objects": {"question": q, "chosen": A, "rejected": {**A, "content": "5"}},
}


@pytest.mark.parametrize("row", READ.values(), ids=READ.keys())
def test_rows_that_are_a_question_and_its_answer(row):
    (example,) = parse(row)
    assert isinstance(example, Conversation)
    assert example.messages == [Q, A] and example.weights == [0, 1]


def test_the_system_text_of_a_row_stands_in_front_of_any_format():
    for row in (
        {"system_prompt": s, "question": q, "response": a},
        {"system": s, "messages": [Q, A]},
        {"system_message": s, "prompt": [Q], "completion": [A]},
        {"system": s, "prompt": q, "chosen": a},
        {"conversation": [{"system": s, "input": q, "output": a}, {"input": q, "output": a}]},
    ):
        (example,) = parse(row)
        assert example.messages[:3] == [S, Q, A] and example.weights[:3] == [0, 0, 1]
    (example,) = parse({"system": "another text", "messages": [S, Q, A]})
    assert example.messages == [S, Q, A] and example.notes == ("unread_column:system",)


def test_what_a_question_is_about_stands_behind_it_and_thoughts_before_the_answer():
    (example,) = parse({"question": q, "context": "of numbers", "answer": a, "reasoning": "two twos"})
    assert example.messages[0]["content"] == f"{q}\n\nof numbers"
    assert example.messages[1]["reasoning_content"] == "two twos" and example.notes == ()
    with pytest.raises(RowError, match="context is a list"):
        parse({"question": q, "context": ["a b"], "answer": a})


def test_answers_in_a_prompt_are_not_trained():
    for row in ({"prompt": [Q, A, Q], "chosen": [A]}, {"prompt": [Q, A, Q], "chosen": [Q, A, Q, A]}):
        assert parse(row)[0].weights == [0, 0, 0, 1]
    assert parse({"chosen": [Q, A, Q, A]})[0].weights == [0, 1, 0, 1]


def test_the_calls_of_xlam_rows():
    tool = {"name": "add", "description": "adds", "parameters": {"a": {"type": "int"}, "b": {"type": "str, optional"}}}
    answers = [{"name": "add", "arguments": {"a": 2}}]
    (example,) = parse({"id": 1, "query": q, "tools": json.dumps([tool]), "answers": json.dumps(answers)})
    assert example.messages == [Q, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    (schema,) = example.tools
    assert schema["function"]["name"] == "add" and schema["function"]["parameters"] == {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
        "required": ["a"],
    }
    with pytest.raises(RowError, match="empty_answer"):
        parse({"query": q, "tools": json.dumps([tool]), "answers": "[]"})


def test_the_older_way_of_calling_functions():
    called = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 2}'}}
    row = {
        "messages": [Q, called, {"role": "function", "name": "add", "content": "4"}, A],
        "functions": [{"name": "add"}],
    }
    (example,) = parse(row)
    assert example.messages[1]["tool_calls"] == [CALL] and example.messages[2]["role"] == "tool"
    assert example.tools == [{"type": "function", "function": {"name": "add"}}] and example.notes == ()


WEIGHTS = [
    *(({key: value}, float(value)) for key in ("train", "training", "trainable", "loss") for value in (True, False)),
    *(({key: value}, value) for key in ("weight", "loss_weight", "loss_scale") for value in (0, 0.5, 2)),
    ({"train": 1}, 1.0),
    ({"loss": 0.0}, 0.0),
    ({"loss": None, "weight": None}, None),
    ({"train": True, "weight": 0.5}, 0.5),
    ({"train": False, "loss": False, "weight": 0}, 0.0),
    ({"train_detail": []}, None),
]


@pytest.mark.parametrize(("keys", "weight"), WEIGHTS, ids=[str(keys) for keys, _ in WEIGHTS])
def test_spellings_of_a_weight(keys, weight):
    for row in (
        {"messages": [Q, {**A, **keys}]},
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a, **keys}]},
        {"conversation": [{"input": q, "output": a, **keys}]},
    ):
        (example,) = parse(row)
        assert example.weights[1] == (1.0 if weight is None else weight) and example.weighted is (weight is not None)
        assert example.messages[1] == A and example.notes == ()


@pytest.mark.parametrize(
    ("reason", "keys"),
    [
        ("bad_weight", {"loss": "yes"}),
        ("bad_weight", {"loss": 0.5}),
        ("bad_weight", {"trainable": 2}),
        ("bad_weight", {"loss_scale": "2"}),
        ("bad_weight", {"loss_weight": -1}),
        ("bad_weight", {"weight": True}),
        ("bad_weight", {"weight": float("inf")}),
        ("bad_weight", {"weight": 1e39}),
        ("bad_weight", {"weight": 10**400}),
        ("bad_weight", {"weight": 1e-50}),
        ("bad_weight", {"train": True, "loss": False}),
        ("bad_weight", {"train": False, "weight": 1.0}),
        ("bad_weight", {"weight": 1.0, "loss_scale": 2.0}),
        ("unread_mask", {"mask": True}),
        ("unread_train_detail", {"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": True}]}),
    ],
)
def test_weights_that_can_not_be_are_refused_by_name(reason, keys):
    with pytest.raises(RowError) as caught:
        parse({"messages": [Q, {**A, **keys}]})
    assert caught.value.reason == reason and all(key in caught.value.detail for key in keys)


PICTURE = {"bytes": b"\x89PNG", "path": None}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}, "image"),
        ({"images": ["a.png"], "messages": [Q, A]}, "images"),
        ({"Image": PICTURE, "question": q, "answer": a}, "Image"),
        ({"picture": PICTURE, "question": q, "answer": a}, "picture"),
        ({"video": "a.mp4", "prompt": q, "completion": a}, "video"),
        ({"audio": {"array": [0.0], "sampling_rate": 16000}, "text": a}, "audio"),
        ({"messages": [{**Q, "images": ["a.png"]}, A]}, "images"),
        ({"messages": [{**Q, "content": [{"type": "image"}, {"type": "text", "text": q}]}, A]}, "image"),
    ],
)
def test_rows_with_pictures_sound_or_video_are_refused_by_name(row, named):
    with pytest.raises(RowError) as caught:
        parse(row)
    assert caught.value.reason == "unsupported_content" and repr(named) in caught.value.detail
    assert parse({"image": None, "images": [], "audio": "", "messages": [Q, A]})[0].messages == [Q, A]


def test_what_is_not_read_is_noted():
    noted = {
        "unread_key:citations": {"messages": [Q, {**A, "citations": ["a book"]}]},
        "unread_column:explanation": {"question": q, "answer": a, "explanation": "because of two"},
        "unread_column:rejected": {"prompt": q, "chosen": a, "rejected": "no idea at all"},
        "unread_column:loss_weight": {"question": q, "answer": a, "loss_weight": 0.5},
        "unread_column:label": {"text": "good food", "label": "positive"},
        "unread_column:___31m" + "x" * 34: {"text": "good food", "\x1b\x1b[31m" + "x" * 100: "more to read"},
    }
    for note, row in noted.items():
        (example,) = parse(row)
        assert example.notes == (note,)
    for row in (
        {"id": 7, "category": "qa", "score": 0.5, "messages": [Q, A], "prompt": q},  # the prompt is in the messages
        {"question": q, "answer": a, "lang": "en", "_source": "a b c"},
        {"instruction": q, "output": a, "history": [["and 1 + 1?", "that is 2"]], "input": ""},
        {"data": [q, a]},
    ):
        assert parse(row)[0].notes == ()


def test_answers_that_are_not_wanted_are_refused():
    with pytest.raises(RowError, match="rejected_answer"):
        parse({"prompt": q, "completion": "5", "label": False})


ADVICE = [
    ({"q": q, "a": a}, "{'question': 'q', 'answer': 'a'}"),
    ({"id": "77", "ask": q, "lang": "en", "reply": a}, "{'question': 'ask', 'answer': 'reply'}"),
    ({"talk": [Q, A]}, "{'messages': 'talk'}"),
]


@pytest.mark.parametrize(("row", "advice"), ADVICE, ids=["two texts", "among others", "a list"])
def test_the_advice_for_unknown_keys_leads_to_a_conversation(row, advice):
    with pytest.raises(RowError, match="unknown_format") as caught:
        parse(row)
    assert advice in caught.value.detail
    (example,) = parse(row, fields=json.loads(advice.replace("'", '"')))
    assert isinstance(example, Conversation) and example.messages == [Q, A]


def test_fields_that_no_format_has_are_refused():
    with pytest.raises(ConfigError, match="'questoin'"):
        RowEncoder(None, fields={"questoin": "q"})


def test_a_picture_that_is_missing_from_its_column_is_missed():
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog"}]
    for row in ({"image": None}, {"images": []}, {"image": ""}):
        with pytest.raises(RowError, match=r"unsupported_content.*<image>"):
            parse({**row, "conversations": turns})
    assert parse({"conversations": turns})[0].messages[0]["content"].startswith("<image>")  # no column: text


def odd_rows(count):
    """Rows of keys that mean something with values that may not."""
    draw = random.Random(0)
    names = sorted({*formats.FIELDS, "prompt", "label", "image", "rejected", "role", "Question", "Answer"})
    inner = ["role", "content", "from", "value", "text", "tool_calls", "function_call", "weight", "loss", "mask"]
    plain = [
        None,
        "",
        "a b",
        "[1]",
        '{"a": 1}',
        0,
        -1,
        2.5,
        float("nan"),
        True,
        b"\xff",
        [],
        {},
        ["a", 1],
        [["a", "b"]],
    ]
    plain += [{"bytes": b"x", "path": None}, "user", "assistant", "gpt", "\ud800", "\0", 10**400, (1, 2), [[1]]]

    def message():
        said = {key: draw.choice(plain) for key in draw.sample(inner, draw.randint(1, 4))}
        return (
            {**said, "role": draw.choice(["user", "assistant", "tool", None, ["x"]])} if draw.random() < 0.7 else said
        )

    def value():
        choice = draw.random()
        return draw.choice(plain) if choice < 0.5 else message() if choice < 0.6 else [message() for _ in range(3)]

    for _ in range(count):
        yield {draw.choice(names): value() for _ in range(draw.randint(1, 5))}


def test_whatever_a_row_holds_it_is_read_or_refused_in_one_line():
    read = refused = 0
    for row in odd_rows(6000):
        try:
            parse(row)
            text.read(row)
            read += 1
        except RowError as error:
            assert error.detail and "\n" not in error.detail
            refused += 1
    assert read > 20 and refused > 2000
