"""Rows of the formats people have, as one of three things: a conversation, a text, or tokens.

| format             | keys                                                                     | becomes      |
|--------------------|--------------------------------------------------------------------------|--------------|
| messages           | messages: turns, tools?                                                  | conversation |
| sharegpt           | conversations, conversation, dialogue, turns, data, ...: turns; tools?   | conversation |
| alpaca             | instruction, input?, output, system?, history?: [[question, answer]]     | conversation |
| dolly              | instruction, context?, response                                          | conversation |
| question_answer    | question/query/prompt/inputs/..., answer/response/output/targets/...     | conversation |
| tool_query         | query, tools, answers (calls): xLAM                                      | conversation |
| preference         | chosen (and rejected), prompt?                                           | conversation |
| user_assistant     | User, Assistant (texts, or lists of equal length), Template?             | conversation |
| oasst              | prompt: {role, text, replies: [...]} (a tree: one for each path)         | conversation |
| prompt_completion  | prompt, completion (texts, or lists of messages)                         | either       |
| text               | text                                                                     | text         |
| rendered           | text, or prompt and completion, as the chat template writes them         | conversation |
| raw_text           | the same, where control tokens that they spell are such (named only)     | text         |
| tokens             | input_ids, labels? | weights? | loss_mask?, attention_mask?              | tokens       |

"rendered" is recognised by a whole source (`rendered`). How turns may be written: `turns`. What a message may say of
its weight: `weighting`. A column `system` or `system_prompt` is the system text of a conversation without one. Columns
with text that no format reads are noted.

Values may be JSON text where a list is due (CSV and Parquet have it so), and a dict of lists where a list of dicts is
due (TFDS and Arrow). No key is ever filled in with None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from sftjax.data import columns, turns, values, weighting
from sftjax.data.conversations import REASONING, Conversation
from sftjax.data.types import RowError
from sftjax.errors import ConfigError


@dataclass(frozen=True)
class Text:
    """A completion behind a prompt ("" = all of it is trained). `raw`: control tokens that it spells are such."""

    prompt: str
    completion: str
    notes: tuple[str, ...] = ()
    raw: bool = False


@dataclass(frozen=True)
class Tokens:
    """Ids and weights, as they are. int32 [n], float32 [n]."""

    ids: np.ndarray
    weights: np.ndarray
    notes: tuple[str, ...] = ()


Example = Conversation | Text | Tokens


def detect(row: Mapping[str, Any]) -> str:
    """The format that a row's keys tell. Raises RowError."""
    for name, fits in _possible(tuple(row)):
        if fits is None or fits(row):
            return name
    raise RowError("unknown_format", f"keys {sorted(map(str, row))[:12]} are of no known format: {_advice(row)}")


def _has(*needed: str) -> Callable[[frozenset], bool]:
    return frozenset(needed).issubset


def _paired(keys: frozenset) -> bool:
    question = next((name for name in columns.QUESTIONS if name in keys), None)
    return question is not None and any(name in keys for name in columns.ANSWERS if name != question)


def _listed(row: Mapping) -> bool:
    """Turns in a column that could hold something else."""
    return any(isinstance(row.get(name), (list, tuple, np.ndarray)) and len(row[name]) for name in turns.COLUMNS[2:])


def _one_message(row: Mapping) -> bool:
    raise RowError("unknown_format", "one message of an OpenAssistant tree a row: use the file with whole trees")


def _is_tree(row: Mapping) -> bool:
    return isinstance(row["prompt"], Mapping) and "replies" in row["prompt"]


# (format, whether keys fit, whether values do)
_DETECT: tuple[tuple[str, Callable[[frozenset], bool], Callable[[Mapping], bool] | None], ...] = (
    ("oasst", lambda keys: keys >= {"message_id", "parent_id", "role"} and "replies" not in keys, _one_message),
    ("messages", _has("messages"), None),
    ("sharegpt", _has("conversations"), None),
    ("tokens", _has("input_ids"), None),
    ("sharegpt", lambda keys: "text" not in keys and not keys.isdisjoint(turns.COLUMNS[2:]), _listed),
    ("user_assistant", _has("User", "Assistant"), None),
    ("tool_query", _has("query", "tools", "answers"), None),
    ("preference", _has("chosen"), None),
    ("alpaca", _has("instruction", "output"), None),
    ("dolly", _has("instruction", "response"), None),
    ("prompt_completion", _has("prompt", "completion"), lambda row: not isinstance(row["prompt"], Mapping)),
    ("oasst", _has("prompt"), _is_tree),
    ("question_answer", _paired, None),
    ("oasst", _has("replies", "text"), None),
    ("text", _has("text"), None),
)


@lru_cache(maxsize=256)
def _possible(keys: tuple) -> tuple[tuple[str, Callable[[Mapping], bool] | None], ...]:
    """Formats that keys allow, in order; up to one that needs no look at the values."""
    found = []
    for name, fits, look in _DETECT:
        if fits(frozenset(keys)):
            found.append((name, look))
            if look is None:
                break
    return tuple(found)


def _advice(row: Mapping) -> str:
    """How to name the columns of a row of no known format, so that it becomes a conversation."""
    for name, value in row.items():
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            return f"if {name!r} holds the turns, give its source fields={{'messages': {str(name)!r}}}"
    texts = {str(name): value for name, value in row.items() if isinstance(value, str) and value.strip()}
    longer = [name for name in texts if values.texts_in(texts[name])] if len(texts) > 2 else []
    names = longer if len(longer) > 1 else list(texts)
    question, answer = (names[0], names[-1]) if len(names) > 1 else ("COLUMN", "COLUMN")
    return (
        "name the columns that hold a question and its answer, for example "
        f"fields={{'question': {question[:30]!r}, 'answer': {answer[:30]!r}}} in the source's dict"
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
        theirs = {name: ours for ours, name in fields.items() if name in row}
        row = {
            **{key: value for key, value in row.items() if key not in theirs and key not in fields},
            **{ours: row[name] for name, ours in theirs.items()},
        }
    values.refuse_media(row, "the row")
    if format == "auto":
        try:
            format = detect(row)
        except RowError:  # columns of tables are often Capitalised
            lowered = {str(key).lower(): value for key, value in row.items()}
            if len(lowered) < len(row) or lowered.keys() == row.keys():
                raise
            format = detect(lowered)
            row = lowered
    if format not in PARSERS:
        raise ConfigError(f"data.format={format!r} is not one of auto, {', '.join(PARSERS)}")
    pictured = not values.MEDIA.isdisjoint(row)
    for example in PARSERS[format](row):
        if pictured:
            _refuse_placeholders(example)
        unread = unread_columns(row, example) if len(row) > 1 or format == "text" else ()
        yield replace(example, notes=(*example.notes, *unread)) if unread else example


def _refuse_placeholders(example: Example) -> None:
    """Of a row whose column for pictures is empty."""
    for placeholder in ("<image>", "<video>", "<audio>"):
        if any(placeholder in text for text in _texts_of(example)):
            raise RowError("unsupported_content", f"a text has {placeholder}, and what it stands for is missing")


_OTHER_FIELDS = """
answers tools functions chosen history text replies User Assistant Template chat_template_kwargs
input_ids labels weights loss_mask completion_mask assistant_masks attention_mask
"""
FIELDS = frozenset(  # that a source's `fields` may name columns for
    name
    for names in (turns.COLUMNS, turns.SYSTEM_COLUMNS, columns.QUESTIONS, columns.ANSWERS, columns.EXTRAS, REASONING)
    for name in (*names, *_OTHER_FIELDS.split())
)
_ALWAYS_READ = frozenset(("messages", "conversations", "tools", "functions", "chat_template_kwargs", "input_ids"))
_WISHES = frozenset((*weighting.KEYS, "labels", "label"))  # said of a whole row, where nothing reads them


def unread_columns(row: Mapping, example: Example) -> tuple[str, ...]:
    """Notes on columns with text that isn't in the example, and on those that ask for something."""
    notes, read = [], None
    for key, value in row.items():
        if key in _ALWAYS_READ:
            continue
        if key in _WISHES:
            if value is not None and not isinstance(example, Tokens):
                notes.append(values.note("unread_column", key))
            continue
        if not isinstance(value, (str, list, tuple, dict)) or not value or str(key).startswith("_"):
            continue
        read = _texts_of(example) if read is None else read
        if value in read:
            continue
        if any(not any(text in one for one in read) for text in values.texts_in(value)):
            notes.append(values.note("unread_column", key))
    return tuple(notes)


def _texts_of(example: Example) -> list[str]:
    if isinstance(example, Text):
        return [example.prompt, example.completion]
    if isinstance(example, Tokens):
        return []
    found = [text for message in example.messages if isinstance(text := message.get("content"), str)]
    for message in example.messages:
        if len(message) > 2:
            found += [message["reasoning_content"]] if isinstance(message.get("reasoning_content"), str) else []
            found += [values.as_json(call) for call in message.get("tool_calls", ())]
    return found


# --- texts and tokens --------------------------------------------------------------------------------------------


def _prompt_completion(row) -> Iterator[Example]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if row.get("label") is False:  # sets for KTO hold good and bad answers
        raise RowError("rejected_answer", "label is false: an answer that is not wanted")
    if isinstance(completion, (list, Mapping)) or isinstance(prompt, list):
        yield from columns.prompt_and_messages(row)
        return
    completion = values.text_of(row, "completion")
    if not completion.strip():
        raise RowError("empty_answer", "the completion is empty")
    yield Text(values.text_of(row, "prompt"), completion)


def _plain_text(row) -> Iterator[Example]:
    text = values.text_of(row, "text")
    if not text.strip():
        raise RowError("empty_text", "the text is empty")
    yield Text("", text)


def _any_text(row) -> Iterator[Example]:
    yield from (_prompt_completion if "completion" in row else _plain_text)(row)


def _raw_text(row) -> Iterator[Example]:
    for example in _any_text(row):
        yield replace(example, raw=True) if isinstance(example, Text) else example


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
    "messages": turns.messages,
    "sharegpt": turns.sharegpt,
    "alpaca": columns.pair(("instruction",), ("output",)),
    "dolly": columns.pair(("instruction",), ("response",)),
    "question_answer": columns.pair(columns.QUESTIONS, columns.ANSWERS),
    "tool_query": columns.tool_query,
    "preference": columns.preference,
    "user_assistant": turns.user_assistant,
    "oasst": turns.oasst,
    "prompt_completion": _prompt_completion,
    "text": _plain_text,
    "rendered": _any_text,
    "raw_text": _raw_text,
    "tokens": _tokens,
}
