"""Answers to prompts: batches of ragged prompts, finished rows replaced by waiting ones.

`Generator` holds a model ready to decode; `generate` is the same in one call. An answer depends on the model, its
prompt, the settings and the seed, and not on what else is in the batch: each has its own random key.
`Generator.decoding` takes answers one by one, as a server has them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sftjax import tree
from sftjax.errors import DataError
from sftjax.generate.answer import Answer, Output
from sftjax.generate.decoding import Decoding
from sftjax.generate.sampling import Sampling
from sftjax.models import layers
from sftjax.models.config import ModelConfig
from sftjax.models.layers import Runtime

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


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
          DataError: an empty prompt, or one with a token that the model has no row for.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        if stop_ids is None:
            stop_ids = () if self.tokenizer is None else self.tokenizer.stop_ids
        shared = {"limit": max_new_tokens, "sampling": sampling, "tokenizer": self.tokenizer}
        shared |= {"stop_ids": frozenset(stop_ids), "stop": tuple(stop)}
        answers: list[Answer] = []
        for number, prompt in enumerate(prompts):
            ids = encode_prompt(self.tokenizer, prompt)
            if not ids:
                raise DataError(f"prompt {number} is empty: give at least one token")
            if max(ids) >= self.config.vocab_size:
                raise DataError(f"prompt {number}: {no_row(self.tokenizer, ids, self.config.vocab_size)}")
            for sample in range(n):
                report = None if on_text is None else functools.partial(on_text, len(answers))
                answers.append(Answer(ids, key=(seed, number, sample), on_text=report, **shared))
        if max_new_tokens > 0:
            decoding = self.decoding(stop_ids)
            # The longest first: the cache grows early, and prefills have rows of like length.
            decoding.add(sorted(answers, key=lambda answer: -len(answer.prompt_ids)))
            while decoding.busy:
                decoding.step()
        return [answer.output() for answer in answers]

    def decoding(self, stop_ids: Sequence[int]) -> Decoding:
        """Empty slots, for answers that come one by one."""
        return Decoding(
            self.config,
            self.runtime,
            self.variables,
            stop_ids=stop_ids,
            batch_size=self.batch_size,
            steps=self.steps,
        )


def no_row(tokenizer: Any, ids: Sequence[int], rows: int) -> str:
    """What is wrong with ids beyond the embedding's rows."""
    return f"there is no token {max(ids)}" if tokenizer is None else tokenizer.no_row(ids, rows)


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
    return encode_conversation(tokenizer, prompt, generation=True)


def encode_conversation(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, generation: bool) -> list[int]:
    """Ids of a conversation through the chat template; with `generation`, up to where the next answer starts."""
    hidden = [_hide(tokenizer, message) for message in messages]
    cover = tokenizer.renderer.render(hidden, generation=generation)
    return [int(number) for number in tokenizer.encode_ids([tokenizer.unhide_control_tokens(cover)], [cover])[0]]


def _hide(tokenizer: Any, message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, str):
        return dict(message)
    return dict(message) | {"content": tokenizer.hide_control_tokens(content, answer=message["role"] == "assistant")}


def in_compute_dtype(variables: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The matmul weights cast once instead of at every token; norms, routers and scales stay as they are.

    On a CPU the layers' bfloat16 weights become bits, see `layers.as_bits`. What was done before isn't done again.
    """
    flat = tree.flatten(variables["params"])
    names = ("_proj/weight", "embed_tokens/weight", "lm_head/weight")
    heavy = {path: leaf for path, leaf in flat.items() if path.endswith(names) and leaf.dtype != jnp.uint16}
    cast = {path: leaf for path, leaf in heavy.items() if leaf.dtype != jnp.dtype(dtype)}
    heavy |= _cast(cast, dtype) if cast else {}
    if jnp.dtype(dtype) == jnp.bfloat16 and jax.default_backend() == "cpu":
        heavy |= _as_bits({path: leaf for path, leaf in heavy.items() if path.startswith("layers_")})
    return variables | {"params": tree.unflatten(flat | heavy)}


@functools.partial(jax.jit, static_argnums=1)
def _cast(leaves, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), leaves)


@jax.jit
def _as_bits(leaves):
    return jax.tree.map(layers.as_bits, leaves)


__all__ = ["Generator", "Output", "Prompt", "encode_prompt", "generate", "in_compute_dtype"]
