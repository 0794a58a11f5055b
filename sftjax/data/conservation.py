"""Nothing of a row vanishes: each part of a conversation is in the text where it belongs, or its loss has a name.

    part                                  where it has to be              lost: what it is called
    content of a trained answer           in the trained stretch          answer        the row is refused ...
    its thought                           in the trained stretch          reasoning     ... unless data.allow_lost
    its calls: names, arguments           in the trained stretch          tool_call     names the part
    calls of other answers                between their neighbours        tool_call     counted, and refused above
    system and developer texts            outside of trained stretches    system        data.max_lost_fraction of
    results of tools                      between their neighbours        tool_result   the rows, by the preflight
    what users say; other answers         between their neighbours        user; answer
    names of tools on offer               outside of trained stretches    tools         noted
    thoughts of other answers             anywhere before                 (history_reasoning, by design: noted)

Texts are compared as they are, then with blanks and JSON's escapes set aside. Where a template writes arguments or
schemas anew, a marker word takes their place for one more rendering, which shows whether they are written at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sftjax.data import thoughts
from sftjax.data.boundaries import Turn, holds
from sftjax.data.types import RowError

PARTS = ("answer", "reasoning", "tool_call", "system", "user", "tool_result", "tools")
COUNTED = ("answer", "tool_call", "system", "user", "tool_result")  # refused above data.max_lost_fraction
HISTORY = "history_reasoning"
_SHORT = 12  # characters; shorter texts may stand in what a template writes by itself
_MARKER = "Qz7vK"

# (messages, tools) -> the text that the template writes for them; raises what templates raise
Rerender = Callable[[Sequence[Mapping[str, Any]], Any], str]


class Lost(NamedTuple):
    """A part that isn't in the text: its kind, and a line for a person."""

    kind: str
    detail: str

    @property
    def flag(self) -> str:
        """Its name in the ledger."""
        return self.kind if self.kind == HISTORY else f"lost_{self.kind}"


class Stretch(NamedTuple):
    """Characters of a text."""

    begin: int
    end: int


def plainly_there(text: str, turns: Mapping[int, Turn], messages: Sequence[Mapping], literals: str) -> bool:
    """Whether the messages are texts that stand in the sample one behind the other, each where it belongs."""
    at = 0
    for k, message in enumerate(messages):
        words = message.get("content")
        if len(message) > 2 or type(words) is not str:
            return False
        words, span = words.strip(), turns.get(k)
        if span is not None:
            if at > span.begin or text.find(words, span.begin, span.end) < 0:
                return False
            at = span.end
        elif words:
            place = text.find(words, at)
            if place < 0 or (len(words) <= _SHORT and words in literals):
                return False
            at = place + len(words)
    return True


def check(
    text: str,
    spans: Mapping[int, Stretch],
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    *,
    literals: str,
    rerender: Rerender,
    allow: Collection[str] = (),
) -> list[Lost]:
    """Parts of a conversation that a sample lacks, those of trained answers only where they are allowed to.

    Args:
      text: the sample's, control tokens of the data hidden.
      spans: number of each message trained in it -> where it stands.
      messages: those that the sample is made of, control tokens hidden.
      tools: schemas, or None.
      literals: what the template can write by itself.
      rerender: gives the text anew for other messages.
      allow: kinds of parts that may be lost of trained answers.

    Raises:
      RowError: lost_answer, lost_reasoning, lost_tool_call.
    """
    lost, before = [], _Before()
    for k, within in _stretches(text, spans, len(messages)):
        message = messages[k]
        if k in spans:
            found = list(_lost_of_answer(text, within, messages, k, tools, rerender))
            for part in found:
                if part.kind not in allow:
                    raise RowError(
                        f"lost_{part.kind}",
                        f"{part.detail}, which is to be trained: use another model.chat_template, or set "
                        f"data.allow_lost=('{part.kind}',) to train the rest",
                    )
            _refuse_empty(text, within, message, k, found)
            lost += found
        else:
            lost += _lost_of_prompt(text, within, messages, k, tools, spans, literals, rerender, before)
    if tools:
        lost += _lost_tools(text, spans, messages, tools, rerender)
    return lost


def _stretches(text: str, spans: Mapping[int, Stretch], count: int) -> Iterator[tuple[int, Stretch]]:
    """Where each message may stand: a trained one in its span, the others between the spans around them."""
    trained = sorted(k for k in spans if k < count)
    begin, following = 0, 0
    for k in range(count):
        if k in spans:
            yield k, spans[k]
            begin, following = spans[k].end, following + 1
        else:
            end = spans[trained[following]].begin if following < len(trained) else len(text)
            yield k, Stretch(begin, end)


# --- trained answers ---------------------------------------------------------------------------------------------


def _lost_of_answer(text, within, messages, k, tools, rerender) -> Iterator[Lost]:
    message = messages[k]
    content = thoughts.content_of(message)
    if content and text.find(content, *within) < 0 and not holds(text, content, *within):
        thought, answer = thoughts.split({"content": content})
        if thought and not holds(text, thought, *within):
            yield Lost("reasoning", f"message {k}: the template leaves out the thought {_excerpt(thought)}")
        if answer and not holds(text, answer, *within):
            yield Lost("answer", f"message {k}: the template leaves out or rewrites {_excerpt(answer)}")
    thought = message.get("reasoning_content")
    if isinstance(thought, str) and thought.strip() and not holds(text, thought, *within):
        yield Lost("reasoning", f"message {k}: the template leaves out the thought {_excerpt(thought)}")
    if message.get("tool_calls"):
        yield from _lost_calls(text, within, messages, k, tools, rerender)


def _refuse_empty(text, within, message, k, found) -> None:
    """Never trains an end mark alone where the row had more to say."""
    if found and all(part.kind in ("tool_call", "reasoning") for part in found):
        answer = thoughts.split(message)[1]
        kinds = {part.kind for part in found}
        rest = answer or ("reasoning" not in kinds and thoughts.split(message)[0])
        if not rest and not ("tool_call" not in kinds and message.get("tool_calls")):
            raise RowError(
                f"lost_{found[0].kind}", f"{found[0].detail}, and nothing else of the message would be trained"
            )


# --- calls -------------------------------------------------------------------------------------------------------


def _lost_calls(text, within, messages, k, tools, rerender) -> list[Lost]:
    """Calls of one message whose name, or an argument's name or value, is not written."""
    missing, lost = [], []
    for i, call in enumerate(messages[k]["tool_calls"]):
        for path, leaf in _leaves(_named(call)):
            if not _written(text, leaf, within):
                missing.append((i, path, leaf))
    if not missing:
        return []
    shown = _marked_leaves(messages, k, tools, missing, rerender)
    for i, path, leaf in missing:
        if (i, path) not in shown:
            name = _named(messages[k]["tool_calls"][i]).get("name")
            what = "the call" if path == ("name",) else f"{_excerpt(str(leaf))} of the call"
            lost.append(Lost("tool_call", f"message {k}: the template leaves out {what} of {name!r}"))
    return lost[:1]


def _named(call) -> Mapping[str, Any]:
    """A call's name and arguments: what a model writes of it."""
    inner = call.get("function", call) if isinstance(call, Mapping) else {}
    return {key: inner[key] for key in ("name", "arguments", "parameters") if key in inner}


def _leaves(value, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Each text, number and flag with its path, and each key below the second level as its own."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if path:
                yield (*path, key, None), key
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, (*path, number))
    elif value is not None and value != "":
        yield path, value


def _written(text: str, leaf, within: Stretch) -> bool:
    return any(text.find(form, *within) >= 0 for form in _forms(leaf)) or (
        isinstance(leaf, str) and holds(text, leaf, *within)
    )


def _forms(leaf) -> list[str]:
    """How a text, a number or a flag may be written."""
    if not isinstance(leaf, str):
        return [json.dumps(leaf), str(leaf)]
    once = json.dumps(leaf, ensure_ascii=False)[1:-1]
    twice = json.dumps(once, ensure_ascii=False)[1:-1]
    return list(dict.fromkeys([leaf, once, json.dumps(leaf)[1:-1], twice, repr(leaf)[1:-1]]))


def _marked_leaves(messages, k, tools, missing, rerender) -> set[tuple[int, tuple]]:
    """Those of the missing leaves whose place the template writes: a marker put there is in the text."""
    calls = json.loads(json.dumps(messages[k]["tool_calls"], default=str))
    for number, (i, path, _) in enumerate(missing):
        target = calls[i].get("function", calls[i])
        if path[-1] is None or not path:
            continue
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = f"{_MARKER}{number}x"
    changed = [*messages[:k], {**messages[k], "tool_calls": calls}, *messages[k + 1 :]]
    text = _try(rerender, changed, tools)
    return {(i, path) for n, (i, path, _) in enumerate(missing) if f"{_MARKER}{n}x" in text}


def _try(rerender, messages, tools) -> str:
    try:
        return rerender(messages, tools)
    except ValueError:  # the template refuses the markers (TemplateError is one)
        return ""


# --- prompts -----------------------------------------------------------------------------------------------------


_KINDS = {"system": "system", "developer": "system", "tool": "tool_result", "assistant": "answer"}


class _Before:
    """Texts met in the stretch between two trained answers: what is said twice has to be there twice."""

    def __init__(self):
        self.within, self.texts = None, []

    def times(self, within: Stretch, words: str) -> int:
        if within != self.within:
            self.within, self.texts = within, []
        count = 1 + sum(words in other for other in self.texts)
        self.texts.append(words)
        return count


def _lost_of_prompt(text, within, messages, k, tools, spans, literals, rerender, before) -> list[Lost]:
    message, lost = messages[k], []
    role = message["role"]
    kind = _KINDS.get(role, "user")
    thought, answer = thoughts.split(message) if role == "assistant" else ("", thoughts.content_of(message).strip())
    times = before.times(within, answer) if answer else 0
    if answer and not (
        _in_prompt(text, answer, within, kind, spans) and (times == 1 or not 0 < text.count(answer, *within) < times)
    ):
        lost.append(Lost(kind, f"message {k} ({role}): the template leaves out {_excerpt(answer)}"))
    elif 0 < len(answer) <= _SHORT and answer in literals:
        changed = [*messages[:k], {**message, "content": _MARKER}, *messages[k + 1 :]]
        if _MARKER not in _try(rerender, changed, tools):
            lost.append(Lost(kind, f"message {k} ({role}): the template leaves out {_excerpt(answer)}"))
    if thought and not holds(text, thought, *within):
        lost.append(Lost(HISTORY, f"message {k}: the template leaves out the thought of an earlier turn"))
    if message.get("tool_calls"):
        until = _next_content(text, within, messages, k)
        lost += _lost_calls(text, Stretch(within.begin, until), messages, k, tools, rerender)
    return lost


def _in_prompt(text: str, words: str, within: Stretch, kind: str, spans: Mapping[int, Stretch]) -> bool:
    if holds(text, words, *within):
        return True
    if kind == "tool_result" and any(text.find(form, *within) >= 0 for form in _forms(words.strip())):
        return True
    if kind != "system":
        return False
    return any(holds(text, words, *gap) for gap in _gaps(text, spans))  # some templates move it


def _gaps(text: str, spans: Mapping[int, Stretch]) -> Iterator[Stretch]:
    begin = 0
    for span in sorted(spans.values()):
        yield Stretch(begin, span.begin)
        begin = span.end
    yield Stretch(begin, len(text))


def _next_content(text: str, within: Stretch, messages, k: int) -> int:
    """Where the message behind k begins in the stretch, so far as its content tells."""
    content = thoughts.content_of(messages[k + 1]).strip() if k + 1 < len(messages) else ""
    if len(content) <= _SHORT:
        return within.end
    place = text.rfind(content, *within)
    return place if place >= 0 else within.end


def _lost_tools(text, spans, messages, tools, rerender) -> list[Lost]:
    """Tools on offer that the prompt doesn't name."""
    first = min((span.begin for span in spans.values()), default=len(text))
    names = [name for tool in tools if (name := _tool_name(tool))]
    called = {_named(call).get("name") for message in messages for call in message.get("tool_calls") or ()}
    top = min((place for message in messages if (place := _place(text, message)) >= 0), default=first)
    missing = [name for name in names if text.find(name, 0, top if name in called else first) < 0]
    if not missing:
        return []
    marked = [_renamed(tool, f"{_MARKER}{number}x") for number, tool in enumerate(tools)]
    shown = _try(rerender, messages, marked)
    lost = [name for i, tool in enumerate(tools) if (name := _tool_name(tool)) and f"{_MARKER}{i}x" not in shown]
    return [Lost("tools", f"the template leaves out the tool {lost[0]!r}")] if lost else []


def _place(text: str, message) -> int:
    content = thoughts.content_of(message).strip() if message["role"] in ("user", "assistant") else ""
    return text.find(content) if len(content) > _SHORT else -1


def _tool_name(tool) -> str | None:
    name = tool.get("function", tool).get("name") if isinstance(tool.get("function", tool), Mapping) else None
    return name if isinstance(name, str) and name else None


def _renamed(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": {**tool["function"], "name": name}}
    return {**tool, "name": name}


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 40 else text[:37] + "...")
