"""Thoughts in messages, and generation prompts that open or close one.

    prompt of generation     <assistant><think>\\n |                        the prompt opens a thought ...
    answer as written later  <assistant>Paris<end>                         ... of which the history keeps nothing
    what the model writes                         | T\\n</think>\\n\\nParis<end>

So what is to be learnt isn't in any rendering of such a template: it is the prompt and what has to be written from
there. A message without a thought has nothing to write there; that is the caller's to settle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel>thought", "<channel|>"),
)
_SIGNS = ("</", "[/", "|>")  # one of them is in each closing mark
SWITCHES = ("enable_thinking", "thinking")  # variables by which templates turn thoughts on and off
KEYS = ("reasoning_content", "thinking", "reasoning")  # of a message, as templates name them


def content_of(message: Mapping[str, Any]) -> str:
    """A message's content as one text; "" without."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part.get("text"), str))
    return content if isinstance(content, str) else ""


def may_have(message: Mapping[str, Any]) -> bool:
    """A quick look; False means that `split` finds no thought."""
    if "reasoning_content" in message:
        return True
    content = message.get("content")
    if isinstance(content, str) and not any(map(content.__contains__, _SIGNS)):
        return False
    return not isinstance(content, str) or any(closing in content for _, closing in MARKS)


def split(message: Mapping[str, Any]) -> tuple[str, str]:
    """(thought, answer) of a message, both stripped: from a key of its own, or from marks in front of the answer."""
    content = content_of(message)
    kept = message.get("reasoning_content")
    if isinstance(kept, str) and kept.strip():
        return kept.strip(), content.strip()
    for opening, closing in MARKS:
        thought, mark, answer = content.partition(closing)
        if mark and opening not in answer:
            before, _, inside = thought.rpartition(opening)
            if not before.strip() and (opening in thought or inside.strip()):
                return inside.strip(), answer.strip()
    return "", content.strip()


def without(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its answer only."""
    return {key: value for key, value in message.items() if key not in KEYS} | {"content": split(message)[1]}


class Opened(NamedTuple):
    """A prompt's end: what stands before the thought, its marks, and whether the prompt closes it again."""

    before: str
    opening: str
    closing: str
    closed: bool
    newline: str  # "\n" where the marks stand on lines of their own


def opened(head: str) -> Opened | None:
    """The thought that a generation prompt opens at its end, if it does."""
    end = head.rstrip()
    for opening, closing in MARKS:
        inside = end.removesuffix(closing).rstrip()
        if inside.endswith(opening):
            newline = "\n" if "\n" in head[len(inside) :] else ""
            return Opened(inside.removesuffix(opening), opening, closing, len(inside) < len(end), newline)
    return None


def continued(
    head: str,
    alone: str,
    thought: str,
    *,
    answer_only: Callable[[], str],
    close: bool,
) -> str | None:
    """The text that begins with a prompt whose thought the rendering of the answer doesn't begin with.

    Args:
      head: the generation prompt in front of the answer, with all before it.
      alone: the rendering up to the answer.
      thought: the message's, "" without.
      answer_only: gives the rendering up to the answer without its thought.
      close: whether a thought that the message lacks is closed at once.

    Returns None where the two don't fit, or nothing says what stands in the thought.
    """
    found = opened(head)
    if found is None or not alone.startswith(found.before):
        return None
    rest, newline = alone[len(found.before) :], found.newline
    if found.closed:  # the prompt says that nothing is thought
        if rest.startswith(found.opening):
            rest = rest.partition(found.closing)[2].lstrip("\n")
        return None if thought else head + rest
    if rest.startswith(found.opening):
        body = rest.removeprefix(found.opening)
        return head + (body.lstrip("\n") if newline else body)
    if rest.lstrip().startswith(found.closing):  # the template closes what it didn't open
        return head + (thought + newline + rest.lstrip() if thought else rest)
    if not thought and not close:
        return None
    if thought:
        plain = answer_only()
        if not plain.startswith(found.before):
            return None
        rest = plain[len(found.before) :]
    return head + thought + newline + found.closing + 2 * newline + rest.lstrip("\n")
