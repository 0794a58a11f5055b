"""Renders chat templates: in a sandbox, within limits, and in pieces where that is provably the same.

Finding where each answer starts needs the rendering of every prefix of the conversation. For most templates there is a
cheaper way that is just as sure: when the syntax tree shows that the template is a loop over the messages which never
looks ahead, rendering only ever *appends*, so one rendering with marks between the messages holds all the prefixes:

    {{ bos }} | <user>Hi | <assistant>Hello | ...     prefix 1 = bos + piece 0;  prefix 2 = prefix 1 + piece 1; ...

What stands behind the loop (a generation prompt, or an end mark where none is asked for) depends on nothing but that.

`append_only_loop` is that proof; it is conservative, and a template it can't prove is rendered prefix by prefix.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes

from sftjax.data import sandbox
from sftjax.data.sandbox import MAX_TEMPLATE_CHARS, TemplateError, TemplateLimit
from sftjax.data.thoughts import SWITCHES

MARK = "\U0010fffd"  # stands between two messages in a rendering by pieces; a row that contains it takes the other way
_MAX_PROMPTS = 256  # generation prompts kept, one for each set of variables that rows bring along


# --- the proof ---------------------------------------------------------------------------------------------------


_LOOP_BACKWARD = frozenset({"index", "index0", "first", "previtem", "depth", "depth0", "cycle", "changed"})
_OPAQUE = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block)
_CONTROL = tuple(cls for cls in (getattr(nodes, "Break", None), getattr(nodes, "Continue", None)) if cls)


def append_only_loop(tree: nodes.Template) -> nodes.For | None:
    """The loop over the messages, if the template provably only appends: rendering a conversation's first k messages
    gives a prefix of rendering more of them, up to the generation prompt at the very end.

    That holds when (1) everything before the loop looks at no message but the first, (2) the body of the loop sees the
    current message, earlier ones through `loop.previtem`, the first one, and state built by earlier rounds, but
    nothing of what comes (no `loop.last`, no `messages[i + 1]`, no `messages | length`), and not
    `add_generation_prompt`, and (3) behind the loop stands only what depends on constants and `add_generation_prompt`.
    """
    lists = {"messages"}
    body = list(tree.body)
    position = next((i for i, node in enumerate(body) if _loops_over(node, lists, grow=body)), None)
    if position is None or any(True for kind in (*_OPAQUE, *_CONTROL) for _ in tree.find_all(kind)):
        return None
    before, loop, behind = body[:position], body[position], body[position + 1 :]
    if loop.test is not None or loop.recursive or loop.else_ or not isinstance(loop.target, nodes.Name):
        return None
    if not all(_blind(node, lists, loop=None) for node in before):
        return None
    if not all(_blind(node, lists, loop="outer") for node in loop.body):
        return None
    assigned = {node.name for node in tree.find_all(nodes.Name) if node.ctx in ("store", "param")} | lists | {"tools"}
    assigned -= _settled(before, [loop, *behind], assigned)
    for node in behind:
        names = {name.name for name in node.find_all(nodes.Name)}
        if names & assigned or any(True for _ in node.find_all(nodes.For)):
            return None
    return loop


def _settled(before: Sequence[nodes.Node], later: Sequence[nodes.Node], assigned: set[str]) -> set[str]:
    """Names given their value in front of the loop only, from what no message decides: settings with a default."""
    again = {name.name for node in later for name in node.find_all(nodes.Name) if name.ctx != "load"}
    again |= {ref.name for node in [*before, *later] for ref in node.find_all(nodes.NSRef)}
    settled: set[str] = set()
    for node in before:
        names = list(node.find_all(nodes.Name))
        stored = {name.name for name in names if name.ctx != "load"}
        if isinstance(node, nodes.Assign | nodes.If) and not {name.name for name in names} & (assigned - stored):
            settled |= stored
        else:
            again |= stored
    return settled - again


def _loops_over(node: nodes.Node, lists: set[str], grow: Sequence[nodes.Node]) -> bool:
    """Is `node` the first loop over the messages? Names that tails of the list are given join `lists` on the way."""
    if isinstance(node, nodes.For):
        return (isinstance(node.iter, nodes.Name) and node.iter.name in lists) or _is_tail(node.iter, lists)
    for assign in [node] if isinstance(node, nodes.Assign) else node.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and (
            (isinstance(assign.node, nodes.Name) and assign.node.name in lists) or _is_tail(assign.node, lists)
        ):
            lists.add(assign.target.name)
    return False


def _is_tail(node: nodes.Node, lists: set[str]) -> bool:
    """`messages[1:]`"""
    return (
        isinstance(node, nodes.Getitem)
        and isinstance(node.node, nodes.Name)
        and node.node.name in lists
        and isinstance(node.arg, nodes.Slice)
        and isinstance(node.arg.start, nodes.Const)
        and node.arg.stop is None
        and node.arg.step is None
        and isinstance(node.arg.start.value, int)
        and node.arg.start.value >= 0
    )


def _blind(node: nodes.Node, lists: set[str], loop: str | None) -> bool:
    """No part of `node` sees a later message, how many there are, or whether a generation prompt is asked for."""
    if isinstance(node, nodes.Getitem) and isinstance(node.node, nodes.Name) and node.node.name in lists:
        first = isinstance(node.arg, nodes.Const) and node.arg.value == 0
        return first or (loop is None and _is_tail(node, lists))
    if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name) and node.target.name in lists:
        tail = (isinstance(node.node, nodes.Name) and node.node.name in lists) or _is_tail(node.node, lists)
        return loop is None and tail  # inside the loop a list of messages must not change
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name) and node.node.name == "loop":
        return loop != "outer" or node.attr in _LOOP_BACKWARD
    if isinstance(node, nodes.Name):
        if node.name == "add_generation_prompt" or node.name in lists:
            return False
        return not (node.name == "loop" and loop == "outer")
    if isinstance(node, nodes.For):  # a loop of its own inside, whose `loop` is another
        inner = "inner" if loop == "outer" else loop
        outside = [child for child in (node.iter, node.test) if child is not None]
        inside = [*node.body, *node.else_, node.target]
        return all(_blind(child, lists, loop) for child in outside) and all(_blind(c, lists, inner) for c in inside)
    return all(_blind(child, lists, loop) for child in node.iter_child_nodes())


# --- rendering ---------------------------------------------------------------------------------------------------


class Pieces(NamedTuple):
    """One rendering with the places between messages.

    `text` is the whole; `ends[i]` is where message i's part ends; `first` is the number of messages in front that have
    no part of their own (a system message the template reads as `messages[0]` and then skips). The rendering of the
    first messages up to one that ends at e is `text[:e] + tail`, and with generation prompt `text[:e] + prompt`.
    """

    text: str
    begin: int
    ends: tuple[int, ...]
    first: int
    tail: str
    prompt: str


class Renderer:
    """One compiled template. Picklable: it is compiled again on arrival.

    Attributes:
      source, special_tokens: its text, and the tokens that it knows by name.
      switches: variables that turn thoughts on and off, where the template reads them and nobody has set them.
      literals: all text that it can write by itself.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any], fixed: Collection[str] = ()):
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateLimit(f"the template has {len(source):,} characters (limit {MAX_TEMPLATE_CHARS:,})")
        self.source = source
        self.special_tokens = dict(special_tokens)
        self.fixed = tuple(fixed)
        self._compile()

    def _compile(self) -> None:
        self._prompts: dict[str, str] = {}
        environment = sandbox.make_environment()
        try:
            tree = environment.parse(self.source)
            read = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
            self.switches = tuple(name for name in SWITCHES if name in read and name not in self.fixed)
            self.literals = literals(tree)
            self._template = sandbox.compile_tree(environment, tree)
            tree = environment.parse(self.source)
            loop = append_only_loop(tree)
            self._marked = None
            if loop is not None:
                mark = nodes.Output([nodes.TemplateData(MARK)]).set_lineno(loop.lineno)
                loop.body.insert(0, mark)
                behind = tree.body[tree.body.index(loop) + 1 :]
                tree.body.insert(len(tree.body) - len(behind), mark)
                self._marked = sandbox.compile_tree(environment, tree)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"line {error.lineno}: {error.message}") from None
        except (RecursionError, MemoryError, OverflowError, ValueError) as error:
            if isinstance(error, TemplateError):
                raise
            raise TemplateLimit(f"the template can't be compiled: {type(error).__name__}") from None

    def __getstate__(self):
        return {"source": self.source, "special_tokens": self.special_tokens, "fixed": self.fixed}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._compile()

    @property
    def append_only(self) -> bool:
        return self._marked is not None

    def render(self, messages, *, tools=None, generation: bool = False, kwargs: Mapping[str, Any] | None = None) -> str:
        """The text that `apply_chat_template(tokenize=False)` gives. Raises TemplateError."""
        return self._run(self._template, messages, tools, generation, kwargs)

    def pieces(self, messages, *, tools=None, kwargs: Mapping[str, Any] | None = None) -> Pieces | None:
        """The same text (no generation prompt) with the places between messages; None where that isn't proved.

        Nothing that is rendered may hold the mark between messages (`holds_mark`).
        """
        if self._marked is None:
            return None
        parts = self._run(self._marked, messages, tools, False, kwargs).split(MARK)
        first = len(messages) - (len(parts) - 2)
        if not 0 <= first <= 1 or len(parts) < 3:  # the loop saw another list
            return None
        ends, end = [], len(parts[0])
        for part in parts[1:-1]:
            end += len(part)
            ends.append(end)
        prompt = self._prompt(messages, tools, kwargs)
        return Pieces("".join(parts), len(parts[0]), tuple(ends), first, parts[-1], prompt)

    def _prompt(self, messages, tools, kwargs) -> str:
        """What stands behind the loop when a generation prompt is asked for: the same behind any conversation."""
        key = json.dumps(kwargs, sort_keys=True, default=str) if kwargs else ""
        if key not in self._prompts:
            if len(self._prompts) >= _MAX_PROMPTS:
                self._prompts.clear()
            self._prompts[key] = self._run(self._marked, messages, tools, True, kwargs).rpartition(MARK)[2]
        return self._prompts[key]

    def _run(self, template, messages, tools, generation, kwargs) -> str:
        variables = {"documents": None, **self.special_tokens, **(kwargs or {})}
        variables.update(messages=messages, tools=tools, add_generation_prompt=generation)
        return sandbox.run(template, variables)


def literals(tree: nodes.Template) -> str:
    """All text that a template can write by itself (its raw text and string constants), joined by NUL."""
    parts = [node.data for node in tree.find_all(nodes.TemplateData)]
    parts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join(parts)


def holds_mark(value) -> bool:
    """Whether the mark that stands between messages is in a text, or in any text of a structure."""
    if isinstance(value, str):
        return MARK in value
    if isinstance(value, Mapping):
        return any(holds_mark(key) or holds_mark(item) for key, item in value.items())
    return isinstance(value, list | tuple) and any(map(holds_mark, value))


def around_the_answer(renderer: Renderer) -> tuple[str, str]:
    """What a template writes between a question and its answer, and between the answer and the next question.

    Raises:
      TemplateError: it fails on such a conversation.
    """
    said = ("Which?", "Paris", "Sure?")
    roles = ("user", "assistant", "user")
    text = renderer.render([{"role": role, "content": words} for role, words in zip(roles, said, strict=True)])
    question, rest = text.find(said[0]) + len(said[0]), text.rfind(said[2])
    answer = text.find(said[1], question)
    return text[question:answer], text[answer + len(said[1]) : rest]
