"""Lists of turns, in whatever words they are written, as messages; and trees of replies as conversations.

{"role": "user", "content": "q"}    {"from": "human", "value": "q"}    {"speaker": "User", "text": "q"}   one message
{"human": "q", "assistant": "a"}    {"input": "q", "output": "a"}                                         two
"q", "a", "q", "a"                                                                                        by turns
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping, Sequence

from sftjax.data import values
from sftjax.data.conversations import ROLES, Conversation, conversation, tools_of
from sftjax.data.types import RowError

COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns", "utterances", "data")
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
_SYSTEM, _ROLES = frozenset(SYSTEM_COLUMNS), frozenset(ROLES)
_role = operator.itemgetter("role")
_WHO, _WHAT = ("role", "from", "speaker"), ("content", "value", "text")
_CALLS = ("function_call", "tool_call", "tool_calls")  # as a speaker: the assistant calls a tool
_PAIRS = (
    ("human", "assistant"),
    ("user", "assistant"),
    ("input", "output"),
    ("question", "answer"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
)
_TRANSCRIPT = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):[ \n]?")


def messages(row) -> Iterator[Conversation]:
    """OpenAI's format."""
    yield with_system(row, read(values.list_of(row, "messages"), "message"))


def sharegpt(row) -> Iterator[Conversation]:
    """A list of turns under any of its usual names."""
    key = next((name for name in COLUMNS[1:] if name in row), COLUMNS[1])
    yield with_system(row, read(values.list_of(row, key), "turn"))


def read(turns: Sequence, what: str) -> list[Mapping]:
    """Turns as messages: `role` and `content`, and whatever else a turn has."""
    try:
        if _ROLES.issuperset(map(_role, turns)):  # nearly all rows
            return turns
    except (KeyError, TypeError):
        pass
    if turns and isinstance(turns[0], str):
        if not all(isinstance(turn, str) for turn in turns):
            raise RowError("wrong_type", "the turns are texts and objects mixed")
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    found: list[Mapping] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, (dict, Mapping)):  # dict first: asking an abstract class takes ten times as long
            raise RowError("wrong_type", f"{what} {number} is {values.kind(turn)}, not an object with role and content")
        if turn.get("role") in ROLES:
            found.append(turn)
        else:
            found += _renamed(turn, f"{what} {number}")
    return found


def _renamed(turn: Mapping, place: str) -> list[dict]:
    who = next((key for key in _WHO if key in turn), None)
    if who is None:
        pair = next((pair for pair in _PAIRS if turn.keys() >= set(pair)), None)
        return [dict(turn)] if pair is None else _pair(turn, *pair)
    what = next((key for key in _WHAT if key in turn), "content")
    rest = {key: value for key, value in turn.items() if key not in (who, what)}
    if turn[who] in _CALLS:
        call = values.decoded(turn.get(what), f"{place}: the tool call")
        return [{"role": "assistant", "tool_calls": call if isinstance(call, list) else [call], **rest}]
    return [{"role": turn[who], "content": turn.get(what), **rest}]


def _pair(turn: Mapping, question: str, answer: str) -> list[dict]:
    rest = {key: value for key, value in turn.items() if key not in (question, answer, "system")}
    system = [{"role": "system", "content": turn["system"]}] if turn.get("system") else []
    asked = [{"role": "user", "content": turn[question]}] if turn[question] not in ("", None) else []
    return [*system, *asked, {"role": "assistant", "content": turn[answer], **rest}]


def with_system(row, messages: list[Mapping]) -> Conversation:
    """The messages of a row with its tools and, where they have none of their own, its system text in front."""
    system = None
    if not _SYSTEM.isdisjoint(row):
        system = next((row[key] for key in SYSTEM_COLUMNS if row.get(key)), None)
    if system and (not messages or messages[0].get("role") not in ("system", "developer")):
        messages = [{"role": "system", "content": system}, *messages]
    return conversation(messages, tools_of(row), row)


def transcript(text: str) -> list[dict[str, str]] | None:
    """Turns of "\\n\\nHuman: ...\\n\\nAssistant: ..." as messages; None for another text."""
    parts = _TRANSCRIPT.split(text)
    if len(parts) < 5 or parts[0].strip() or parts[1] != "Human":
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def user_assistant(row) -> Iterator[Conversation]:
    """User and Assistant, texts or lists of equal length; Template is the system text."""
    sides = [_texts(row, key) for key in ("User", "Assistant")]
    if len(sides[0]) != len(sides[1]):
        raise RowError("unequal_turns", f"User has {len(sides[0])} turns and Assistant {len(sides[1])}")
    turns = [text for pair in zip(*sides, strict=True) for text in pair]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    yield with_system({**row, "system": row.get("Template")}, messages)


def _texts(row, key: str) -> Sequence:
    value = row.get(key)
    if isinstance(value, str):
        try:
            decoded = values.decoded(value, key) if value.lstrip().startswith("[") else None
        except RowError:  # text that begins with a bracket
            decoded = None
        value = decoded if isinstance(decoded, list) else [value]
    if not isinstance(value, (list, tuple)):
        raise RowError("wrong_type", f"{key} is {values.kind(value)}, not text or a list of texts")
    return value


# --- trees -------------------------------------------------------------------------------------------------------


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
        role = roles.get(str(node.get("role")))
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
