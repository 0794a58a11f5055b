"""From logits to the next token: greedy, or a draw from the filtered distribution.

Shapes: `B` rows, `V` vocabulary, `C` candidates. Every setting is an array `[B]`, so that rows with different settings
share one program; what no row asks for is left out of the program (`Needs`).

Order and meaning are those of transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sftjax.errors import ConfigError

Array = jax.Array
_CANDIDATES = 128  # the filters look at so many of the largest first; they seldom reach further
TOP = 20  # alternatives that a token can have reported beside it


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a row's tokens are chosen.

    Attributes:
      temperature: divides the logits; 0: greedy, and the filters mean nothing.
      top_k: only the k largest; 0: all.
      top_p: only the largest that together reach this probability.
      min_p: only those with at least this share of the largest's probability.
      repetition_penalty: divides positive logits (multiplies negative ones) of tokens that the prompt or the answer
        already has (arXiv:1909.05858).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ConfigError(f"{self}: temperature and top_k are at least 0, top_p in (0, 1], min_p in [0, 1]")
        if self.repetition_penalty <= 0:
            raise ConfigError(f"repetition_penalty {self.repetition_penalty}: must be positive")


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a batch's rows ask for, all together; static."""

    draw: bool = False  # not all greedy
    filters: bool = False
    penalty: bool = False
    top: bool = False  # the likeliest tokens are reported

    @classmethod
    def of(cls, settings: list[Sampling], *, top: bool = False) -> Needs:
        drawn = [each for each in settings if each.temperature > 0]
        return cls(
            draw=bool(drawn),
            filters=any(each.top_k or each.top_p < 1 or each.min_p for each in drawn),
            penalty=any(each.repetition_penalty != 1 for each in settings),
            top=top,
        )

    def __or__(self, other: Needs) -> Needs:
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Needs(*(one or two for one, two in zip(mine, others, strict=True)))


def choose(
    logits: Array, seen: Array | None, settings: dict[str, Array], keys: Array, needs: Needs
) -> tuple[Array, Array]:
    """The next token of each row and its log-probability under the model itself.

    Args:
      logits: f32 `[B, V]`; -inf: never.
      seen: bool `[B, V]`, tokens that the repetition penalty hits (only if `needs.penalty`).
      settings: Sampling's fields as arrays `[B]`.
      keys: `[B]` random keys.

    Returns:
      i32 `[B]`, f32 `[B]`.
    """
    raw = logits
    if needs.penalty:
        penalty = settings["repetition_penalty"][:, None]
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    chosen = _argmax(logits)
    if needs.draw:
        warm = settings["temperature"]
        scaled = logits / jnp.where(warm > 0, warm, 1.0)[:, None]
        uniform = jax.vmap(jax.random.uniform)(keys)
        drawn = _draw(scaled, uniform)
        if needs.filters:  # rows without filters draw as they do alone
            drawn = jnp.where(_filtered(settings), _draw_filtered(scaled, settings, uniform), drawn)
        chosen = jnp.where(warm > 0, drawn, chosen)
    picked = jnp.take_along_axis(raw, chosen[:, None], axis=-1)[:, 0]
    return chosen, picked - jax.nn.logsumexp(raw, axis=-1)


def likeliest(logits: Array) -> tuple[Array, Array]:
    """The TOP likeliest tokens under the model itself: ids i32 and log-probabilities f32 `[B, TOP]`, descending."""
    values, tokens = jax.lax.top_k(logits, min(TOP, logits.shape[-1]))
    return tokens.astype(jnp.int32), values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _filtered(settings: dict[str, Array]) -> Array:
    return (settings["top_k"] > 0) | (settings["top_p"] < 1) | (settings["min_p"] > 0)


def _argmax(logits: Array) -> Array:
    """The first place of the largest: two plain reductions (XLA:CPU's argmax takes 20 ms of a step, these 2)."""
    places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits == largest, places, logits.shape[-1] - 1), axis=-1)


def _draw(logits: Array, uniform: Array) -> Array:
    """By inverting the cumulative distribution: one random number a row."""
    shares = jax.nn.softmax(logits, axis=-1)
    return _invert(shares, uniform)


def _draw_filtered(logits: Array, settings: dict[str, Array], uniform: Array) -> Array:
    """Among the largest candidates if these settle it for every row, else among all: the same draw either way."""
    vocab = logits.shape[-1]
    top = jax.nn.logsumexp(logits, axis=-1)
    few = min(vocab, _CANDIDATES)
    values, tokens = jax.lax.top_k(logits, few)
    reached = jnp.sum(jnp.exp(values - top[:, None]), axis=-1) >= settings["top_p"]
    by_k = (settings["top_k"] > 0) & (settings["top_k"] <= few)
    by_min = values[:, -1] - values[:, 0] < jnp.log(settings["min_p"])
    idle = (settings["temperature"] == 0) | ~_filtered(settings)  # what is drawn for them isn't used
    # top_p counts probability among those that top_k left, which is more than among all: `reached` is on the safe side
    settled = by_k | (reached & (settings["top_p"] < 1) & (settings["top_k"] == 0)) | by_min | idle

    def among_few(_):
        return _invert_sorted(values, tokens, top, settings, uniform)

    def among_all(_):
        return _invert_sorted(*jax.lax.top_k(logits, vocab), top, settings, uniform)

    return jax.lax.cond(jnp.all(settled), among_few, among_all, None)


def _invert_sorted(values: Array, tokens: Array, top: Array, settings: dict[str, Array], uniform: Array) -> Array:
    """Filters candidates in descending order, and draws.

    Args:
      values: `[B, C]` logits, descending. tokens: `[B, C]` their ids. top: `[B]` logsumexp of all logits.
    """
    rank = jnp.arange(values.shape[-1])[None, :]
    k = settings["top_k"][:, None]
    by_k = (k == 0) | (rank < k)
    mass = jnp.where(by_k, jnp.exp(values - top[:, None]), 0.0)
    total = jnp.where(settings["top_k"] > 0, jnp.sum(mass, axis=-1), 1.0)[:, None]
    before = jnp.cumsum(mass, axis=-1) - mass
    by_p = (before / total < settings["top_p"][:, None]) | (rank == 0)
    by_min = values - values[:, :1] >= jnp.log(settings["min_p"])[:, None]
    place = _invert(jnp.where(by_p & by_min, mass, 0.0), uniform)
    return jnp.take_along_axis(tokens, place[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _invert(mass: Array, uniform: Array) -> Array:
    """The place at which the cumulative mass passes `uniform` of the whole; never one without mass."""
    total = jnp.cumsum(mass, axis=-1)
    place = jnp.sum(total <= uniform[:, None] * total[:, -1:], axis=-1)
    last = mass.shape[-1] - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=-1)
    return jnp.minimum(place, last).astype(jnp.int32)


def as_arrays(settings: list[Sampling]) -> dict[str, Any]:
    """Rows' settings as arrays `[B]`."""
    fields = dataclasses.fields(Sampling)
    types = {"top_k": jnp.int32}
    return {
        field.name: jnp.asarray([getattr(each, field.name) for each in settings], types.get(field.name, jnp.float32))
        for field in fields
    }
