"""Other shapes of the same conversation, for templates that don't read the usual one.

"content" missing beside tool calls      ""        most templates put texts together without asking
a call without its "function" object     in one    as OpenAI has it
arguments as an object                   as text   DeepSeek's and Functionary's join them as text
content as text                          parts     SmolVLM's and LLaVA's read a list of parts only
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]


def others(messages: Messages) -> Iterator[list[dict[str, Any]]]:
    """The conversation in other shapes, those that change least first."""
    written = [_with_content(message) for message in messages]
    usual = [_with_functions(message) for message in written]
    seen = [list(messages)]
    for shape in (written, usual, [_with_arguments_as_text(message) for message in usual], [*map(_in_parts, usual)]):
        if shape not in seen:
            seen.append(shape)
            yield shape


def _with_content(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": message.get("content") or ""}


def _with_functions(message: Mapping[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return dict(message)
    calls = [call if "function" in call else _in_function(call) for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def _in_function(call: Mapping[str, Any]) -> dict[str, Any]:
    outside = {key: call[key] for key in ("id", "type") if key in call}
    return {"type": "function", **outside, "function": {k: v for k, v in call.items() if k not in ("id", "type")}}


def _with_arguments_as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return dict(message)
    calls = [
        {**call, "function": {**call["function"], "arguments": _json(call["function"].get("arguments", {}))}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _json(arguments) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}
