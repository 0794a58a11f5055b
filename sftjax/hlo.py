"""Reads a compiled program's text: what its devices send each other, which kernels are in it, what came from where.

The compiler writes one `collective` several times where it overlaps it with work (start, middle, end): all carry the
same channel, so each channel is counted once. What is inside a loop counts as often as the loop runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_NAMED = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{op_name="([^"]*)"', re.MULTILINE)
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?([%\w.\-, ]+)\}?")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_BITS = {"pred": 8, "s4": 4, "u4": 4}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: one of `KINDS`; an all-reduce of which each device keeps its part is a reduce-scatter.
      arrays: (dtype, shape) of what is gathered or reduced, whole.
      devices: how many take part.
      times: in one run of the program.
      source: where in the program it comes from, as jax names it.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    devices: int
    times: int
    source: str

    @property
    def bytes(self) -> int:
        """Of the whole arrays, once."""
        return sum(array_bytes(dtype, shape) for dtype, shape in self.arrays)

    @property
    def received(self) -> float:
        """Bytes that each device must receive in one run, at the least."""
        if self.kind == "collective-permute":
            return float(self.bytes * self.times)
        rounds = 2 if self.kind == "all-reduce" else 1
        return self.bytes * rounds * (self.devices - 1) / self.devices * self.times


def array_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
    return math.prod(shape) * bits // 8


def scopes(text: str) -> dict[str, str]:
    """Instruction -> the path of scopes it was written in, such as `jit(step)/Decoder/self_attn/dot_general`."""
    return dict(_NAMED.findall(text))


def collectives(text: str, devices: int) -> list[Collective]:
    """What the devices of a program exchange, largest first.

    Args:
      text: `compiled.as_text()`.
      devices: of the whole program; a group that isn't spelled out has all of them.
    """
    times = _times(text)
    found: dict[str, Collective] = {}
    for computation, name, result, operation, line in _instructions(text):
        kind = operation.removesuffix("-start")
        if kind not in KINDS:
            continue
        arrays = _arrays(result)
        if operation.endswith("-start") and kind in ("all-gather", "collective-permute"):
            whole = [array for array in arrays if array[1]]  # operands, then results, then scalars for bookkeeping
            arrays = whole[len(whole) // 2 :]
        if kind == "reduce-scatter":
            arrays = _arrays(line.split(operation + "(", 1)[1].split(")")[0]) or arrays
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind = "reduce-scatter"
        channel = re.search(r"channel_id=(\d+)", line)
        source = re.search(r'op_name="([^"]*)"', line)
        collective = Collective(
            kind, tuple(arrays), _group(line, devices), times.get(computation, 1), source[1] if source else ""
        )
        key = channel[1] if channel else name
        if collective.devices > 1 and (key not in found or found[key].times < collective.times):
            found[key] = collective
    return sorted(found.values(), key=lambda collective: -collective.received)


def kernels(text: str) -> list[str]:
    """Names of the hand-written kernels in a program (Pallas, cuDNN), each once."""
    names = set()
    for _, name, _, operation, line in _instructions(text):
        target = re.search(r'custom_call_target="([^"]*)"', line)
        if operation != "custom-call" or target is None:
            continue
        if target[1] in ("tpu_custom_call", "mosaic_gpu_v2"):
            names.add(re.sub(r"(\.\d+|\.clone)+$", "", name))
        elif target[1].startswith("__cudnn"):
            names.add(target[1].strip("_"))
    return sorted(names)


def _instructions(text: str) -> Iterator[tuple[str, str, str, str, str]]:
    """(computation, name, result type, operation, line) of every instruction."""
    computation = ""
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            computation = start[2]
        elif match := _INSTRUCTION.match(line):
            yield computation, *match.groups(), line


def _arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (dtype, tuple(int(size) for size in shape.split(",")) if shape else ()) for dtype, shape in _ARRAY.findall(text)
    ]


def _times(text: str) -> dict[str, int]:
    """How often each computation runs when the program runs once; a loop of unknown length counts once."""
    entry = next(start[2] for line in text.splitlines() if (start := _COMPUTATION.match(line)) and start[1])
    lines: dict[str, dict[str, str]] = {}  # of each computation, by the instruction's name
    for computation, name, _, _, line in _instructions(text):
        lines.setdefault(computation, {})[name] = line
    called: dict[str, dict[str, int]] = {computation: {} for computation in lines}
    for computation, instructions in lines.items():
        for line in instructions.values():
            names = {name for group in _CALLED.findall(line) for name in re.findall(r"[\w.\-]+", group)}
            for name in names:
                called[computation].setdefault(name, 1)
            if " while(" in line:
                condition, body = (re.search(rf"{part}=%?([\w.\-]+)", line)[1] for part in ("condition", "body"))
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                turns = int(known[1]) if known else _turns(lines.get(condition, {}), lines.get(body, {}))
                called[computation][body] = turns
    times = {entry: 1}
    waiting = [entry]
    while waiting:
        computation = waiting.pop()
        for name, factor in called.get(computation, {}).items():
            if times.get(name, 0) < times[computation] * factor:
                times[name] = times[computation] * factor
                waiting.append(name)
    return times


def _turns(condition: dict[str, str], body: dict[str, str]) -> int:
    """Turns of a loop that counts from 0 to a constant in constant steps, as a scan's or a windowed product's does."""
    bounds = [found for line in condition.values() if (found := _constant(line)) is not None]
    if len(bounds) != 1:
        return 1
    reads = (re.search(r" get-tuple-element\(.*\), index=(\d+)", line) for line in condition.values())
    counter = next((found[1] for found in reads if found), None)
    root = next((line for line in body.values() if line.lstrip().startswith("ROOT")), "")
    operands = re.findall(r"%[\w.\-]+", root.split(" tuple(")[-1].split(")")[0])
    step = 1
    if counter is not None and int(counter) < len(operands):
        added = re.search(r" add\(%?[\w.\-]+, %?([\w.\-]+)\)", body.get(operands[int(counter)][1:], ""))
        step = _constant(body.get(added[1], "")) if added else 1
    return -(-bounds[0] // (step or 1))


def _constant(line: str) -> int | None:
    found = re.search(r"= [su]32\[\]\S* constant\((\d+)\)", line)
    return int(found[1]) if found else None


def _group(line: str, devices: int) -> int:
    """How many devices exchange with each other, from any of the three ways to write it."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(iota[2])
    if explicit := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(explicit[1].split(","))
    return devices
