"""Conversations: messages checked one by one, and the formats that hold them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from sftjax.data import values
from sftjax.data.types import RowError

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
    "ipython": "tool",
}
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Conversation:
    """Messages as the template gets them, with one weight each (0 = not trained), and whether any row field set it."""

    messages: list[dict[str, Any]]
    weights: list[float]
    tools: list[Any] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    weighted: bool = False


def messages(row) -> Iterator[Conversation]:
    """OpenAI's format."""
    yield conversation(values.list_of(row, "messages"), tools_of(row), row)


def conversation(messages, tools=None, row=None) -> Conversation:
    """Messages checked one by one, with their weights. Raises RowError."""
    if not messages:
        raise RowError("empty_conversation", "there are no messages")
    cleaned, weights, weighted = [], [], False
    for number, message in enumerate(messages):
        if not isinstance(message, (dict, Mapping)):  # dict first: asking an abstract class takes ten times as long
            raise RowError(
                "wrong_type", f"message {number} is {values.kind(message)}, not an object with role and content"
            )
        weight = _weight(message, number) if len(message) > 2 or "content" not in message else None
        weighted |= weight is not None
        cleaned.append(_message(message, number))
        answer = cleaned[-1]["role"] == "assistant"
        if weight and not answer:
            role = cleaned[-1]["role"]
            raise RowError("weight_on_prompt", f"message {number} ({role}) asks to be trained: only answers can be")
        weights.append((1.0 if weight is None else weight) if answer else 0.0)
    kwargs = values.mapping_of(row, "chat_template_kwargs") if row is not None else {}
    return Conversation(cleaned, weights, tools, kwargs, weighted)


def _message(message: Mapping, number: int) -> dict[str, Any]:
    """Role and content checked; our own fields and keys with None dropped, as `apply_chat_template` drops them."""
    role = message.get("role")
    if role not in ROLES:
        raise RowError("unknown_role", f"message {number} has role {role!r}, not one of {', '.join(ROLES)}")
    if len(message) == 2 and isinstance(content := message.get("content"), str):  # nearly all messages
        values.check_text(content, f"message {number}")
        return {"role": role, "content": content}
    cleaned = {k: v for k, v in message.items() if v is not None and k not in ("train", "weight")}
    content = cleaned.get("content")
    if isinstance(content, list):
        cleaned["content"] = content = _joined_parts(content, number)
    if content is not None and not isinstance(content, str):
        raise RowError("wrong_type", f"message {number}: content is {values.kind(content)}, not text")
    if "tool_calls" in cleaned:
        calls = values.decoded(cleaned["tool_calls"], f"message {number}: tool_calls")
        if not isinstance(calls, list):
            raise RowError("wrong_type", f"message {number}: tool_calls is {values.kind(calls)}, not a list")
        if calls:
            cleaned["tool_calls"] = [_tool_call(call, number) for call in calls]
        else:
            del cleaned["tool_calls"]
    for name in ("content", *_REASONING):
        if isinstance(cleaned.get(name), str):
            values.check_text(cleaned[name], f"message {number}")
    if content is None and "tool_calls" not in cleaned and not any(name in cleaned for name in _REASONING):
        raise RowError("empty_message", f"message {number} ({role}) has no content")
    reasoning = next((cleaned[name] for name in _REASONING if name in cleaned), None)
    if reasoning is not None:  # the names templates read it under, as transformers fills them in
        cleaned = {"thinking": reasoning, **cleaned, "reasoning_content": reasoning}
    return cleaned


def _joined_parts(parts: list, number: int) -> str:
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else values.kind(part)
            raise RowError("unsupported_content", f"message {number} has a part of type {kind!r}; only text is read")
    return "".join(texts)


def _tool_call(call, number: int) -> dict[str, Any]:
    """Arguments given as JSON text become an object, which is what templates expect."""
    if not isinstance(call, Mapping):
        raise RowError("wrong_type", f"message {number}: a tool call is {values.kind(call)}, not an object")
    call = {key: value for key, value in call.items() if value is not None}
    inner = call.get("function", call)
    if not isinstance(inner, Mapping):
        raise RowError("wrong_type", f"message {number}: a tool call's function is {values.kind(inner)}, not an object")
    if isinstance(inner.get("arguments"), str):
        try:
            arguments = orjson.loads(inner["arguments"] or "{}")
        except orjson.JSONDecodeError as error:
            raise RowError(
                "bad_arguments", f"message {number}: a tool call's arguments are not JSON ({error})"
            ) from None
        inner = {**inner, "arguments": arguments}
    return {**call, "function": dict(inner)} if "function" in call else dict(inner)


def arguments_as_text(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages with tool calls' arguments as JSON text; None where there are no tool calls."""
    changed = []
    for message in messages:
        if "tool_calls" in message:
            calls = [
                {**call, "function": {**call["function"], "arguments": _json(call["function"])}}
                if "function" in call
                else {**call, "arguments": _json(call)}
                for call in message["tool_calls"]
            ]
            message = {**message, "tool_calls": calls}
        changed.append(dict(message))
    return changed if any("tool_calls" in message for message in messages) else None


def _json(function: Mapping[str, Any]) -> str:
    return json.dumps(function.get("arguments", {}), ensure_ascii=False)


def _weight(message: Mapping, number: int) -> float | None:
    """From `train` (bool) and `weight` (a number >= 0); None where neither is there."""
    train, weight = message.get("train"), message.get("weight")
    if train is None and weight is None:
        return None
    if train is not None and not isinstance(train, (bool, int)):
        raise RowError("bad_weight", f"message {number}: train is {train!r}, not true or false")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, (int, float))):
        raise RowError("bad_weight", f"message {number}: weight is {weight!r}, not a number")
    value = (1.0 if weight is None else float(weight)) * (1.0 if train is None else float(bool(train)))
    if not math.isfinite(value) or value < 0:
        raise RowError("bad_weight", f"message {number}: weight {weight!r} is not a finite number from 0 up")
    return value


def tools_of(row) -> list[Any] | None:
    """JSON schemas, given as a list or as JSON text."""
    tools = row.get("tools")
    if tools is None or tools == "" or tools == []:
        return None
    tools = values.decoded(tools, "tools")
    if not isinstance(tools, list):
        raise RowError("wrong_type", f"tools is {values.kind(tools)}, not a list of JSON schemas")
    tools = [values.decoded(tool, "tools") for tool in tools]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("wrong_type", "tools holds something that is not a JSON schema")
    return tools or None


def sharegpt(row) -> Iterator[Conversation]:
    """from/value turns, as ShareGPT has them."""
    messages = []
    for number, turn in enumerate(values.list_of(row, "conversations")):
        if not isinstance(turn, Mapping):
            raise RowError("wrong_type", f"turn {number} is {values.kind(turn)}, not an object with from and value")
        if "role" in turn and "from" not in turn:
            messages.append(turn)
            continue
        who = turn.get("from")
        kept = {key: turn[key] for key in ("train", "weight") if key in turn}
        if who == "function_call":
            call = values.decoded(turn.get("value"), f"turn {number}: the function call")
            messages.append({"role": "assistant", "tool_calls": call if isinstance(call, list) else [call], **kept})
        elif who in _SHAREGPT_ROLES:
            messages.append({"role": _SHAREGPT_ROLES[who], "content": turn.get("value"), **kept})
        else:
            raise RowError("unknown_role", f"turn {number} is from {who!r}, not one of {', '.join(_SHAREGPT_ROLES)}")
    yield conversation(_with_system(row, messages), tools_of(row), row)


def _with_system(row, messages: list, key: str = "system") -> list:
    system = row.get(key)
    if system and (not messages or messages[0].get("role") != "system"):
        return [{"role": "system", "content": system}, *messages]
    return messages


def instruction(answer: str, extra: str):
    """Alpaca and Dolly: an instruction, an optional text it is about, an answer."""

    def parser(row) -> Iterator[Conversation]:
        instruction, more = values.text_of(row, "instruction"), row.get(extra) or ""
        if not isinstance(more, str):
            raise RowError("wrong_type", f"{extra} is {values.kind(more)}, not text")
        messages = []
        for pair in values.decoded(row.get("history") or [], "history"):
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise RowError("wrong_type", "history is not a list of [question, answer] pairs")
            messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        content = f"{instruction}\n\n{more}" if more.strip() else instruction
        messages += [
            {"role": "user", "content": content},
            {"role": "assistant", "content": values.text_of(row, answer)},
        ]
        yield conversation(_with_system(row, messages))

    return parser


def user_assistant(row) -> Iterator[Conversation]:
    """User and Assistant, texts or lists of equal length; Template is the system text."""
    sides = []
    for key in ("User", "Assistant"):
        value = row.get(key)
        if isinstance(value, str) and not value.lstrip().startswith("["):
            value = [value]
        elif isinstance(value, str):
            try:
                decoded = orjson.loads(value)
            except orjson.JSONDecodeError:
                decoded = None
            value = decoded if isinstance(decoded, list) else [value]
        if not isinstance(value, (list, tuple)):
            raise RowError("wrong_type", f"{key} is {values.kind(value)}, not text or a list of texts")
        sides.append(value)
    if len(sides[0]) != len(sides[1]):
        raise RowError("unequal_turns", f"User has {len(sides[0])} turns and Assistant {len(sides[1])}")
    messages = []
    for question, answer in zip(*sides, strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    yield conversation(_with_system(row, messages, "Template"))


def oasst(row) -> Iterator[Conversation]:
    """An OpenAssistant tree: one conversation for each path."""
    root = row["prompt"] if isinstance(row.get("prompt"), Mapping) else row
    paths = _tree_paths(root)
    if not paths:
        raise RowError("no_assistant_turn", "no path of the tree has an answer in it")
    for path in paths:
        yield conversation(path)


def _tree_paths(root: Mapping) -> list[list[dict]]:
    """All paths from the root to a leaf, each up to its last answer; those that become equal are taken once."""
    roles = {"prompter": "user", "user": "user", "assistant": "assistant", "system": "system"}
    paths, stack = {}, [(root, ())]
    while stack:
        node, above = stack.pop()
        if not isinstance(node, Mapping):
            raise RowError("wrong_type", f"a reply of the tree is {values.kind(node)}, not an object")
        if node.get("deleted"):
            continue
        role = roles.get(node.get("role"))
        if role is None:
            raise RowError("unknown_role", f"the tree has role {node.get('role')!r}, not prompter or assistant")
        path = (*above, (role, values.text_of(node, "text")))
        replies = [
            reply for reply in node.get("replies") or [] if not (isinstance(reply, Mapping) and reply.get("deleted"))
        ]
        stack += [(reply, path) for reply in reversed(replies)]
        if not replies:
            while path and path[-1][0] != "assistant":
                path = path[:-1]
            if path:
                paths[path] = None
    longest = [path for path in paths if not any(other[: len(path)] == path and other != path for other in paths)]
    return [[{"role": role, "content": text} for role, text in path] for path in longest]


def join_same_speaker(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Consecutive messages of one role as one, joined by newlines."""
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1]["content"] += "\n" + message["content"]
        else:
            joined.append(dict(message))
    return joined
