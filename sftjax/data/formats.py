"""Rows of the formats people have, as one of three things: a conversation, a text, or tokens.

| format             | keys                                                                     | becomes      |
|--------------------|--------------------------------------------------------------------------|--------------|
| messages           | messages: [{role, content, tool_calls?, train?, weight?}], tools?        | conversation |
| sharegpt           | conversations: [{from, value}], system?, tools?                          | conversation |
| alpaca             | instruction, input?, output, system?, history?: [[question, answer]]     | conversation |
| dolly              | instruction, context?, response                                          | conversation |
| user_assistant     | User, Assistant (texts, or lists of equal length), Template?             | conversation |
| oasst              | prompt: {role, text, replies: [...]} (a tree: one for each path)         | conversation |
| prompt_completion  | prompt, completion (texts, or lists of messages)                         | either       |
| text               | text                                                                     | text         |
| tokens             | input_ids, labels? | weights? | loss_mask?, attention_mask?              | tokens       |

Values may be JSON text where a list is due (CSV and Parquet have it so), and a dict of lists where a list of dicts is
due (TFDS and Arrow). No key is ever filled in with None.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from sftjax.data.types import RowError
from sftjax.errors import ConfigError

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


@dataclass(frozen=True)
class Text:
    """A completion behind a prompt ("" = all of it is trained)."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Tokens:
    """Ids and weights, as they are. int32 [n], float32 [n]."""

    ids: np.ndarray
    weights: np.ndarray


Example = Conversation | Text | Tokens


def detect(row: Mapping[str, Any]) -> str:
    """The format that a row's keys tell. Raises RowError."""
    keys = row.keys()
    if keys >= {"message_id", "parent_id", "role"} and "replies" not in keys:
        raise RowError("unknown_format", "one message of an OpenAssistant tree a row: use the file with whole trees")
    for name, needed in _DETECT:
        if needed <= keys:
            if name == "prompt_completion" and isinstance(row["prompt"], Mapping):
                continue
            return name
    if "prompt" in keys and isinstance(row["prompt"], Mapping):
        return "oasst"
    raise RowError(
        "unknown_format",
        f"keys {sorted(map(str, keys))[:12]} are of no known format: set data.format, or map fields, for example "
        "fields={'prompt': 'question', 'completion': 'answer'}",
    )


_DETECT = (
    ("messages", {"messages"}),
    ("sharegpt", {"conversations"}),
    ("tokens", {"input_ids"}),
    ("user_assistant", {"User", "Assistant"}),
    ("alpaca", {"instruction", "output"}),
    ("dolly", {"instruction", "response"}),
    ("prompt_completion", {"prompt", "completion"}),
    ("oasst", {"replies", "text"}),
    ("text", {"text"}),
)


def parse(row: Mapping[str, Any], format: str = "auto", fields: Mapping[str, str] | None = None) -> Iterator[Example]:
    """Examples of one row.

    Args:
      row: as the source gives it.
      format: a key of PARSERS, or "auto".
      fields: names of this module's keys -> names in the row.

    Raises:
      RowError: the row can't be used.
      ConfigError: no such format.
    """
    if not isinstance(row, Mapping):
        raise RowError("not_an_object", f"the row is {_kind(row)}, not an object with keys")
    if fields:
        row = {**row, **{ours: row[theirs] for ours, theirs in fields.items() if theirs in row}}
    if format == "auto":
        format = detect(row)
    if format not in PARSERS:
        raise ConfigError(f"data.format={format!r} is not one of auto, {', '.join(PARSERS)}")
    yield from PARSERS[format](row)


# --- conversations -----------------------------------------------------------------------------------------------


def _messages(row) -> Iterator[Example]:
    messages = _list(row, "messages")
    tools = _tools(row)
    yield _conversation(messages, tools, row)


def _conversation(messages, tools=None, row=None) -> Conversation:
    if not messages:
        raise RowError("empty_conversation", "there are no messages")
    cleaned, weights, weighted = [], [], False
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RowError("wrong_type", f"message {number} is {_kind(message)}, not an object with role and content")
        weight = _weight(message, number)
        weighted |= weight is not None
        cleaned.append(_message(message, number))
        answer = cleaned[-1]["role"] == "assistant"
        if weight and not answer:
            raise RowError("weight_on_prompt", f"message {number} ({cleaned[-1]['role']}) asks to be trained: only "
                           "assistant messages can be")  # fmt: skip
        weights.append((1.0 if weight is None else weight) if answer else 0.0)
    kwargs = _mapping(row, "chat_template_kwargs") if row is not None else {}
    return Conversation(cleaned, weights, tools, kwargs, weighted)


def _message(message: Mapping, number: int) -> dict[str, Any]:
    """Role and content checked; our own fields and keys with None dropped, as `apply_chat_template` drops them."""
    role = message.get("role")
    if role not in ROLES:
        raise RowError("unknown_role", f"message {number} has role {role!r}, not one of {', '.join(ROLES)}")
    if len(message) == 2 and isinstance(content := message.get("content"), str):  # nearly all messages
        _check_text(content, f"message {number}")
        return {"role": role, "content": content}
    cleaned = {k: v for k, v in message.items() if v is not None and k not in ("train", "weight")}
    content = cleaned.get("content")
    if isinstance(content, list):
        cleaned["content"] = content = _joined_parts(content, number)
    if content is not None and not isinstance(content, str):
        raise RowError("wrong_type", f"message {number}: content is {_kind(content)}, not text")
    if "tool_calls" in cleaned:
        calls = _decoded(cleaned["tool_calls"], f"message {number}: tool_calls")
        if not isinstance(calls, list):
            raise RowError("wrong_type", f"message {number}: tool_calls is {_kind(calls)}, not a list")
        if calls:
            cleaned["tool_calls"] = [_tool_call(call, number) for call in calls]
        else:
            del cleaned["tool_calls"]
    for name in ("content", *_REASONING):
        if isinstance(cleaned.get(name), str):
            _check_text(cleaned[name], f"message {number}")
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
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise RowError("unsupported_content", f"message {number} has a part of type {kind!r}; only text is read")
    return "".join(texts)


def _tool_call(call, number: int) -> dict[str, Any]:
    """Arguments given as JSON text become an object, which is what templates expect."""
    if not isinstance(call, Mapping):
        raise RowError("wrong_type", f"message {number}: a tool call is {_kind(call)}, not an object")
    call = {key: value for key, value in call.items() if value is not None}
    inner = call.get("function", call)
    if not isinstance(inner, Mapping):
        raise RowError("wrong_type", f"message {number}: a tool call's function is {_kind(inner)}, not an object")
    if isinstance(inner.get("arguments"), str):
        try:
            arguments = orjson.loads(inner["arguments"] or "{}")
        except orjson.JSONDecodeError as error:
            raise RowError(
                "bad_arguments", f"message {number}: a tool call's arguments are not JSON ({error})"
            ) from None
        inner = {**inner, "arguments": arguments}
    return {**call, "function": dict(inner)} if "function" in call else dict(inner)


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


def _tools(row) -> list[Any] | None:
    tools = row.get("tools")
    if tools is None or tools == "" or tools == []:
        return None
    tools = _decoded(tools, "tools")
    if not isinstance(tools, list):
        raise RowError("wrong_type", f"tools is {_kind(tools)}, not a list of JSON schemas")
    tools = [_decoded(tool, "tools") for tool in tools]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("wrong_type", "tools holds something that is not a JSON schema")
    return tools or None


def _sharegpt(row) -> Iterator[Example]:
    messages = []
    for number, turn in enumerate(_list(row, "conversations")):
        if not isinstance(turn, Mapping):
            raise RowError("wrong_type", f"turn {number} is {_kind(turn)}, not an object with from and value")
        if "role" in turn and "from" not in turn:
            messages.append(turn)
            continue
        who = turn.get("from")
        kept = {key: turn[key] for key in ("train", "weight") if key in turn}
        if who == "function_call":
            call = _decoded(turn.get("value"), f"turn {number}: the function call")
            messages.append({"role": "assistant", "tool_calls": call if isinstance(call, list) else [call], **kept})
        elif who in _SHAREGPT_ROLES:
            messages.append({"role": _SHAREGPT_ROLES[who], "content": turn.get("value"), **kept})
        else:
            raise RowError("unknown_role", f"turn {number} is from {who!r}, not one of {', '.join(_SHAREGPT_ROLES)}")
    yield _conversation(_with_system(row, messages), _tools(row), row)


def _with_system(row, messages: list, key: str = "system") -> list:
    system = row.get(key)
    if system and (not messages or messages[0].get("role") != "system"):
        return [{"role": "system", "content": system}, *messages]
    return messages


def _instruction(answer: str, extra: str):
    def parser(row) -> Iterator[Example]:
        instruction, more = _text(row, "instruction"), row.get(extra) or ""
        if not isinstance(more, str):
            raise RowError("wrong_type", f"{extra} is {_kind(more)}, not text")
        messages = []
        for pair in _decoded(row.get("history") or [], "history"):
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise RowError("wrong_type", "history is not a list of [question, answer] pairs")
            messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        content = f"{instruction}\n\n{more}" if more.strip() else instruction
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": _text(row, answer)}]
        yield _conversation(_with_system(row, messages))

    return parser


def _user_assistant(row) -> Iterator[Example]:
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
            raise RowError("wrong_type", f"{key} is {_kind(value)}, not text or a list of texts")
        sides.append(value)
    if len(sides[0]) != len(sides[1]):
        raise RowError("unequal_turns", f"User has {len(sides[0])} turns and Assistant {len(sides[1])}")
    messages = []
    for question, answer in zip(*sides, strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    yield _conversation(_with_system(row, messages, "Template"))


def _oasst(row) -> Iterator[Example]:
    root = row["prompt"] if isinstance(row.get("prompt"), Mapping) else row
    paths = _tree_paths(root)
    if not paths:
        raise RowError("no_assistant_turn", "no path of the tree has an answer in it")
    for path in paths:
        yield _conversation(path)


def _tree_paths(root: Mapping) -> list[list[dict]]:
    """All paths from the root to a leaf, each up to its last answer; those that become equal are taken once."""
    roles = {"prompter": "user", "user": "user", "assistant": "assistant", "system": "system"}
    paths, stack = {}, [(root, ())]
    while stack:
        node, above = stack.pop()
        if not isinstance(node, Mapping):
            raise RowError("wrong_type", f"a reply of the tree is {_kind(node)}, not an object")
        if node.get("deleted"):
            continue
        role = roles.get(node.get("role"))
        if role is None:
            raise RowError("unknown_role", f"the tree has role {node.get('role')!r}, not prompter or assistant")
        path = (*above, (role, _text(node, "text")))
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


# --- texts and tokens --------------------------------------------------------------------------------------------


def _prompt_completion(row) -> Iterator[Example]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(completion, (list, Mapping)) or isinstance(prompt, list):
        prompt, completion = _messages_of(prompt, "prompt"), _messages_of(completion, "completion")
        conversation = _conversation([*prompt, *completion], _tools(row), row)
        weights = [0.0] * len(prompt) + conversation.weights[len(prompt) :]
        yield Conversation(
            conversation.messages, weights, conversation.tools, conversation.kwargs, conversation.weighted
        )
        return
    completion = _text(row, "completion")
    if not completion.strip():
        raise RowError("empty_answer", "the completion is empty")
    yield Text(_text(row, "prompt"), completion)


def _messages_of(value, key: str) -> list:
    value = _decoded(value, key) if not isinstance(value, Mapping) else [value]
    if not isinstance(value, list):
        raise RowError("wrong_type", f"{key} is {_kind(value)}, and its counterpart a list of messages")
    return value


def _plain_text(row) -> Iterator[Example]:
    text = _text(row, "text")
    if not text.strip():
        raise RowError("empty_text", "the text is empty")
    yield Text("", text)


def _tokens(row) -> Iterator[Example]:
    ids = _array(row, "input_ids")
    if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        raise RowError("wrong_type", "input_ids is not a list of whole numbers")
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise RowError("bad_ids", f"input_ids reach from {ids.min()} to {ids.max()}")
    if row.get("labels") is not None:
        labels = _array(row, "labels", len(ids))
        wrong = np.flatnonzero((labels != -100) & (labels != ids))
        if len(wrong):
            raise RowError(
                "bad_labels", f"labels[{wrong[0]}] is {labels[wrong[0]]}: neither -100 nor input_ids[{wrong[0]}]"
            )
        weights = (labels != -100).astype(np.float32)
    else:
        key = next(
            (k for k in ("weights", "loss_mask", "completion_mask", "assistant_masks") if row.get(k) is not None), ""
        )
        weights = _array(row, key, len(ids)).astype(np.float32) if key else np.ones(len(ids), np.float32)
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise RowError("bad_weight", f"{key} holds a number that is not finite or below 0")
    if row.get("attention_mask") is not None:
        keep = _array(row, "attention_mask", len(ids)).astype(bool)
        ids, weights = ids[keep], weights[keep]
        if not len(ids):
            raise RowError("empty_text", "attention_mask leaves nothing")
    yield Tokens(ids.astype(np.int32), weights)


def _array(row, key: str, length: int | None = None) -> np.ndarray:
    value = _decoded(row.get(key), key)
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.zeros((0, 0))
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise RowError("wrong_type", f"{key} is not a list of numbers")
    if length is not None and len(array) != length:
        raise RowError("unequal_lengths", f"{key} has {len(array)} numbers and input_ids {length}")
    return array


# --- helpers -----------------------------------------------------------------------------------------------------


def _kind(value) -> str:
    if value is None:
        return "missing or null"
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _check_text(text: str, where: str) -> None:
    if "\0" in text:
        raise RowError("nul_character", f"{where} contains a NUL character")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowError("not_unicode", f"{where} contains half of a surrogate pair") from None


def _text(row, key: str) -> str:
    value = row.get(key)
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise RowError("not_unicode", f"{key} is not UTF-8") from None
    if not isinstance(value, str):
        raise RowError("wrong_type", f"{key} is {_kind(value)}, not text")
    _check_text(value, key)
    return value


def _decoded(value, name: str):
    """JSON text as what it says; a dict of lists as a list of dicts."""
    if isinstance(value, bytes):
        value = value.decode(errors="strict")
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise RowError("wrong_type", f"{name} is text, and not JSON ({error})") from None
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, tuple):
        value = list(value)
    return value


def _list(row, key: str) -> list:
    value = _decoded(row.get(key), key)
    if isinstance(value, Mapping):
        value = list_of_dicts(value)
    if not isinstance(value, list):
        raise RowError("wrong_type", f"{key} is {_kind(value)}, not a list")
    return value


def _mapping(row, key: str) -> dict:
    value = row.get(key)
    if value is None:
        return {}
    value = _decoded(value, key)
    if not isinstance(value, Mapping):
        raise RowError("wrong_type", f"{key} is {_kind(value)}, not an object")
    return dict(value)


def list_of_dicts(columns: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """{"role": [a, b], "content": [c, d]} -> [{"role": a, "content": c}, {"role": b, "content": d}]; else None."""
    values = [value for value in columns.values()]
    if not values or not all(isinstance(value, (list, tuple, np.ndarray)) for value in values):
        return None
    if len({len(value) for value in values}) != 1:
        return None
    return [dict(zip(columns, items, strict=True)) for items in zip(*values, strict=True)]


PARSERS = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _instruction("output", "input"),
    "dolly": _instruction("response", "context"),
    "user_assistant": _user_assistant,
    "oasst": _oasst,
    "prompt_completion": _prompt_completion,
    "text": _plain_text,
    "tokens": _tokens,
}


def join_same_speaker(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Consecutive messages of one role as one, joined by newlines."""
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1]["content"] += "\n" + message["content"]
        else:
            joined.append(dict(message))
    return joined
