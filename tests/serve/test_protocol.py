"""Requests are read as the protocol says; what is wrong, or can't be had here, is named."""

import pytest

from sftjax.errors import ConfigError
from sftjax.generate.sampling import Sampling
from sftjax.serve import models, protocol

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def test_defaults_are_the_protocols():
    asked = protocol.read(HELLO, chat=True)
    assert asked.sampling == Sampling(temperature=1.0) and asked.n == 1 and asked.max_tokens is None
    assert not asked.stream and not asked.logprobs and asked.stop == ()
    assert protocol.read({"model": "m", "prompt": "hello"}, chat=False).max_tokens == 16
    assert protocol.read(HELLO, chat=True).seed != protocol.read(HELLO, chat=True).seed


def test_every_form_of_a_message_and_a_prompt():
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"},
    ]
    read = protocol.read(HELLO | {"messages": messages}, chat=True)
    assert read.prompts == ([{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}],)
    for prompt, prompts in (
        ("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ([1, 2],)), ([[1], "b"], ([1], "b")),
    ):  # fmt: skip
        assert protocol.read({"model": "m", "prompt": prompt}, chat=False).prompts == prompts


def test_what_asks_for_nothing_is_no_error():
    quiet = {"presence_penalty": 0, "logit_bias": {}, "tools": [], "response_format": {"type": "text"}, "user": "me"}
    quiet |= {"seed": None, "stop": None, "n": None, "stream_options": None, "logprobs": None}
    assert protocol.read(HELLO | quiet, chat=True).n == 1


@pytest.mark.parametrize(
    "changes, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": [str(number) for number in range(17)]}, "stop"),
        ({"seed": 0.5}, "seed"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"best_off": 2}, "best_off"),
    ],
)
def test_what_is_wrong_is_named(changes, param):
    with pytest.raises(protocol.ApiError) as caught:
        protocol.read(HELLO | changes, chat=True)
    assert caught.value.status == 400 and caught.value.body()["error"]["param"] == param
    assert caught.value.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("changes", [{"prompt": []}, {"prompt": [1, "a"]}, {"prompt": {}}, {"prompt": ["a"] * 129}])
def test_prompts_that_are_none(changes):
    with pytest.raises(protocol.ApiError, match=r"prompt|answers"):
        protocol.read({"model": "m"} | changes, chat=False)


@pytest.mark.parametrize("body", [None, [], "x", 3])
def test_a_body_that_is_no_object(body):
    with pytest.raises(protocol.ApiError, match="object"):
        protocol.read(body, chat=True)


def test_models_are_named_before_they_are_loaded():
    plan = models._plan([("model", "/x/base"), ("adapter", "tuned=/x/export"), ("model", "owner/other")])
    assert plan == [("model", "base", "/x/base"), ("adapter", "tuned", "/x/export"), ("model", "other", "owner/other")]
    for wanted, match in (
        ([("adapter", "/x/a")], "behind the --model"),
        ([("model", "/x/a"), ("model", "/y/a")], "two named 'a'"),
        ([("model", "a=")], "NAME=DIR"),
    ):
        with pytest.raises(ConfigError, match=match):
            models._plan(wanted)
