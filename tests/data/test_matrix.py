"""Every kind of conversation through every shape of template: trained exactly, or refused or counted with the right
reason; and the fast way to the spans gives what the slow one does.

What is right is told by transformers' own rendering of the same messages and by the marker words in each part.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise

import numpy as np
import pytest
from transformers.utils import chat_template_utils

from sftjax.data import masks
from sftjax.data.encode import RowEncoder
from sftjax.data.types import RowError
from tests.data import shapes
from tests.data.talks import TALKS

MARKER = re.compile(r"(?:USER|ANSWER|SYSTEM|RESULT|THOUGHT|VALUE)(?:ONE|TWO|THREE)B?|(?:name|key)(?:one|two)|4711|815")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    return {
        name: RowEncoder(shapes.load(shape, folder / str(i)), **shape.options)
        for i, (name, shape) in enumerate(shapes.SHAPES.items())
    }


def outcome(encoder, row):
    try:
        return encoder(row)
    except RowError as error:
        return error


@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_the_fast_way_gives_what_the_slow_one_does(encoders, monkeypatch, name):
    encoder = encoders[name]
    by_pieces, taken = masks._Conversation._by_pieces, []

    def watched(self, turns):
        parts = by_pieces(self, turns)
        taken.append(parts is not None)
        return parts

    for talk, row in TALKS.items():
        with monkeypatch.context() as patch:
            patch.setattr(masks._Conversation, "_by_pieces", watched)
            fast = outcome(encoder, row)
            patch.setattr(masks._Conversation, "_by_pieces", lambda self, turns: None)
            slow = outcome(encoder, row)
        if isinstance(slow, RowError) or isinstance(fast, RowError):
            assert str(fast) == str(slow), talk
            continue
        assert len(fast) == len(slow), talk
        for one, other in zip(fast, slow, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist(), talk
            assert one.weights.tolist() == other.weights.tolist(), talk
            assert (one.flags, one.lost) == (other.flags, other.lost), talk
    if name in FAST:
        assert sum(taken) > len(TALKS) / 2


# Shapes that are known to be proved, so that the comparison is one.
FAST = ("chatml", "header of control tokens only", "eos behind the last turn, unless a prompt is asked for")


class Judge:
    """What transformers renders for a row, whatever shape its messages have to take for that."""

    def __init__(self, encoder, shape, row):
        hf = encoder.tokenizer.hf
        self.shape, self.tokenizer = shape, encoder.tokenizer
        self.template = chat_template_utils._compile_jinja_template(hf.chat_template)
        self.special = hf.special_tokens_map
        self.messages = [self.plain(message) for message in row["messages"]]
        self.tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
        self.kwargs = row.get("chat_template_kwargs", {})

    @staticmethod
    def plain(message):
        message = {k: v for k, v in message.items() if k not in ("weight", "train") and v is not None}
        if isinstance(message.get("content"), list):
            message["content"] = "".join(part["text"] for part in message["content"])
        thought = next((message[key] for key in ("reasoning_content", "thinking") if key in message), None)
        if thought is not None:
            message |= {"reasoning_content": thought, "thinking": thought}
        for call in message.get("tool_calls", ()):
            function = call.get("function", call)
            if isinstance(function["arguments"], str):
                function["arguments"] = json.loads(function["arguments"])
        return message

    def forms(self):
        """The messages as they are, and as a template may need them."""
        yield self.messages
        written = [{**m, "content": m.get("content") or ""} for m in self.messages]
        yield written
        wrapped = [
            {
                **m,
                "tool_calls": [c if "function" in c else {"type": "function", "function": c} for c in m["tool_calls"]],
            }
            if "tool_calls" in m
            else m
            for m in written
        ]
        yield wrapped
        yield [
            {
                **m,
                "tool_calls": [
                    {
                        **c,
                        "function": {
                            **c["function"],
                            "arguments": json.dumps(c["function"]["arguments"], ensure_ascii=False),
                        },
                    }
                    for c in m["tool_calls"]
                ],
            }
            if "tool_calls" in m
            else m
            for m in wrapped
        ]
        yield [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in wrapped]

    def render(self, messages, generation=False, **more):
        try:
            return self.template.render(
                messages=messages,
                tools=self.tools,
                documents=None,
                add_generation_prompt=generation,
                **self.special,
                **{**self.kwargs, **more},
            )
        except Exception:
            return None

    def heads(self, k, **more):
        return {head for form in self.forms() if (head := self.render(form[:k], True, **more)) is not None}

    def texts(self, k, **more):
        return {text for form in self.forms() if (text := self.render(form[:k], **more)) is not None}


def markers(value) -> set[str]:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return set(MARKER.findall(text))


def parts_of(message) -> dict[str, set[str]]:
    """Markers of a message by what the ledger calls their loss."""
    content, thought = message.get("content", ""), message.get("reasoning_content", "")
    if message["role"] == "assistant" and "</think>" in content:
        before, _, content = content.partition("</think>")
        thought += before
    kind = {"user": "user", "assistant": "answer", "tool": "tool_result"}.get(message["role"], "system")
    calls = [c.get("function", c) for c in message.get("tool_calls", ())]
    found = {kind: markers(content), "reasoning": markers(thought), "tool_call": markers(calls)}
    return {kind: words for kind, words in found.items() if words}


def runs(sample, stops):
    """Trained stretches; one that goes on behind a stop token (an answer right behind an answer) is two."""
    changes = np.flatnonzero(np.diff(sample.weights)) + 1
    inside = np.flatnonzero(np.isin(sample.tokens, list(stops)) & (sample.weights != 0)) + 1
    bounds = sorted({0, len(sample.tokens), *changes.tolist(), *inside.tolist()})
    return [(a, b) for a, b in pairwise(bounds) if sample.weights[a] != 0]


def judge_samples(judge: Judge, samples, row) -> None:
    tokenizer, decode, messages = judge.tokenizer, judge.tokenizer.decode, judge.messages
    stops = {tokenizer.hf.convert_tokens_to_ids(name) for name in judge.shape.may_end_on}
    wanted = [
        k for k, m in enumerate(row["messages"])
        if m["role"] == "assistant" and m.get("weight", 1) != 0 and m.get("train", True)
    ]  # fmt: skip
    trained = []
    for sample in samples:
        switch = (
            {"enable_thinking": "thinking_on" in sample.flags}
            if {"thinking_on", "thinking_off"} & {*sample.flags}
            else {}
        )
        end_of_last = 0
        lost = {flag.removeprefix("lost_") for flag in sample.flags if flag.startswith("lost_")}
        for a, b in runs(sample, stops):
            assert len(trained) < len(wanted), sample.tokens[a:b]
            k = wanted[len(trained)]
            trained.append(k)
            a -= a == 1 and judge.heads(k) == {""}  # nothing can predict the very first token
            head, run = decode(sample.tokens[:a]), decode(sample.tokens[a:b])
            # It begins where generation would, up to a token that crosses the place.
            heads = judge.heads(k, **switch)
            if "straddle" in sample.flags:
                heads = {h for h in heads if h.startswith(head) and (head + run).startswith(h)}
                assert heads, (head, judge.heads(k, **switch))
            else:
                assert head in heads, (head, heads)
            assert sample.tokens[b - 1] in stops, run  # and there is none before it, see `runs`
            # It holds all of its message and nothing of another.
            own = set().union(*parts_of(messages[k]).values())
            missing = own - markers(run)
            assert not missing, (missing, run)
            if "continued" not in sample.flags:
                others = set().union(*(w for i, m in enumerate(messages) if i != k for w in parts_of(m).values()))
                assert not (markers(run) - own) & others, run
                # The text is the template's own, up to a stop token appended where it writes none.
                text = decode(sample.tokens[:b])
                stop = tokenizer.decode(sample.tokens[b - 1 : b])
                assert any(
                    known.startswith(text) or known.rstrip().startswith(text[: -len(stop)].rstrip())
                    for length in range(k + 1, len(messages) + 1)
                    for known in judge.texts(length, **switch)
                ), text
            # What stands before it is there, or said to be lost.
            before = decode(sample.tokens)
            for i, message in enumerate(messages[:k]):
                for kind, words in parts_of(message).items():
                    if kind == "reasoning":
                        continue
                    assert (not words <= markers(before)) <= (kind in lost), (i, kind, sample.flags, before)
            end_of_last = b
        # Flags of loss are true.
        whole = decode(sample.tokens)
        for kind in lost - {"tools"}:
            present = [words <= markers(whole) for m in messages for part, words in parts_of(m).items() if part == kind]
            assert not present or not all(present) or row["messages"][0] == row["messages"][1] or kind == "tool_call", (
                kind,
                whole,
            )
        assert end_of_last
    assert trained == wanted
    if judge.tools and all(not {"nameone"} <= markers(head) for k in wanted for head in judge.heads(k)):
        assert any("lost_tools" in s.flags for s in samples)


def judge_refusal(judge: Judge, error: RowError) -> None:
    messages = judge.messages
    answers = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
    if error.reason == "template_refused":
        everything = [
            judge.render(form[:k], g) for form in judge.forms() for k in range(1, len(messages) + 1) for g in (0, 1)
        ]
        assert None in everything
    elif error.reason.startswith("lost_"):
        kind = error.reason.removeprefix("lost_")
        for form_texts in [[t for t in judge.texts(k + 1)] for k in answers]:
            assert form_texts
        lacking = [
            k
            for k in answers
            if (words := parts_of(messages[k]).get(kind))
            and all(not words <= markers(text[len(prefix(text, judge.heads(k))) :]) for text in judge.texts(k + 1))
        ]
        assert lacking, error
    elif error.reason == "prompt_not_prefix":
        assert any(not any(t.startswith(h) for h in judge.heads(k)) for k in answers for t in judge.texts(k + 1)), error
    elif error.reason == "assistant_first":
        assert answers[0] == 0 and not judge.heads(0)
    elif error.reason == "no_end_of_turn":
        names = judge.shape.may_end_on
        assert any(not any(name in t[t.rfind(w) :] for name in names) for k in answers for t in judge.texts(k + 1)
                   for w in list(markers(messages[k]))[:1])  # fmt: skip
    else:
        raise AssertionError(error)


def prefix(text: str, heads: set[str]) -> str:
    return max((head for head in heads if text.startswith(head)), key=len, default="")


@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_each_conversation_is_trained_exactly_or_refused_with_the_right_reason(encoders, name):
    encoder, shape = encoders[name], shapes.SHAPES[name]
    for talk, row in TALKS.items():
        found = outcome(encoder, row)
        judge = Judge(encoder, shape, row)
        try:
            if isinstance(found, RowError):
                judge_refusal(judge, found)
            else:
                judge_samples(judge, found, row)
        except AssertionError as error:
            what = found if isinstance(found, RowError) else [sample.flags for sample in found]
            raise AssertionError(f"{talk}: {what}: {error}") from error
