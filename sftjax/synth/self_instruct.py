"""Self-Instruct: a few tasks written by people grow into many, written by a model (arXiv:2212.10560).

    pool of instructions --8 of them as examples--> new instructions --ROUGE-L < 0.7 to all others--> pool
    new instruction --classification?-- no  --> input, then output
                                     \\- yes --> for each label an input        (else the labels would all be alike)

Rows with the same input and another output, or an output that repeats its input, are dropped.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from sftjax.errors import DataError
from sftjax.synth import text
from sftjax.synth.asking import Asker, Filters
from sftjax.synth.rejection import Made
from sftjax.synth.teacher import Reply, Sampling, seed_of

SEED_EXAMPLES, OWN_EXAMPLES = 6, 2  # shown to the teacher: of people's tasks, of its own
ASKED_FOR = 8  # new instructions in one reply
MIN_WORDS, MAX_WORDS = 4, 150  # of an instruction
MAX_INSTANCES = 5  # of a classification task
# What a model that reads and writes text can't do.
_UNABLE = frozenset(
    text.words(
        "image images graph graphs picture pictures photo photos file files map maps draw plot video audio music "
        "song flowchart diagram website link"
    )
)
_ITEM = re.compile(r"^\s*(?:task\s*)?\d+\s*[.):]\s*", re.IGNORECASE | re.MULTILINE)
_FIELD = re.compile(r"^\W*(input|output|label)\W*:[ \t]*\**[ \t]*", re.IGNORECASE | re.MULTILINE)
_NOTHING = re.compile(r"\W*(none|n/?a|no input( needed| required)?|not applicable|empty|)\W*", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Task:
    """An instruction, an example of it, and whether its answers are labels."""

    instruction: str
    input: str = ""
    output: str = ""
    classification: bool = False


def read_seeds(rows: Sequence[Mapping[str, Any]]) -> list[Task]:
    """Seed tasks: rows with `instruction`, `instances: [{input, output}]` and `is_classification`, or Alpaca's.

    Raises:
      DataError: a row is neither, or there are no rows.
    """
    tasks = []
    for number, row in enumerate(rows):
        instances = row.get("instances") or [row]
        try:
            first = instances[0]
            found = Task(str(row["instruction"]), str(first.get("input") or ""), str(first["output"]))
        except (KeyError, IndexError, TypeError, AttributeError):
            raise DataError(
                f"seed {number}: needs instruction, and output or instances with input and output"
            ) from None
        tasks.append(dataclasses.replace(found, classification=bool(row.get("is_classification"))))
    if not tasks:
        raise DataError("there are no seed tasks: give at least one")
    return tasks


def grow(seeds: Sequence[Task], asker: Asker, sampling: Sampling, *, count: int, novelty: float = 0.7) -> Made:
    """New tasks until there are `count` instructions, or as long as the teacher still has new ones.

    Args:
      novelty: the largest ROUGE-L that a new instruction may have with one that is known.
    """
    filters = Filters()
    fresh = _instructions(seeds, asker, sampling, count, novelty, filters)
    labelled = _classified(fresh, seeds, asker)
    instances = _instances(labelled, seeds, asker, sampling, filters)
    report = {
        "method": "self_instruct",
        "seeds": len(seeds),
        "instructions": len(fresh),
        "classification": sum(task.classification for task in labelled),
        "rows": len(instances),
        "filters": filters.as_dict(),
    }
    return Made([_row(index, task) for index, task in instances], report)


# --- instructions ------------------------------------------------------------------------------------------------


def _instructions(
    seeds: Sequence[Task], asker: Asker, sampling: Sampling, count: int, limit: float, filters: Filters
) -> list[str]:
    pool = text.Novelty((task.instruction for task in seeds), limit)
    fresh: list[str] = []
    barren = rounds = 0
    while len(fresh) < count and barren < 3:
        requests = [
            _more(seeds, fresh, seed_of(asker.seed, "examples", rounds, k)) for k in range(_requests(count, fresh))
        ]
        before = len(fresh)
        for reply in asker.chat(requests, sampling, what=f"lists of instructions (have {before:,} of {count:,})"):
            for instruction in _listed(reply):
                if filters.first(_instruction_checks(instruction)) is not None or len(fresh) == count:
                    continue
                if not filters.take("instruction_not_new", not pool.add(instruction)):
                    fresh.append(instruction)
        rounds += 1
        barren = barren + 1 if len(fresh) == before else 0
    return fresh


def _requests(count: int, fresh: Sequence[str]) -> int:
    """Lists to ask for before the teacher's own instructions are among the examples: a quarter of what is missing."""
    return max(1, min(32, (count - len(fresh)) // (4 * ASKED_FOR)))


def _more(seeds: Sequence[Task], fresh: Sequence[str], seed: int) -> list[dict[str, str]]:
    draws = random.Random(seed)
    shown = draws.sample(list(fresh), min(OWN_EXAMPLES, len(fresh)))
    shown += [
        task.instruction
        for task in draws.sample(list(seeds), min(SEED_EXAMPLES + OWN_EXAMPLES - len(shown), len(seeds)))
    ]
    draws.shuffle(shown)
    listed = "\n".join(f"{number}. {' '.join(each.split())}" for number, each in enumerate(shown, 1))
    return _ask(
        f"Here are {len(shown)} tasks for a language model:\n{listed}\n\nWrite {ASKED_FOR} further tasks, of other "
        "kinds and on other subjects, that can be done by reading and writing text alone. Number them from "
        f"{len(shown) + 1} on, one a line, and write nothing else."
    )


def _listed(reply: Reply) -> list[str]:
    """The items of a numbered list; the last one is dropped where the reply was cut off."""
    items = [" ".join(item.split()) for item in _ITEM.split(reply.text)]
    items = items[1:] if _ITEM.search(reply.text) else []
    return items[:-1] if reply.cut else items


def _instruction_checks(instruction: str) -> list[tuple[str, bool]]:
    found = instruction.split()
    first = instruction[:1]
    return [
        ("instruction_too_short", len(found) < MIN_WORDS),
        ("instruction_too_long", len(found) > MAX_WORDS),
        ("instruction_beyond_text", bool(_UNABLE & set(text.words(instruction)))),
        ("instruction_program", instruction.lower().startswith("write a program")),
        ("instruction_odd_start", not first.isalnum() and first not in "\"'([¿¡"),
    ]


# --- classification or not ---------------------------------------------------------------------------------------


def _classified(instructions: Sequence[str], seeds: Sequence[Task], asker: Asker) -> list[Task]:
    """The teacher tells, from examples, which tasks have few possible answers."""
    draws = random.Random(seed_of(asker.seed, "classification"))
    kinds = [[task for task in seeds if task.classification is kind] for kind in (True, False)]
    shown = [task for kind in kinds for task in draws.sample(kind, min(6, len(kind)))]
    draws.shuffle(shown)
    examples = "\n\n".join(
        f"Task: {task.instruction}\nAnswer: {'Yes' if task.classification else 'No'}" for task in shown
    )
    requests = [
        _ask(
            "Is this a classification task, that is, one whose answer is one of a few fixed labels? "
            f"Answer Yes or No.\n\n{examples}\n\nTask: {instruction}\nAnswer:"
        )
        for instruction in instructions
    ]
    greedy = Sampling(temperature=0.0, max_new_tokens=8)
    replies = asker.chat(requests, greedy, what="instructions classified")
    return [
        Task(instruction, classification=text.words(reply.text)[:1] == ["yes"])
        for instruction, reply in zip(instructions, replies, strict=True)
    ]


# --- instances ---------------------------------------------------------------------------------------------------

_INPUT_FIRST = """Give an example of the task below: its input, and the output that is right for it.
If the task needs no input, write "Input: none".

{examples}

Task: {instruction}"""
_OUTPUT_FIRST = """For the classification task below, write each possible label, and an input to which it is right.

{examples}

Task: {instruction}"""


def _instances(
    tasks: Sequence[Task], seeds: Sequence[Task], asker: Asker, sampling: Sampling, filters: Filters
) -> list[tuple[int, Task]]:
    """(number of the instruction, an instance of it), those that can be used."""
    draws = random.Random(seed_of(asker.seed, "instances"))
    requests = []
    for task in tasks:
        alike = [seed for seed in seeds if seed.classification is task.classification]
        shown = draws.sample(alike, min(4, len(alike)))
        examples = "\n\n".join(f"Task: {each.instruction}\n{_written(each)}" for each in shown)
        form = _OUTPUT_FIRST if task.classification else _INPUT_FIRST
        requests.append(_ask(form.format(examples=examples, instruction=task.instruction)))
    found = []
    for number, reply in enumerate(asker.chat(requests, sampling, what="instances")):
        instances = [
            dataclasses.replace(tasks[number], input=given, output=output)
            for given, output in _parse(reply, tasks[number].classification)
        ]
        filters.take("no_instance", not instances)
        found += [(number, each) for each in _usable(instances, filters)]
    return found


def _written(task: Task) -> str:
    if task.classification:
        return f"Label: {task.output}\nInput: {task.input or 'none'}"
    return f"Input: {task.input or 'none'}\nOutput: {task.output}"


def _parse(reply: Reply, classification: bool) -> list[tuple[str, str]]:
    """(input, output) of what the teacher wrote: fields Input, Output and Label; without any, all is the output."""
    parts = _FIELD.split(reply.text.split("\nTask:")[0])
    fields = [(name.lower(), value.strip()) for name, value in zip(parts[1::2], parts[2::2], strict=True)]
    if reply.cut:
        fields = fields[:-1]
    if not fields:
        return [] if classification or reply.cut or len(parts) > 1 else [("", reply.text.strip())]
    pairs = []
    if classification:
        for (name, label), (following, given) in pairwise(fields):
            if name == "label" and following == "input":
                pairs.append((_input(given), label))
        return pairs[:MAX_INSTANCES]
    given = ""
    for name, value in fields:
        if name == "input":
            given = _input(value)
        elif name == "output":
            pairs.append((given, value))
    return pairs[:1]


def _input(value: str) -> str:
    return "" if _NOTHING.fullmatch(value) else value


def _usable(instances: Sequence[Task], filters: Filters) -> list[Task]:
    """Of one instruction's instances."""
    outputs: dict[str, set[str]] = {}
    for each in instances:
        outputs.setdefault(text.key(each.input), set()).add(text.key(each.output))
    kept, seen = [], set()
    for each in instances:
        pair = text.key(each.input), text.key(each.output)
        checks = [
            ("instance_output_empty", not each.output),
            ("instance_repeats_input", pair[0] == pair[1]),
            ("instance_output_unfinished", each.output.endswith(":")),
            ("instance_contradicts", len(outputs[pair[0]]) > 1),
            ("instance_known", pair in seen),
        ]
        if filters.first(checks) is None:
            seen.add(pair)
            kept.append(each)
    return kept


def _ask(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def _row(index: int, task: Task) -> dict[str, Any]:
    question = f"{task.instruction}\n\n{task.input}" if task.input else task.instruction
    return {
        "messages": [*_ask(question), {"role": "assistant", "content": task.output}],
        "method": "self_instruct",
        "index": index,
        "instruction": task.instruction,
        "input": task.input,
        "output": task.output,
        "classification": task.classification,
    }
