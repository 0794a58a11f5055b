"""What a row of a data set or benchmark asks, and what it expects.

asks                                       expects
messages (all before the last answer)      the last assistant message
prompt, question, instruction (+ input)    expected, answer, target, response, output, completion or
(text, or a list of messages)              canonical_solution (text, or a list: any of them is right)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sftjax.errors import DataError

Row = Mapping[str, Any]
Message = dict[str, Any]
QUESTION_FIELDS = ("prompt", "question", "instruction")
EXPECTED_FIELDS = ("expected", "answer", "target", "response", "output", "completion", "canonical_solution")


def messages_of(row: Row) -> list[Message]:
    """The conversation to answer; it ends with a user's turn.

    Raises:
      DataError: the row has none of the fields above.
    """
    if row.get("messages"):
        messages = list(row["messages"])
        while messages and messages[-1].get("role") == "assistant":
            messages.pop()
        if messages:
            return messages
    for field in QUESTION_FIELDS:
        value = row.get(field)
        if isinstance(value, str) and value.strip():
            extra = row.get("input")
            extra = f"\n\n{extra}" if field == "instruction" and isinstance(extra, str) and extra.strip() else ""
            return [{"role": "user", "content": value + extra}]
        if isinstance(value, list) and value:
            return value
    raise DataError(f"a row has nothing to answer: give it messages, {', '.join(QUESTION_FIELDS)}; it has {_has(row)}")


def find_expected(row: Row) -> str | list[str] | None:
    """What the row expects, or None."""
    for field in EXPECTED_FIELDS:
        value = row.get(field)
        if isinstance(value, bool | int | float):
            return str(value)
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value and all(isinstance(one, str | int | float) for one in value):
            return [str(one) for one in value]
        if isinstance(value, list) and value and isinstance(value[-1], Mapping):
            return str(value[-1].get("content", ""))
    messages = row.get("messages") or ()
    if messages and messages[-1].get("role") == "assistant":
        return str(messages[-1].get("content") or "")
    return None


def expected_of(row: Row) -> list[str]:
    """The right answers, one or several.

    Raises:
      DataError: the row has none.
    """
    value = find_expected(row)
    if value is None:
        raise DataError(f"a row has no right answer to compare with ({', '.join(EXPECTED_FIELDS)}); it has {_has(row)}")
    return [value] if isinstance(value, str) else value


def field_of(row: Row, *names: str) -> Any:
    """The first of these fields that the row has.

    Raises:
      DataError: it has none.
    """
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise DataError(f"a row has no field {' or '.join(map(repr, names))}; it has {_has(row)}")


def _has(row: Row | Sequence[str]) -> str:
    return ", ".join(list(row)[:12]) or "nothing"
