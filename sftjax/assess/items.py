"""What is asked: rows of data files as conversations, with where they came from and what they expect."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sftjax.data import formats
from sftjax.data.conversations import Conversation
from sftjax.data.sources import open_source
from sftjax.data.types import RowError
from sftjax.errors import DataError
from sftjax.scorers.rows import Message, find_expected, messages_of


@dataclasses.dataclass(frozen=True)
class Item:
    """A row to answer.

    Attributes:
      index: its number over all files. source: the row's `source` where it says one, or its file's name.
      messages: the conversation up to the (first) answer.
      more_turns: what the user says after each answer (MT-Bench's further turns).
      expected: the right answer, if the row has one (the first of several).
      row: as it is in the file, for the scorers.
    """

    index: int
    source: str
    messages: list[Message]
    more_turns: tuple[str, ...]
    expected: str | None
    row: Mapping[str, Any]

    @property
    def instruction(self) -> str:
        """The question in one text: the user's message, or all messages with their roles."""
        if len(self.messages) == 1:
            return str(self.messages[0]["content"])
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


def read(paths: Sequence[str], *, limit: int | None = None, system: str = "") -> list[Item]:
    """All rows of some files (or any source a config takes).

    Args:
      limit: rows of each file, at most.
      system: put in front of conversations that have no system message.

    Raises:
      DataError: a row asks nothing, or there is no row.
    """
    items: list[Item] = []
    for path in paths:
        source = open_source({"path": path})
        for number in range(len(source) if limit is None else min(limit, len(source))):
            row = source[number]
            try:
                messages, more, expected = _parts(row)
            except DataError as error:
                raise DataError(f"{source.location(number)}: {error}") from None
            if system and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": system}, *messages]
            name = row.get("source")
            name = name if isinstance(name, str) and name else os.path.basename(path)
            items.append(Item(len(items), name, messages, more, expected, row))
    if not items:
        raise DataError(f"{', '.join(paths)}: no row to answer")
    return items


def _parts(row: Any) -> tuple[list[Message], tuple[str, ...], str | None]:
    if not isinstance(row, Mapping):
        raise DataError("the row is not an object with fields")
    turns = row.get("turns")
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
        return [{"role": "user", "content": turns[0]}], tuple(turns[1:]), None
    expected = find_expected(row)
    expected = expected[0] if isinstance(expected, list) else expected
    try:
        return messages_of(row), (), expected
    except DataError:
        found = next(_conversations(row), None)
        if found is None:
            raise
        return messages_of({"messages": found}), (), expected or find_expected({"messages": found})


def _conversations(row: Mapping[str, Any]) -> Iterator[list[Message]]:
    """Formats of training data that only its parser knows (ShareGPT, User/Assistant)."""
    try:
        for example in formats.parse(row):
            if isinstance(example, Conversation):
                yield list(example.messages)
    except RowError:
        return
