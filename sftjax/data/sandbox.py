"""A Jinja environment for foreign templates: transformers' features in the immutable sandbox, within limits.

The sandbox alone lets nested ranges run for ever and `'a' * 2e9` allocate, so loops draw on a budget, and what can blow
a text up (repetition, joins, widths, powers) is looked at before it is done.
"""

from __future__ import annotations

import json
import re
import threading
import time
import traceback
from datetime import datetime
from itertools import islice

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE_CHARS = 256 * 1024  # gpt-oss's, the longest in use, has 17 thousand
MAX_LOOP_STEPS = 3_000_000  # per rendering
MAX_SECONDS = 20.0  # per rendering; a backstop, the steps bind first
MAX_REPEAT = 100_000  # length that an operator or method may blow a text up to
MAX_TEXT = 256 * 2**20  # characters of a rendering, or of a text on the way to it
_BUDGET_FILTER, _JOIN_FILTER = "_sftjax_budget", "_sftjax_join"
_LOOP_FACTS = frozenset(["first", "last", "index", "index0", "length", "revindex", "revindex0", "previtem", "nextitem"])
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

    def getattr(self, obj, attribute):
        if type(obj) is LoopContext and attribute in _LOOP_FACTS:  # most of what templates ask; the checks take longer
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

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


def make_environment() -> jinja2.Environment:
    """What transformers gives a chat template, and no more."""
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


def compile_tree(environment: jinja2.Environment, tree: nodes.Template) -> jinja2.Template:
    """A parsed template with its limits built in. Changes the tree."""
    compound = any(True for kind in _CAN_COMPOUND for _ in tree.find_all(kind))
    for loop in tree.find_all(nodes.For):
        compound |= loop.recursive
        loop.iter = nodes.Filter(loop.iter, _BUDGET_FILTER, [], [], None, None).set_lineno(loop.lineno)
    tree = _GuardJoins().visit(tree)
    # Sums are looked at only where they can feed on themselves: it takes as long as the rest of a rendering.
    environment.intercepted_binops = _Sandbox.intercepted_binops | ({"+"} if compound else set())
    tree.set_environment(environment)
    code = environment.compile(tree)
    known = dict(environment.globals)  # a plain one: jinja's own chain of mappings is walked for every rendering
    return environment.template_class.from_code(environment, code, known, None)


def run(template: jinja2.Template, variables: dict) -> str:
    """Renders within the limits. Raises TemplateError, with the template's own words where it has any."""
    _budget.steps = MAX_LOOP_STEPS
    _budget.deadline = time.monotonic() + MAX_SECONDS
    try:
        parts, size = [], 0
        for part in template.root_render_func(template.new_context(variables)):
            parts.append(part)
            size += len(part)
            if size > MAX_TEXT:
                raise TemplateLimit(f"the template writes more than {MAX_TEXT:,} characters")
        return "".join(parts)
    except TemplateError:
        raise
    except jinja2.exceptions.UndefinedError as error:
        raise TemplateError(f"{error}{_line(template, error)}") from None
    except jinja2.exceptions.TemplateError as error:
        raise TemplateError(str(error)) from None
    except (RecursionError, MemoryError, OverflowError) as error:
        raise TemplateLimit(f"the template ran past its limits: {type(error).__name__}") from None
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise TemplateError(f"{type(error).__name__}: {error}{_line(template, error)}") from error


def _line(template: jinja2.Template, error: Exception) -> str:
    """Where in the template it was raised: " (line 3)", or "" if that isn't known."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame.lineno for frame in frames if frame.filename == "<template>"]
    return f" (line {template.get_corresponding_lineno(inside[-1])})" if inside else ""
