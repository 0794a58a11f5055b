"""Rows whose columns are a question and an answer, under any of their usual names, as conversations.

A side may be a text, a message, or a list of messages; an answer that brings its question along is the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sftjax.data import turns, values
from sftjax.data.conversations import REASONING, Conversation, role_of
from sftjax.data.types import RowError

# Of several, the first counts: a column "input" beside "instruction" is what the instruction is about.
QUESTIONS = ("instruction", "question", "query", "prompt", "problem", "inputs", "input", "user", "human")
ANSWERS = (
    *("output", "response", "answer", "completion", "solution", "outputs", "targets", "target", "assistant", "gpt"),
)
EXTRAS = ("input", "context")
_FURTHER = frozenset(("history", *REASONING))
_ARGUMENT_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "dict": "object",
}


def pair(questions: Sequence[str], answers: Sequence[str], extras: Sequence[str] = EXTRAS):
    """A parser for rows with one of the `questions`, one of the `answers`, and what the question is about."""

    def parser(row) -> Iterator[Conversation]:
        question = first_of(row, questions)
        answer = first_of(row, [name for name in answers if name != question])
        if _is_plain(row, question, answer, extras):
            said = (("user", row[question]), ("assistant", row[answer]))
            yield turns.with_system(row, [{"role": role, "content": text} for role, text in said])
            return
        asked = _side(row, question, "user")
        for extra in extras:
            more = row.get(extra)
            if extra in (question, answer) or more in (None, "", []):
                continue
            if not isinstance(more, str) or not isinstance(asked[-1].get("content"), str):
                raise RowError("wrong_type", f"{extra} is {values.kind(more)}, and not text to stand behind {question}")
            if more.strip():
                asked[-1] = {**asked[-1], "content": f"{asked[-1]['content']}\n\n{more}"}
        yield _joined(row, asked, _side(row, answer, "assistant"))

    return parser


def _is_plain(row: Mapping, question: str, answer: str, extras: Sequence[str]) -> bool:
    """Two texts and nothing else that would be read: most rows."""
    return (
        type(row.get(question)) is str
        and type(row.get(answer)) is str
        and _FURTHER.isdisjoint(row)
        and not any(row.get(extra) for extra in extras if extra not in (question, answer))
    )


def first_of(row: Mapping, names: Sequence[str]) -> str:
    """The first of some columns that a row has (the first of all where it has none)."""
    for name in names:
        if row.get(name) is not None:
            return name
    return next((name for name in names if name in row), names[0])


def _side(row: Mapping, key: str, role: str) -> list[Mapping]:
    value = row.get(key)
    if isinstance(value, Mapping):
        return turns.read([value], key)
    if value == []:
        raise RowError("empty_conversation", f"{key} is an empty list")
    if isinstance(value, (list, tuple)) and all(isinstance(item, Mapping) for item in value):
        return turns.read(value, key)
    return [{"role": role, "content": values.text_of(row, key)}]


def _history(row) -> list[dict]:
    found: list[dict] = []
    history = values.decoded(row.get("history") or [], "history")
    for said in history if isinstance(history, list) else [history]:
        if not isinstance(said, (list, tuple)) or len(said) != 2:
            raise RowError("wrong_type", "history is not a list of [question, answer] pairs")
        found += [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]
    return found


def _joined(row, asked: list[Mapping], answer: list[Mapping]) -> Conversation:
    """Prompt and answer as one; answers that stand in the prompt aren't trained."""
    thoughts = next((row[key] for key in REASONING if isinstance(row.get(key), str) and row[key].strip()), None)
    if thoughts and answer and not any(key in answer[-1] for key in REASONING):
        answer = [*answer[:-1], {**answer[-1], "reasoning_content": thoughts}]
    history = _history(row)
    if answer and role_of(answer[0].get("role")) not in ("assistant", "tool"):  # the answer brings its question along
        messages, begin, end = answer, 0, len(asked) if answer[: len(asked)] == asked else 0
    else:
        messages, begin, end = [*history, *asked, *answer], len(history), len(history) + len(asked)
    found = turns.with_system(row, messages)
    in_front = len(found.messages) - len(messages)  # a system text
    weights = [0.0 if begin <= i - in_front < end else weight for i, weight in enumerate(found.weights)]
    return replace(found, weights=weights)


def prompt_and_messages(row) -> Iterator[Conversation]:
    """A prompt and a completion of which at least one is a list of messages."""
    sides = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.get(key)
        if isinstance(value, str):
            value = values.decoded(value, key)
        sides.append(_side({key: value}, key, role))
    yield _joined(row, *sides)


def preference(row) -> Iterator[Conversation]:
    """The chosen one of two answers: a text behind a prompt, a list of messages, or a transcript."""
    chosen = row.get("chosen")
    prompt = next((name for name in QUESTIONS if row.get(name) not in (None, "", [])), None)
    if isinstance(chosen, str) and (told := turns.transcript(chosen)):
        yield turns.with_system(row, told)
        return
    if prompt is None and isinstance(chosen, str):
        raise RowError(
            "no_prompt", "chosen is a text and there is no prompt: name its column, as fields={'prompt': ...}"
        )
    yield _joined(row, _side(row, prompt, "user") if prompt else [], _side(row, "chosen", "assistant"))


def tool_query(row) -> Iterator[Conversation]:
    """xLAM: a query, tools, and the calls that answer it as JSON text."""
    calls = values.list_of(row, "answers")
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise RowError("wrong_type", "answers is not a list of calls with name and arguments")
    if not calls:
        raise RowError("empty_answer", "answers holds no call")
    tools = [_schema(tool) for tool in values.list_of(row, "tools")]
    answer = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": c} for c in calls]}
    yield turns.with_system({**row, "tools": tools}, [*_side(row, "query", "user"), answer])


def _schema(tool) -> Any:
    """xLAM's {"name", "parameters": {argument: {"type": "str, optional", ...}}} as the JSON schema of a function."""
    if not isinstance(tool, Mapping) or "function" in tool:
        return tool
    parameters = tool.get("parameters")
    if isinstance(parameters, Mapping) and not ("type" in parameters and "properties" in parameters):
        described = all(isinstance(argument, Mapping) for argument in parameters.values())
        if described:
            properties = {name: _argument(argument) for name, argument in parameters.items()}
            needed = [n for n, a in parameters.items() if "default" not in a and "optional" not in str(a.get("type"))]
            parameters = {"type": "object", "properties": properties, "required": needed}
    return {"type": "function", "function": {**tool, "parameters": parameters or {"type": "object", "properties": {}}}}


def _argument(argument: Mapping) -> dict[str, Any]:
    kind = str(argument.get("type", "")).removesuffix(", optional").strip()
    return {**argument, "type": _ARGUMENT_TYPES[kind]} if kind in _ARGUMENT_TYPES else dict(argument)
