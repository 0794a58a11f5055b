"""Answers through the slots of an engine, step by step: others may join or leave between two steps."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sftjax.generate import engine
from sftjax.generate.answer import Answer
from sftjax.generate.sampling import Needs, as_arrays
from sftjax.models.config import ModelConfig
from sftjax.models.layers import BATCH, Runtime

_PREFILL_TOKENS = 1 << 14  # padded tokens of one prefill


class Decoding:
    """A model's answers in the making.

    What an answer becomes doesn't depend on the others. There are as many slots as the answers at hand need, in powers
    of two; a cache as long as they are; both grow as answers join, and shrink when they are four times too large.

    Args:
      config, runtime, variables: of the model.
      stop_ids: tokens on which every answer ends.
      batch_size: slots, at most.
      steps: tokens of a step, at most.

    Attributes:
      waiting: answers that have no slot yet. slots: an answer each, or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        runtime: Runtime,
        variables: Mapping[str, Any],
        *,
        stop_ids: Sequence[int],
        batch_size: int,
        steps: int,
    ):
        self.config, self.runtime, self.variables = config, runtime, variables
        self.stop_ids = np.asarray(sorted(stop_ids) or [-1], np.int32)
        self.batch_size, self.steps = batch_size, steps
        self.waiting: collections.deque[Answer] = collections.deque()
        self.slots: list[Answer | None] = []
        self.length = 0  # of the cache
        self.needs = Needs()
        self.state: engine.State | None = None

    @property
    def running(self) -> list[Answer]:
        return [answer for answer in self.slots if answer is not None]

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(self.slots)

    def add(self, answers: Iterable[Answer]) -> None:
        """Puts answers at the end of the queue; prompts of like length behind one another are run together."""
        for answer in answers:
            answer.pause_at = _pause_at(self.config, len(answer.prompt_ids))
            self.needs |= Needs.of([answer.sampling], top=answer.top_logprobs > 0)
            self.waiting.append(answer)
        if self.needs.penalty and self.state is not None and self.state["seen"] is None:
            seen = np.zeros((len(self.slots), self.config.vocab_size), bool)
            for slot, answer in enumerate(self.slots):
                if answer is not None:
                    seen[slot, answer.ids] = True
            self.state["seen"] = jax.numpy.asarray(seen)

    def remove(self, answer: Answer) -> None:
        """Gives up on an answer, wherever it is; its `finish_reason` stays empty."""
        if answer in self.waiting:
            self.waiting.remove(answer)
        elif answer in self.slots:
            self.slots[self.slots.index(answer)] = None
        self._rest()

    def clear(self) -> None:
        """Gives up on all."""
        self.waiting.clear()
        self.slots = [None] * len(self.slots)
        self._rest()

    def step(self) -> list[Answer]:
        """Starts what waits, as far as there are slots, and decodes up to `steps` tokens of each; returns those that
        have ended."""
        before = [*self.running, *self.waiting]
        while self.waiting and (not all(self.slots) or len(self.slots) < self._slots_wanted()):
            self._start()
        if any(self.slots):
            self._advance()
        self._rest()
        return [answer for answer in before if answer.finish_reason]

    def _rest(self) -> None:
        if not self.busy:
            self.state, self.needs = None, Needs()  # an idle model keeps no cache

    def _slot_count(self, wanted: int) -> int:
        """A power of two, and a multiple of the parts into which the mesh cuts a batch."""
        mesh = self.runtime.mesh
        parts = 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in BATCH]))
        return -(-_power_of_two(wanted) // parts) * parts

    def _slots_wanted(self) -> int:
        return self._slot_count(min(self.batch_size, len(self.running) + len(self.waiting)))

    def _fit(self, count: int, length: int) -> None:
        """Has about `count` slots of `length` positions."""
        count, length = _about(len(self.slots), count), _about(self.length, _bucket(length))
        if self.state is None:
            self.slots = [None] * count
            self.state = engine.new_state(self.config, self.runtime, count, length, penalty=self.needs.penalty)
        elif (count, length) != (len(self.slots), self.length):
            running = [slot for slot, answer in enumerate(self.slots) if answer is not None]
            picks = (running + [-1] * count)[:count]
            self.state = engine.resize(self.runtime, length, self.state, np.asarray(picks, np.int32))
            self.slots = [None if slot < 0 else self.slots[slot] for slot in picks]
        self.length = length

    def _start(self) -> None:
        """Runs the prompts of waiting answers and puts them into free slots."""
        length = _bucket(self.waiting[0].length)
        longest = max([length, *(answer.length for answer in self.running)])
        self._fit(max(self._slots_wanted(), len(self.running)), longest + 1)
        free = [number for number, answer in enumerate(self.slots) if answer is None]
        chosen, row_of, prompts = self._choose(length, len(free))
        tokens = np.zeros((self._slot_count(len(prompts)), length), np.int32)
        lengths = np.ones(len(tokens), np.int32)
        for row, ids in enumerate(prompts):
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        cache, logits = engine.prefill(self.config, self.runtime, self.variables, tokens, lengths)
        new = self._rows(chosen, row_of, free)
        self.state, first = engine.insert(self.config, self.needs, self.state, cache, logits, new)
        first = jax.device_get(first)
        for row, (answer, slot) in enumerate(zip(chosen, free, strict=False)):
            self.slots[slot] = answer
            self._take(slot, {name: leaf[row] for name, leaf in first.items()})

    def _choose(self, length: int, free: int) -> tuple[list[Answer], list[int], list[list[int]]]:
        """Takes from the queue what one prefill of this length holds.

        Returns:
          answers; for each its row of the prefill; and the rows.
        """
        room = max(1, _PREFILL_TOKENS // length)
        chosen: list[Answer] = []
        rows: dict[tuple, int] = {}  # the answers to one prompt share a row
        prompts: list[list[int]] = []
        while self.waiting and len(chosen) < free:
            answer = self.waiting[0]
            key = (id(answer), True) if answer.tokens else (id(answer.prompt_ids), False)
            if (key not in rows and len(rows) == room) or _bucket(answer.length) != length:
                break
            if key not in rows:
                rows[key] = len(rows)
                prompts.append(answer.ids)
            chosen.append(self.waiting.popleft())
        row_of = [rows[(id(each), True) if each.tokens else (id(each.prompt_ids), False)] for each in chosen]
        return chosen, row_of, prompts

    def _rows(self, chosen: list[Answer], row_of: list[int], free: list[int]) -> dict[str, Any]:
        """`engine.insert`'s rows, filled up to a power of two by rows that are written nowhere."""
        count = _power_of_two(len(chosen))
        filled = chosen + [chosen[0]] * (count - len(chosen))
        seen = None
        if self.needs.penalty:
            seen = np.zeros((count, self.config.vocab_size), bool)
            for row, answer in enumerate(filled):
                seen[row, answer.ids] = True
        return {
            "row": np.asarray(row_of + [0] * (count - len(chosen)), np.int32),
            "slot": np.asarray(free[: len(chosen)] + [len(self.slots)] * (count - len(chosen)), np.int32),
            "length": np.asarray([answer.length for answer in filled], np.int32),
            "left": np.asarray([_allowed(answer) - 1 for answer in filled], np.int32),
            "key": _answer_keys(np.asarray([answer.key for answer in filled], np.uint32)),
            "settings": as_arrays([answer.sampling for answer in filled]),
            "seen": seen,
        }

    def _advance(self) -> None:
        self._fit(len(self.slots), max(answer.length for answer in self.running) + self.steps)
        resting = np.asarray([answer is None for answer in self.slots])
        self.state, drawn, given = engine.advance(
            self.config, self.runtime, self.needs, self.steps, self.variables, self.state, self.stop_ids, resting
        )
        drawn, given = jax.device_get((drawn, given))
        for slot, answer in enumerate(self.slots):
            if answer is not None:
                self._take(slot, {name: leaf[slot, : given[slot]] for name, leaf in drawn.items()})

    def _take(self, slot: int, drawn: dict[str, Any]) -> None:
        answer = self.slots[slot]
        answer.add(drawn)
        paused = answer.length == answer.pause_at
        if paused and not answer.finish_reason:
            answer.pause_at = 0
            self.waiting.appendleft(answer)
        if paused or answer.finish_reason:
            self.slots[slot] = None


@jax.jit
def _answer_keys(numbers):
    """A key from (seed, prompt, sample)."""

    def one(row):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(row[0]), row[1]), row[2])

    return jax.vmap(one)(numbers)


def _allowed(answer: Answer) -> int:
    """How many tokens may come before the answer ends or its prompt has to be run again."""
    left = answer.limit - len(answer.tokens)
    return min(left, answer.pause_at - answer.length) if answer.pause_at > answer.length else left


def _pause_at(config: ModelConfig, prompt_length: int) -> int:
    """The total length at which all frequencies change (longrope), so that everything has to be computed anew; 0: none.

    As transformers' Phi-3: the first forward pass over more than the original length recomputes the cache.
    """
    for rope in config.ropes:
        if rope.scaling is not None and rope.scaling.kind == "longrope":
            original = rope.scaling.original_max_position or config.max_position
            return original + 1 if prompt_length <= original else 0
    return 0


def _about(have: int, want: int) -> int:
    """`have` unless that is too little, or four times too much: other sizes are other programs."""
    return have if want <= have < 4 * want else want


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _bucket(length: int) -> int:
    """The few sizes that prompts and caches have: powers of two from 64 on, and half-way between them."""
    power = max(64, _power_of_two(length))
    between = power * 3 // 4
    return between if between > 64 and length <= between else power
