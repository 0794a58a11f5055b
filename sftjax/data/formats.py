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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sftjax.data import conversations, values
from sftjax.data.conversations import Conversation
from sftjax.data.types import RowError
from sftjax.errors import ConfigError


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
        raise RowError("not_an_object", f"the row is {values.kind(row)}, not an object with keys")
    if fields:
        row = {**row, **{ours: row[theirs] for ours, theirs in fields.items() if theirs in row}}
    if format == "auto":
        format = detect(row)
    if format not in PARSERS:
        raise ConfigError(f"data.format={format!r} is not one of auto, {', '.join(PARSERS)}")
    yield from PARSERS[format](row)


# --- texts and tokens --------------------------------------------------------------------------------------------


def _prompt_completion(row) -> Iterator[Example]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(completion, (list, Mapping)) or isinstance(prompt, list):
        prompt, completion = _messages_of(prompt, "prompt"), _messages_of(completion, "completion")
        conversation = conversations.conversation([*prompt, *completion], conversations.tools_of(row), row)
        weights = [0.0] * len(prompt) + conversation.weights[len(prompt) :]
        yield Conversation(
            conversation.messages, weights, conversation.tools, conversation.kwargs, conversation.weighted
        )
        return
    completion = values.text_of(row, "completion")
    if not completion.strip():
        raise RowError("empty_answer", "the completion is empty")
    yield Text(values.text_of(row, "prompt"), completion)


def _messages_of(value, key: str) -> list:
    value = values.decoded(value, key) if not isinstance(value, Mapping) else [value]
    if not isinstance(value, list):
        raise RowError("wrong_type", f"{key} is {values.kind(value)}, and its counterpart a list of messages")
    return value


def _plain_text(row) -> Iterator[Example]:
    text = values.text_of(row, "text")
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
    value = values.decoded(row.get(key), key)
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.zeros((0, 0))
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise RowError("wrong_type", f"{key} is not a list of numbers")
    if length is not None and len(array) != length:
        raise RowError("unequal_lengths", f"{key} has {len(array)} numbers and input_ids {length}")
    return array


PARSERS = {
    "messages": conversations.messages,
    "sharegpt": conversations.sharegpt,
    "alpaca": conversations.instruction("output", "input"),
    "dolly": conversations.instruction("response", "context"),
    "user_assistant": conversations.user_assistant,
    "oasst": conversations.oasst,
    "prompt_completion": _prompt_completion,
    "text": _plain_text,
    "tokens": _tokens,
}
