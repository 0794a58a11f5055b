"""Renders chat templates: in a sandbox, within limits, and in pieces where that is provably the same.

A template comes with a model and is foreign code, so it runs in Jinja's immutable sandbox (as in transformers) with a
budget on loops, text and arithmetic on top: the sandbox alone lets nested ranges run for ever and `'a' * 2e9` allocate.

Finding where each answer starts needs the rendering of every prefix of the conversation. For most templates there is a
cheaper way that is just as sure: when the syntax tree shows that the template is a loop over the messages which never
looks ahead, rendering only ever *appends*, so one rendering with marks between the messages holds all the prefixes:

    {{ bos }} | <user>Hi | <assistant>Hello | ...     prefix 1 = bos + piece 0;  prefix 2 = prefix 1 + piece 1; ...

`append_only_loop` is that proof; it is conservative, and a template it can't prove is rendered prefix by prefix.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE_CHARS = 256 * 1024  # gpt-oss's, the longest in use, has 17 thousand
MAX_LOOP_STEPS = 3_000_000  # per rendering
MAX_SECONDS = 20.0  # per rendering; a backstop, the steps bind first
MAX_REPEAT = 100_000  # length that an operator or method may blow a text up to
MARK = "\U0010fffd"  # stands between two messages in a rendering by pieces; a row that contains it takes the other way
MAX_TEXT = 256 * 2**20  # characters of a rendering, or of a text on the way to it
_BUDGET_FILTER, _JOIN_FILTER = "_sftjax_budget", "_sftjax_join"
_CAN_COMPOUND = (nodes.Assign, nodes.AssignBlock, nodes.Macro, nodes.CallBlock, nodes.With)


class TemplateError(ValueError):
    """The template refuses the conversation, or fails on it; the text is the template's own message."""


class TemplateLimit(TemplateError):
    """The template ran past its limits."""


class _Budget(threading.local):
    steps = MAX_LOOP_STEPS
    deadline = float("inf")


_budget = _Budget()


def _spend(iterable):
    """Charges a loop's length to the budget before the loop runs."""
    if not hasattr(iterable, "__len__"):  # a generator (select, map): lazy, so that it is counted here
        if isinstance(iterable, jinja2.Undefined):
            return iterable
        iterable = list(islice(iterable, _budget.steps + 1))
    _budget.steps -= len(iterable) + 1
    if _budget.steps < 0:
        raise TemplateLimit(f"the template loops for more than {MAX_LOOP_STEPS:,} steps")
    if time.monotonic() > _budget.deadline:
        raise TemplateLimit(f"the template runs for more than {MAX_SECONDS:.0f} s")
    return iterable


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context, operator, left, right):
        if operator == "+":
            _check_sum((left, right))
        if operator == "*" and (size := _sequence_product(left, right)) is not None and size > MAX_REPEAT:
            raise TemplateLimit(f"the template repeats a text to {size:,} characters")
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * max(right, 0)
            if bits > 4096:
                raise TemplateLimit("the template calculates with very large numbers")
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value):
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(str(value.__self__))
        return wrapped

    def call(__self, __context, __obj, *args, **kwargs):
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes, int)):
            _check_sizes((*args, *kwargs.values()))
            if isinstance(owner, str) and __obj.__name__ in ("replace", "join"):
                _check_growth(__obj.__name__, owner, args)
        return super().call(__context, __obj, *args, **kwargs)


def _check_sum(values) -> None:
    size = sum(len(value) * (1 if isinstance(value, str) else 64) for value in values if hasattr(value, "__len__"))
    if size > MAX_TEXT:
        raise TemplateLimit(f"the template builds a text of {size:,} characters")


def _join(values) -> str:
    """What `~` does."""
    texts = [str(value) for value in values]
    _check_sum(texts)
    return "".join(texts)


def _sequence_product(left, right) -> int | None:
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, (str, list, tuple, bytes)) and isinstance(count, int):
            return len(sequence) * max(count, 0)
    return None


def _check_sizes(values) -> None:
    if any(isinstance(value, int) and abs(value) > MAX_REPEAT for value in values):
        raise TemplateLimit(f"the template asks for more than {MAX_REPEAT:,} characters")


def _check_growth(name: str, text: str, args) -> None:
    size = 0
    if name == "replace" and len(args) >= 2 and all(isinstance(arg, str) for arg in args[:2]):
        size = (text.count(args[0]) if args[0] else len(text) + 1) * len(args[1])
    elif name == "join" and args and hasattr(args[0], "__len__"):
        size = len(text) * len(args[0])
    if size > 100 * MAX_REPEAT:
        raise TemplateLimit(f"the template grows a text to {size:,} characters")


def _check_format(text: str) -> None:
    """A width in a format, such as '%999999999d', allocates it; '%*d' and '{:{}}' take it from the arguments."""
    if re.search(r"%[^%a-zA-Z]*\*|\{[^{}]*:[^{}]*\{", text):
        raise TemplateLimit("the template formats with a width given as an argument")
    digits = 0
    for char in text:
        digits = digits + 1 if char.isdigit() else 0
        if digits > 4:
            raise TemplateLimit("the template formats with a very large width")


def _bounded_filter(filter_):
    """Wraps a filter so that no numeric argument of it asks for a huge text."""

    def bounded(*args, **kwargs):
        _check_sizes((*args, *kwargs.values()))
        if args and isinstance(args[0], str) and filter_.__name__ == "do_format":
            _check_format(args[0])
        return filter_(*args, **kwargs)

    for attribute in ("jinja_pass_arg", "contextfunction", "__name__"):
        if hasattr(filter_, attribute):
            setattr(bounded, attribute, getattr(filter_, attribute))
    return bounded


class _GenerationTag(Extension):
    """`{% generation %}` marks answers for transformers; here spans are found otherwise, and it renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _GuardJoins(NodeTransformer):
    def visit_Concat(self, node):
        parts = nodes.List([self.visit(part) for part in node.nodes]).set_lineno(node.lineno)
        return nodes.Filter(parts, _JOIN_FILTER, [], [], None, None).set_lineno(node.lineno)


class _TemplateDict:
    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise SecurityError(f"underscored attribute {name!r} on a namespace")
        super().__setitem__(name, value)


def _raise_exception(message):
    raise jinja2.exceptions.TemplateError(str(message))


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Not Jinja's, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> jinja2.Environment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    for name in ("center", "indent", "wordwrap", "truncate", "batch", "slice", "format", "round"):
        environment.filters[name] = _bounded_filter(environment.filters[name])
    environment.filters["tojson"] = _tojson
    environment.filters[_BUDGET_FILTER] = _spend
    environment.filters[_JOIN_FILTER] = _join
    del environment.globals["lipsum"]
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda format: datetime.now().strftime(format),
        dict=_TemplateDict(),
        namespace=_Namespace,
    )
    return environment


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
    for node in behind:
        names = {name.name for name in node.find_all(nodes.Name)}
        if names & assigned or any(True for _ in node.find_all(nodes.For)):
            return None
    return loop


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


@dataclass(frozen=True)
class Pieces:
    """One rendering with the places between messages.

    `text` is the whole; `ends[i]` is where message i's part ends; `first` is the number of messages in front that have
    no part of their own (a system message the template reads as `messages[0]` and then skips).
    """

    text: str
    begin: int
    ends: tuple[int, ...]
    first: int


class Renderer:
    """One compiled template. Picklable: it is compiled again on arrival."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]):
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateLimit(f"the template has {len(source):,} characters (limit {MAX_TEMPLATE_CHARS:,})")
        self.source = source
        self.special_tokens = dict(special_tokens)
        self._compile()

    def _compile(self) -> None:
        self._prompts: dict[str, str] = {}
        environment = _environment()
        try:
            tree = environment.parse(self.source)
            self._template = self._build(environment, tree)
            tree = environment.parse(self.source)
            loop = append_only_loop(tree)
            self._marked = None
            if loop is not None:
                mark = nodes.Output([nodes.TemplateData(MARK)]).set_lineno(loop.lineno)
                loop.body.insert(0, mark)
                behind = tree.body[tree.body.index(loop) + 1 :]
                tree.body.insert(len(tree.body) - len(behind), mark)
                self._marked = self._build(environment, tree)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"line {error.lineno}: {error.message}") from None
        except (RecursionError, MemoryError, OverflowError, ValueError) as error:
            if isinstance(error, TemplateError):
                raise
            raise TemplateLimit(f"the template can't be compiled: {type(error).__name__}") from None

    @staticmethod
    def _build(environment, tree: nodes.Template) -> jinja2.Template:
        compound = any(True for kind in _CAN_COMPOUND for _ in tree.find_all(kind))
        for loop in tree.find_all(nodes.For):
            compound |= loop.recursive
            loop.iter = nodes.Filter(loop.iter, _BUDGET_FILTER, [], [], None, None).set_lineno(loop.lineno)
        tree = _GuardJoins().visit(tree)
        # Sums are looked at only where they can feed on themselves: it takes as long as the rest of a rendering.
        environment.intercepted_binops = _Sandbox.intercepted_binops | ({"+"} if compound else set())
        tree.set_environment(environment)
        code = environment.compile(tree)
        return environment.template_class.from_code(environment, code, environment.make_globals(None), None)

    def __getstate__(self):
        return {"source": self.source, "special_tokens": self.special_tokens}

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
        """The same text (no generation prompt) with the places between messages; None where that isn't proved."""
        if self._marked is None:
            return None
        marked = self._run(self._marked, messages, tools, False, kwargs)
        parts = marked.split(MARK)
        first = len(messages) - (len(parts) - 2)
        if not 0 <= first <= 1 or len(parts) < 3:  # the data has the mark in it, or the loop saw another list
            return None
        ends, end = [], len(parts[0])
        for part in parts[1:-1]:
            end += len(part)
            ends.append(end)
        return Pieces("".join(parts), len(parts[0]), tuple(ends), first)

    def generation_prompt(self, kwargs: Mapping[str, Any] | None = None) -> str:
        """What the generation prompt adds behind any conversation (for templates with `append_only`)."""
        key = json.dumps(kwargs or {}, sort_keys=True, default=str)
        if key not in self._prompts:
            probe = [{"role": "user", "content": "Hello"}]
            plain, prompted = (self.render(probe, generation=flag, kwargs=kwargs) for flag in (False, True))
            if not prompted.startswith(plain):  # something stands behind the loop when none is asked for
                raise TemplateError("the template writes less with a generation prompt than without")
            self._prompts[key] = prompted[len(plain) :]
        return self._prompts[key]

    def _run(self, template, messages, tools, generation, kwargs) -> str:
        _budget.steps = MAX_LOOP_STEPS
        _budget.deadline = time.monotonic() + MAX_SECONDS
        variables = {**self.special_tokens, **(kwargs or {})}
        variables.update(messages=messages, tools=tools, documents=None, add_generation_prompt=generation)
        try:
            parts, size = [], 0
            for part in template.generate(variables):
                parts.append(part)
                size += len(part)
                if size > MAX_TEXT:
                    raise TemplateLimit(f"the template writes more than {MAX_TEXT:,} characters")
            return "".join(parts)
        except TemplateError:
            raise
        except jinja2.exceptions.TemplateError as error:
            raise TemplateError(str(error)) from None
        except (RecursionError, MemoryError, OverflowError) as error:
            raise TemplateLimit(f"the template ran past its limits: {type(error).__name__}") from None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ZeroDivisionError) as error:
            raise TemplateError(f"{type(error).__name__}: {error}") from error
