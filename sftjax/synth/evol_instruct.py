"""Evol-Instruct: instructions rewritten into harder ones and into others like them, round by round (arXiv:2304.12244).

    depth 0        depth 1                depth 2
    instruction -> with a constraint   -> ... and deeper
                   (or another one)       (what an elimination rule takes is tried again from its parent)

In depth: constraints, deepening, concretising, reasoning steps, strict format, safety. In breadth: another, rarer
instruction of the same domain. Each row has its depth, so that training can be ordered by it.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sftjax.scorers.rows import find_expected, messages_of
from sftjax.synth import text
from sftjax.synth.asking import Asker, Filters
from sftjax.synth.distill import answer_checks
from sftjax.synth.rejection import Made
from sftjax.synth.teacher import Reply, Sampling, seed_of

IN_DEPTH = {
    "constraints": "Add one more requirement or restriction that an answer has to meet.",
    "deepening": "Make it ask about the matter in more depth and breadth than it does now.",
    "concretising": "Replace general notions in it with specific ones: names, quantities, places, situations.",
    "reasoning": "Change it so that it can no longer be answered in one step, but needs several steps of reasoning.",
    "format": "Demand a strict format of the answer, such as a table, JSON with given keys, or numbered steps.",
    "safety": "Bring in a risk, a rule or a person's interest that a careful answer has to take into account.",
}
_DEEPER = """Rewrite the instruction below into a harder version of it, for a person to answer.
{how}
Keep everything it gives (tables, code, input). It must stay reasonable and understandable. Add 10 to 20 words at most.
Reply with the new instruction and nothing else.

Instruction:
{instruction}"""
_BROADER = """Write a new instruction inspired by the one below: of the same domain, but rarer.
It must be about as long and as hard, reasonable, and answerable.
Reply with the new instruction and nothing else.

Instruction:
{instruction}"""
_SAME = """Do these two instructions ask for the same, with the same requirements, the same depth and the same breadth?

First: {first}

Second: {second}

Reply with one word, Yes or No."""
BREADTH = "breadth"
MAX_WORDS = 400
_HEADING = re.compile(r"^\W*(new |rewritten )?instruction\W*:[\s*]*", re.IGNORECASE)
_LEAKS = re.compile(
    r"\b(given|new|rewritten|original|evolved|created|harder) (instruction|prompt)s?\b|^\W*instruction\W", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class _Node:
    """An instruction in the tree; numbers count all instructions that were kept."""

    instruction: str
    root: int
    depth: int = 0
    operation: str = "seed"
    parent: int | None = None
    number: int = 0
    answer: str | None = None


def evolve(
    rows: Sequence[Mapping[str, Any]],
    asker: Asker,
    sampling: Sampling,
    *,
    rounds: int = 4,
    breadth: float = 1 / 7,
    operations: Sequence[str] = tuple(IN_DEPTH),
) -> Made:
    """Evolves the first question of each row for some rounds, and answers what comes out.

    Args:
      rows: see `scorers.rows`; a row's own answer, where it has one, is that of depth 0.
      rounds: depth at most.
      breadth: share of rewritings that are in breadth.
      operations: names of IN_DEPTH to draw from.
    """
    filters = Filters()
    kept = _answer_seeds(rows, asker, sampling, filters)
    current = list(kept)
    known = {text.key(node.instruction) for node in kept}
    for depth in range(1, rounds + 1):
        following = []
        children = _round(current, asker, sampling, depth, breadth, operations, known, filters)
        for parent, child in zip(current, children, strict=True):
            following.append(parent if child is None else dataclasses.replace(child, number=len(kept)))
            if child is not None:
                kept.append(following[-1])
        current = following
    report = {
        "method": "evol_instruct",
        "prompts": len(rows),
        "rounds": rounds,
        "rows": len(kept),
        "filters": filters.as_dict(),
        "by_depth": dict(Counter(str(node.depth) for node in kept)),
        "by_operation": dict(Counter(node.operation for node in kept)),
    }
    return Made([_row(node) for node in kept], report)


def _answer_seeds(rows, asker: Asker, sampling: Sampling, filters: Filters) -> list[_Node]:
    nodes, missing = [], []
    for number, row in enumerate(rows):
        question = next(each["content"] for each in messages_of(row) if each["role"] == "user")
        expected = find_expected(row)
        answer = expected[0] if isinstance(expected, list) else expected
        nodes.append(_Node(question, number, number=number, answer=answer))
        missing += [number] if answer is None else []
    replies = asker.chat([_ask(nodes[number].instruction) for number in missing], sampling, what="seeds answered")
    for number, reply in zip(missing, replies, strict=True):
        usable = filters.first([(f"seed_{name}", strikes) for name, strikes in answer_checks(reply)]) is None
        nodes[number] = dataclasses.replace(nodes[number], answer=reply.text.strip() if usable else None)
    answered = [node for node in nodes if node.answer is not None]
    return [dataclasses.replace(node, number=number) for number, node in enumerate(answered)]


def _round(
    nodes: Sequence[_Node],
    asker: Asker,
    sampling: Sampling,
    depth: int,
    breadth: float,
    operations: Sequence[str],
    known: set[str],
    filters: Filters,
) -> list[_Node | None]:
    """One rewriting of each instruction; None where it was eliminated."""
    draws = random.Random(seed_of(asker.seed, "operations", depth))
    chosen = [BREADTH if draws.random() < breadth else draws.choice(list(operations)) for _ in nodes]
    requests = [_ask(_request(name, node.instruction)) for name, node in zip(chosen, nodes, strict=True)]
    replies = asker.chat(requests, sampling, what=f"instructions rewritten, round {depth} of")
    children: list[_Node | None] = []
    taken = set(known)
    for node, name, reply in zip(nodes, chosen, replies, strict=True):
        instruction = _cleaned(reply.text)
        if filters.first(_instruction_checks(reply, instruction, taken)) is None:
            taken.add(text.key(instruction))
            children.append(_Node(instruction, node.root, node.depth + 1, name, node.number))
        else:
            children.append(None)
    _drop_the_same(nodes, children, asker, filters)
    left = [number for number, child in enumerate(children) if child is not None]
    answers = asker.chat([_ask(children[number].instruction) for number in left], sampling, what="answers")
    for number, reply in zip(left, answers, strict=True):
        checks = [*answer_checks(reply), ("answer_says_nothing", text.says_nothing(reply.text))]
        usable = filters.first(checks) is None
        children[number] = dataclasses.replace(children[number], answer=reply.text.strip()) if usable else None
    known.update(text.key(child.instruction) for child in children if child is not None)
    return children


def _drop_the_same(nodes: Sequence[_Node], children: list[_Node | None], asker: Asker, filters: Filters) -> None:
    """The teacher judges whether a rewriting in depth asks for anything more than its parent."""
    judged = [number for number, child in enumerate(children) if child is not None and child.operation != BREADTH]
    requests = [
        _ask(_SAME.format(first=nodes[number].instruction, second=children[number].instruction)) for number in judged
    ]
    greedy = Sampling(temperature=0.0, max_new_tokens=8)
    for number, reply in zip(judged, asker.chat(requests, greedy, what="rewritings compared"), strict=True):
        if filters.take("no_gain", reply.text.strip().lower().startswith("yes")):
            children[number] = None


def _instruction_checks(reply: Reply, instruction: str, known: set[str]) -> list[tuple[str, bool]]:
    return [
        ("instruction_empty", not text.words(instruction)),
        ("instruction_cut_off", reply.cut),
        ("instruction_too_long", len(instruction.split()) > MAX_WORDS),
        ("instruction_leaks_request", _LEAKS.search(instruction) is not None),
        ("instruction_known", text.key(instruction) in known),
    ]


def _request(operation: str, instruction: str) -> str:
    if operation == BREADTH:
        return _BROADER.format(instruction=instruction)
    return _DEEPER.format(how=IN_DEPTH[operation], instruction=instruction)


def _cleaned(reply: str) -> str:
    """Without a heading or quotation marks around all of it."""
    return _unquoted(_HEADING.sub("", _unquoted(reply)))


def _unquoted(reply: str) -> str:
    found = reply.strip()
    return found[1:-1].strip() if len(found) > 1 and found[0] == found[-1] == '"' else found


def _ask(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def _row(node: _Node) -> dict[str, Any]:
    return {
        "messages": [*_ask(node.instruction), {"role": "assistant", "content": node.answer}],
        "method": "evol_instruct",
        "index": node.root,
        "number": node.number,
        "depth": node.depth,
        "operation": node.operation,
        "parent": node.parent,
    }
