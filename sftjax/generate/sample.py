"""Answers to prompts: batches of ragged prompts, finished rows replaced by waiting ones.

`Generator` holds a model ready to decode; `generate` is the same in one call. An answer depends on the model, its
prompt, the settings and the seed, and not on what else is in the batch: each has its own random key.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sftjax import tree
from sftjax.errors import DataError
from sftjax.generate import engine
from sftjax.generate.sampling import Needs, Sampling, as_arrays
from sftjax.models.config import ModelConfig
from sftjax.models.layers import BATCH, Runtime

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
_PREFILL_TOKENS = 1 << 14  # padded tokens of one prefill


@dataclasses.dataclass(frozen=True)
class Output:
    """One answer.

    Attributes:
      prompt: index of the prompt; sample: which of its n answers.
      tokens: what was generated, the stop token included.
      logprobs: log-probability of each under the model (before temperature, filters and penalty).
      text: without the stop token, special tokens, and what a stop string cuts off.
      finish_reason: "stop" (a stop token or string) or "length".
      prompt_tokens: how many the prompt has.
    """

    prompt: int
    sample: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str
    prompt_tokens: int


def generate(
    config: ModelConfig,
    runtime: Runtime,
    variables: Mapping[str, Any],
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 64,
    **settings: Any,
) -> list[Output]:
    """`Generator(...).generate(prompts, **settings)`."""
    return Generator(config, runtime, variables, tokenizer, batch_size=batch_size).generate(prompts, **settings)


class Generator:
    """A model ready to decode.

    Args:
      config, runtime: of the model. The cache is kept in the runtime's compute dtype.
      variables: collections `params`, and `adapter` and `quant` where there are some.
      tokenizer: a `data.tokenizer.Tokenizer`, or None if prompts are ids and no text is wanted.
      batch_size: answers that decode together, at most.
      steps: tokens between two looks of the host; 1 to 4 for streaming.
    """

    def __init__(
        self,
        config: ModelConfig,
        runtime: Runtime,
        variables: Mapping[str, Any],
        tokenizer: Any = None,
        *,
        batch_size: int = 64,
        steps: int = 16,
    ):
        self.config, self.runtime, self.tokenizer = config, runtime.replace(remat="none"), tokenizer
        self.variables = in_compute_dtype(dict(variables), runtime.compute_dtype)
        self.batch_size, self.steps = batch_size, steps

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        n: int = 1,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Output]:
        """Answers each prompt n times.

        Args:
          prompts: conversations (lists of messages, through the chat template), texts to continue, or ids.
          temperature: 0 is greedy. See `sampling.Sampling` for this and the next four.
          seed: the same seed gives the same answers.
          n: answers to each prompt; they share one prefill.
          stop: strings that end an answer; they aren't part of its text.
          stop_ids: tokens that end an answer; None: the tokenizer's.
          on_text: called with (number of the answer, new text) as text comes.

        Returns:
          n outputs for each prompt, prompt by prompt.

        Raises:
          DataError: an empty prompt.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        if stop_ids is None:
            stop_ids = () if self.tokenizer is None else self.tokenizer.stop_ids
        answers = []
        for number, prompt in enumerate(prompts):
            ids = encode_prompt(self.tokenizer, prompt)
            if not ids:
                raise DataError(f"prompt {number} is empty: give at least one token")
            answers += [_Answer(number, sample, ids, sampling, max_new_tokens) for sample in range(n)]
        if max_new_tokens > 0:
            text = _Text(self.tokenizer, frozenset(stop_ids), tuple(stop), on_text)
            _Run(self, answers, text, seed).finish()
        return [answer.output() for answer in answers]


class _Answer:
    """An answer in the making."""

    def __init__(self, prompt: int, sample: int, prompt_ids: list[int], sampling: Sampling, limit: int):
        self.prompt, self.sample, self.prompt_ids = prompt, sample, prompt_ids
        self.sampling, self.limit = sampling, limit
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.text, self.shown, self.finish_reason = "", 0, ""
        self.number = 0
        self.pause_at = 0  # total length at which the prompt has to be run again

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.tokens

    def output(self) -> Output:
        return Output(
            self.prompt,
            self.sample,
            tuple(self.tokens),
            tuple(self.logprobs),
            self.text,
            self.finish_reason or "length",
            len(self.prompt_ids),
        )


class _Text:
    """Turns tokens into text, and finds the end."""

    def __init__(self, tokenizer, stop_ids: frozenset[int], stop: tuple[str, ...], on_text):
        self.tokenizer, self.stop_ids, self.stop, self.on_text = tokenizer, stop_ids, stop, on_text
        self.hold = max((len(each) for each in stop), default=1) - 1

    def add(self, answer: _Answer, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Takes new tokens as far as the answer goes, and sets its `finish_reason` where it ends."""
        for token, logprob in zip(tokens, logprobs, strict=True):
            answer.tokens.append(int(token))
            answer.logprobs.append(float(logprob))
            if int(token) in self.stop_ids:
                answer.finish_reason = "stop"
            elif self.stop and self._find_stop(answer):
                return
            elif len(answer.tokens) == answer.limit:
                answer.finish_reason = "length"
            if answer.finish_reason:
                break
        self._show(answer)

    def _find_stop(self, answer: _Answer) -> bool:
        text = self.decode(answer.tokens)
        found = [place for place in (text.find(each) for each in self.stop) if place >= 0]
        if found:
            answer.finish_reason = "stop"
            self._emit(answer, text[: min(found)], final=True)
        return bool(found)

    def _show(self, answer: _Answer) -> None:
        final = bool(answer.finish_reason)
        if self.tokenizer is None or not (final or self.on_text):
            return
        ends = answer.finish_reason == "stop" and answer.tokens[-1] in self.stop_ids
        self._emit(answer, self.decode(answer.tokens[:-1] if ends else answer.tokens), final)

    def _emit(self, answer: _Answer, text: str, final: bool) -> None:
        answer.text = text
        if self.on_text is None:
            return
        # Half a character, or what may become a stop string, waits.
        upto = len(text) if final else max(answer.shown, len(text.rstrip("\ufffd")) - self.hold)
        if upto > answer.shown:
            self.on_text(answer.number, text[answer.shown : upto])
            answer.shown = upto

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special=True)


class _Run:
    """One batch of answers through the slots of an engine."""

    def __init__(self, generator: Generator, answers: list[_Answer], text: _Text, seed: int):
        self.config, self.runtime, self.variables = generator.config, generator.runtime, generator.variables
        self.steps, self.text, self.seed = generator.steps, text, seed
        for number, answer in enumerate(answers):
            answer.number = number
            answer.pause_at = _pause_at(self.config, len(answer.prompt_ids))
        # The longest first: the cache grows early, and prefills have rows of like length.
        self.waiting = collections.deque(sorted(answers, key=lambda answer: -len(answer.prompt_ids)))
        self.needs = Needs.of([answer.sampling for answer in answers])
        self.slots: list[_Answer | None] = [None] * self._slot_count(min(generator.batch_size, len(answers)))
        self.stop_ids = np.asarray(sorted(text.stop_ids) or [-1], np.int32)
        self.state: engine.State | None = None

    def finish(self) -> None:
        while self.waiting or any(self.slots):
            while self.waiting and not all(self.slots):
                self._start()
            if any(self.slots):
                self._advance()

    def _slot_count(self, wanted: int) -> int:
        """A power of two, and a multiple of the parts into which the mesh cuts a batch."""
        mesh = self.runtime.mesh
        parts = 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in BATCH]))
        return -(-_power_of_two(wanted) // parts) * parts

    def _start(self) -> None:
        """Runs the prompts of waiting answers and puts them into free slots."""
        free = [number for number, answer in enumerate(self.slots) if answer is None]
        length = _bucket(len(self.waiting[0].ids))
        room = max(1, _PREFILL_TOKENS // length)
        chosen: list[_Answer] = []
        rows: dict[tuple, int] = {}  # the answers to one prompt share a row
        while self.waiting and len(chosen) < len(free):
            answer = self.waiting[0]
            key = (answer.prompt, len(answer.ids)) if not answer.tokens else (answer.prompt, answer.sample)
            if (key not in rows and len(rows) == room) or len(answer.ids) > length:
                break
            rows.setdefault(key, len(rows))
            chosen.append(self.waiting.popleft())
        row_of = []
        prompts: list[list[int]] = []
        for answer in chosen:
            key = (answer.prompt, len(answer.ids)) if not answer.tokens else (answer.prompt, answer.sample)
            if rows[key] == len(prompts):
                prompts.append(answer.ids)
            row_of.append(rows[key])
        tokens = np.zeros((self._slot_count(len(prompts)), length), np.int32)
        lengths = np.ones(len(tokens), np.int32)
        for row, ids in enumerate(prompts):
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        cache, logits = engine.prefill(self.config, self.runtime, self.variables, tokens, lengths)
        self._reserve(length + 1)
        new = self._rows(chosen, row_of, free)
        self.state, first, logprobs = engine.insert(self.config, self.needs, self.state, cache, logits, new)
        first, logprobs = jax.device_get((first, logprobs))
        for answer, slot, token, logprob in zip(chosen, free, first, logprobs, strict=False):
            self.slots[slot] = answer
            self._take(slot, [token], [logprob])

    def _rows(self, chosen: list[_Answer], row_of: list[int], free: list[int]) -> dict[str, Any]:
        """`engine.insert`'s rows, filled up to a power of two by rows that are written nowhere."""
        count = _power_of_two(len(chosen))
        filled = chosen + [chosen[0]] * (count - len(chosen))
        keys = [(self.seed, answer.prompt, answer.sample) for answer in filled]
        seen = None
        if self.needs.penalty:
            seen = np.zeros((count, self.config.vocab_size), bool)
            for row, answer in enumerate(filled):
                seen[row, answer.ids] = True
        return {
            "row": np.asarray(row_of + [0] * (count - len(chosen)), np.int32),
            "slot": np.asarray(free[: len(chosen)] + [len(self.slots)] * (count - len(chosen)), np.int32),
            "length": np.asarray([len(answer.ids) for answer in filled], np.int32),
            "left": np.asarray([self._allowed(answer) - 1 for answer in filled], np.int32),
            "key": _answer_keys(np.asarray(keys, np.uint32)),
            "settings": as_arrays([answer.sampling for answer in filled]),
            "seen": seen,
        }

    def _allowed(self, answer: _Answer) -> int:
        """How many tokens may come before the answer ends or its prompt has to be run again."""
        left = answer.limit - len(answer.tokens)
        return min(left, answer.pause_at - len(answer.ids)) if answer.pause_at > len(answer.ids) else left

    def _reserve(self, length: int) -> None:
        """Makes room for `length` positions."""
        length = _bucket(length)
        if self.state is None:
            self.state = engine.new_state(
                self.config, self.runtime, len(self.slots), length, penalty=self.needs.penalty
            )
        elif engine.cache_length(self.state) < length:
            self.state = engine.grow(length, self.state)

    def _advance(self) -> None:
        longest = max(len(answer.ids) for answer in self.slots if answer)
        self._reserve(longest + self.steps)
        resting = np.asarray([answer is None for answer in self.slots])
        self.state, tokens, logprobs, given = engine.advance(
            self.config, self.runtime, self.needs, self.steps, self.variables, self.state, self.stop_ids, resting
        )
        tokens, logprobs, given = jax.device_get((tokens, logprobs, given))
        for slot, answer in enumerate(self.slots):
            if answer is not None:
                self._take(slot, tokens[slot, : given[slot]], logprobs[slot, : given[slot]])

    def _take(self, slot: int, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        answer = self.slots[slot]
        self.text.add(answer, tokens, logprobs)
        paused = len(answer.ids) == answer.pause_at
        if paused and not answer.finish_reason:
            answer.pause_at = 0
            self.waiting.appendleft(answer)
        if paused or answer.finish_reason:
            self.slots[slot] = None


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Ids of a prompt.

    Conversations go through the chat template, up to where the answer starts; control tokens that a message spells
    are plain text there, as in training. Without a template, messages are joined as text. A text is continued as it
    is, behind what the tokenizer puts in front (a BOS, mostly); ids are taken as they are.
    """
    if isinstance(prompt, str):
        return [*tokenizer.prefix_ids, *tokenizer.encode(prompt)]
    if not prompt or not isinstance(prompt[0], Mapping):
        return [int(number) for number in prompt]
    if tokenizer.renderer is None:
        return encode_prompt(tokenizer, "\n\n".join(str(message["content"]) for message in prompt))
    hidden = [_hide(tokenizer, message) for message in prompt]
    cover = tokenizer.renderer.render(hidden, generation=True)
    return [int(number) for number in tokenizer.encode_ids([tokenizer.unhide_control_tokens(cover)], [cover])[0]]


def _hide(tokenizer: Any, message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, str):
        return dict(message)
    return dict(message) | {"content": tokenizer.hide_control_tokens(content, answer=message["role"] == "assistant")}


def in_compute_dtype(variables: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The matmul weights cast once instead of at every token; norms, routers and scales stay as they are."""
    flat = tree.flatten(variables["params"])
    heavy = {
        path: leaf
        for path, leaf in flat.items()
        if path.endswith(("_proj/weight", "embed_tokens/weight", "lm_head/weight")) and leaf.dtype != jnp.dtype(dtype)
    }
    cast = _cast(heavy, dtype) if heavy else {}
    return variables | {"params": tree.unflatten(flat | cast)}


@functools.partial(jax.jit, static_argnums=1)
def _cast(leaves, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), leaves)


@jax.jit
def _answer_keys(numbers):
    """A key from (seed, prompt, sample)."""

    def one(row):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(row[0]), row[1]), row[2])

    return jax.vmap(one)(numbers)


def _pause_at(config: ModelConfig, prompt_length: int) -> int:
    """The total length at which all frequencies change (longrope), so that everything has to be computed anew; 0: none.

    As transformers' Phi-3: the first forward pass over more than the original length recomputes the cache.
    """
    for rope in config.ropes:
        if rope.scaling is not None and rope.scaling.kind == "longrope":
            original = rope.scaling.original_max_position or config.max_position
            return original + 1 if prompt_length <= original else 0
    return 0


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _bucket(length: int) -> int:
    """The few sizes that prompts and caches have: powers of two from 64 on, and half-way between them from 512."""
    power = max(64, _power_of_two(length))
    between = power * 3 // 4
    return between if power > 512 and length <= between else power
