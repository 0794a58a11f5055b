"""Conversations: messages checked one by one, with their weights, calls and tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from sftjax.data import values, weighting
from sftjax.data.types import RowError

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function": "tool",
    "ipython": "tool",
}
REASONING = ("reasoning_content", "thinking", "reasoning")
_TEXTS = ("text", "input_text", "output_text")
_READ = frozenset(("role", "content", "name", "tool_calls", "tool_call_id", "function_call", *REASONING))


@dataclass(frozen=True)
class Conversation:
    """Messages as the template gets them, with one weight each (0 = not trained), and whether any row field set it.

    `notes` are flags for the ledger: keys of messages and columns of the row that nothing here reads.
    """

    messages: list[dict[str, Any]]
    weights: list[float]
    tools: list[Any] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    weighted: bool = False
    notes: tuple[str, ...] = ()


def conversation(messages, tools=None, row=None) -> Conversation:
    """Messages checked one by one, with their weights. Raises RowError."""
    if not messages:
        raise RowError("empty_conversation", "there are no messages")
    cleaned, weights, weighted, notes = [], [], False, ()
    for number, message in enumerate(messages):
        if not isinstance(message, (dict, Mapping)):  # dict first: asking an abstract class takes ten times as long
            raise RowError(
                "wrong_type", f"message {number} is {values.kind(message)}, not an object with role and content"
            )
        weight = None
        if len(message) > 2 or "content" not in message:
            weight = weighting.weight_of(message, number)
            notes += tuple(values.note("unread_key", key) for key in message if _is_unread(message, key))
        weighted |= weight is not None
        cleaned.append(_message(message, number))
        answer = cleaned[-1]["role"] == "assistant"
        if weight and not answer:
            role = cleaned[-1]["role"]
            raise RowError("weight_on_prompt", f"message {number} ({role}) asks to be trained: only answers can be")
        weights.append((1.0 if weight is None else weight) if answer else 0.0)
    kwargs = values.mapping_of(row, "chat_template_kwargs") if row is not None else {}
    return Conversation(cleaned, weights, tools, kwargs, weighted, tuple(dict.fromkeys(notes)))


def _is_unread(message: Mapping, key) -> bool:
    """Not read here; a template may do so, but most don't."""
    return key not in _READ and key not in weighting.KEYS and message[key] not in (None, "", [], {})


def role_of(name) -> str | None:
    """The role that a speaker's name stands for; None for another."""
    if name in ROLES:
        return name
    return _OTHER_NAMES.get(lower, lower if lower in ROLES else None) if (lower := str(name).lower()) else None


def _message(message: Mapping, number: int) -> dict[str, Any]:
    """Role and content checked; our own fields and keys with None dropped, as `apply_chat_template` drops them."""
    role = message.get("role")
    if role not in ROLES and (role := role_of(role)) is None:
        known = ", ".join((*ROLES, *_OTHER_NAMES))
        raise RowError("unknown_role", f"message {number} has role {message.get('role')!r}, not one of {known}")
    if len(message) == 2 and isinstance(content := message.get("content"), str):  # nearly all messages
        values.check_text(content, f"message {number}")
        return {"role": role, "content": content}
    cleaned = {k: v for k, v in message.items() if v is not None and k not in weighting.KEYS} | {"role": role}
    values.refuse_media(cleaned, f"message {number}")
    content = cleaned.get("content")
    if isinstance(content, list):
        cleaned["content"] = content = _joined_parts(content, number)
    if content is not None and not isinstance(content, str):
        raise RowError("wrong_type", f"message {number}: content is {values.kind(content)}, not text")
    if "function_call" in cleaned:  # OpenAI's older way
        call = values.decoded(cleaned.pop("function_call"), f"message {number}: function_call")
        cleaned.setdefault("tool_calls", [{"type": "function", "function": call}])
    if "tool_calls" in cleaned:
        calls = values.decoded(cleaned["tool_calls"], f"message {number}: tool_calls")
        if not isinstance(calls, list):
            raise RowError("wrong_type", f"message {number}: tool_calls is {values.kind(calls)}, not a list")
        if calls:
            cleaned["tool_calls"] = [_tool_call(call, number) for call in calls]
        else:
            del cleaned["tool_calls"]
    for name in ("content", *REASONING):
        if isinstance(cleaned.get(name), str):
            values.check_text(cleaned[name], f"message {number}")
    if content is None and "tool_calls" not in cleaned and not any(name in cleaned for name in REASONING):
        raise RowError("empty_message", f"message {number} ({role}) has no content")
    reasoning = next((cleaned[name] for name in REASONING if name in cleaned), None)
    if reasoning is not None:  # the names templates read it under, as transformers fills them in
        cleaned = {"thinking": reasoning, **cleaned, "reasoning_content": reasoning}
    return cleaned


def _joined_parts(parts: list, number: int) -> str:
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type", "text") in _TEXTS and isinstance(part.get("text"), str):
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


def tools_of(row) -> list[Any] | None:
    """JSON schemas, given as a list or as JSON text; or OpenAI's older `functions`."""
    tools = row.get("tools")
    if tools is None or tools == "" or tools == []:
        if not row.get("functions"):
            return None
        functions = values.list_of(row, "functions")
        return tools_of({"tools": [{"type": "function", "function": function} for function in functions]})
    tools = values.decoded(tools, "tools")
    if not isinstance(tools, list):
        raise RowError("wrong_type", f"tools is {values.kind(tools)}, not a list of JSON schemas")
    tools = [values.decoded(tool, "tools") for tool in tools]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("wrong_type", "tools holds something that is not a JSON schema")
    return tools or None


def join_same_speaker(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Consecutive messages of one role as one, joined by newlines."""
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1]["content"] += "\n" + message["content"]
        else:
            joined.append(dict(message))
    return joined
