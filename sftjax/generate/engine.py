"""Slots of a batch that decode together, on the device.

Shapes: `B` slots, `N` rows of a prefill, `T` their padded length, `S` cache slots, `V` vocabulary, `C` steps at a time.

A slot holds one answer in the making. `prefill` runs prompts and gives their cache; `insert` puts prefilled rows into
slots; `advance` decodes all slots for up to C steps in one program, without the host in between. Shapes come in few
sizes, so that programs are few.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sftjax.generate import sampling
from sftjax.models import decoder
from sftjax.models.config import ModelConfig
from sftjax.models.layers import BATCH, Runtime

Array = jax.Array
State = dict[str, Any]


def new_state(config: ModelConfig, runtime: Runtime, slots: int, length: int, *, penalty: bool) -> State:
    """Empty slots.

    The state's arrays:
      cache: see `decoder.init_cache`.
      token, position: `[B]` the last token (not yet in the cache) and where it stands.
      left: `[B]` tokens that may still come; 0: the slot rests.
      settings: `[B]` each, see `sampling.Sampling`.
      key: `[B]` random keys, one per answer. seen: bool `[B, V]`, or None without repetition penalties.
    """
    return _new_state(config, runtime, slots, length, penalty)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _new_state(config, runtime, slots, length, penalty):
    cache = decoder.init_cache(config, slots, length, runtime.compute_dtype)
    return {
        "cache": _place_cache(runtime, cache),
        "token": jnp.zeros(slots, jnp.int32),
        "position": jnp.zeros(slots, jnp.int32),
        "left": jnp.zeros(slots, jnp.int32),
        "settings": sampling.as_arrays([sampling.Sampling()] * slots),
        "key": jax.random.split(jax.random.key(0), slots),
        "seen": jnp.zeros((slots, config.vocab_size), bool) if penalty else None,
    }


def cache_length(state: State) -> int:
    return jax.tree.leaves(state["cache"])[0].shape[3]


@functools.partial(jax.jit, static_argnums=(0, 1))
def resize(runtime: Runtime, length: int, state: State, picks: Array) -> State:
    """The same answers in other slots, with room for `length` positions.

        slots  a . b .    picks [0, 2]             a b
        slots  a b        picks [0, 1, -1, -1]     a b . .

    Args:
      picks: i32 `[B']`, the slot that each of the new ones continues; -1: none, it rests.
    """
    source = jnp.maximum(picks, 0)

    def move(leaf: Array) -> Array:
        leaf = leaf[:, source, :, : min(length, leaf.shape[3])]
        return jnp.pad(leaf, [(0, 0)] * 3 + [(0, length - leaf.shape[3]), (0, 0)])

    cache = _place_cache(runtime, jax.tree.map(move, state["cache"]))
    moved = jax.tree.map(lambda leaf: leaf[source], {name: state[name] for name in state if name != "cache"})
    return moved | {"cache": cache, "left": jnp.where(picks < 0, 0, moved["left"])}


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(config: ModelConfig, runtime: Runtime, variables, tokens_NxT: Array, lengths_N: Array):
    """Runs prompts.

    Args:
      tokens_NxT: padded behind.
      lengths_N: their true lengths.

    Returns:
      their cache `[repeat, N, G, T, K]`, and f32 logits `[N, V]` of what follows each.
    """
    rows, length = tokens_NxT.shape
    cache = _place_cache(runtime, decoder.init_cache(config, rows, length, runtime.compute_dtype))
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens_NxT.shape)
    hidden, cache = decoder.decode(
        config, runtime, variables, tokens_NxT, positions, cache, prefill=True, lengths=lengths_N
    )
    last = jnp.take_along_axis(hidden, (lengths_N - 1)[:, None, None], axis=1)[:, 0]
    return cache, decoder.logits(config, runtime, variables, last)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def insert(config: ModelConfig, needs: sampling.Needs, state: State, cache, logits_NxV: Array, rows: dict[str, Any]):
    """Puts prefilled rows into slots and chooses each one's first token.

    Args:
      cache, logits_NxV: from `prefill`.
      rows: for each of the M answers that start: "row" i32 `[M]` of the prefill, "slot" (past the end: nothing is
        written), "length" of its tokens so far, "left" tokens that may come, "key", "settings" `{name: [M]}`, and with
        penalties "seen" bool `[M, V]`.

    Returns:
      the state; and what each new row starts with, see `advance`, leaves `[M, 1]` and `[M, 1, TOP]`.
    """
    slot = rows["slot"]
    chosen = _choose(logits_NxV[rows["row"]], rows, _step_keys(rows["key"], rows["length"]), needs)
    token = chosen["token"]

    def write(old: Array, new: Array) -> Array:
        return old.at[slot].set(new.astype(old.dtype) if old.dtype != new.dtype else new, mode="drop")

    def write_cache(old: Array, new: Array) -> Array:
        length = min(new.shape[3], old.shape[3])
        return old.at[:, slot, :, :length].set(new[:, rows["row"], :, :length], mode="drop")

    state = state | {
        "cache": jax.tree.map(write_cache, state["cache"], cache),
        "token": write(state["token"], token),
        "position": write(state["position"], rows["length"]),
        "left": write(state["left"], rows["left"]),
        "settings": jax.tree.map(write, state["settings"], rows["settings"]),
        "key": write(state["key"], rows["key"]),
    }
    if needs.penalty:
        seen = rows["seen"].at[jnp.arange(len(slot)), token].set(True)
        state["seen"] = state["seen"].at[slot].set(seen, mode="drop")
    return state, jax.tree.map(lambda leaf: leaf[:, None], chosen)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def advance(
    config: ModelConfig,
    runtime: Runtime,
    needs: sampling.Needs,
    steps: int,
    variables,
    state: State,
    stop_ids: Array,
    resting: Array,
):
    """Decodes every slot that isn't at rest, until all rest or `steps` are done.

    Args:
      stop_ids: i32 `[n]`; a slot rests once it gave one of them.
      resting: bool `[B]`: slots that the host has freed.

    Returns:
      the state; `{"token": i32 [B, steps], "logprob": f32 [B, steps]}`, and where `needs.top` also "top_token" and
      "top_logprob" `[B, steps, TOP]`; and how many of these each slot gave, `[B]`.
    """
    slots = state["token"].shape[0]
    state = state | {"left": jnp.where(resting, 0, state["left"])}

    def unfinished(carry):
        step, state = carry[:2]
        return (step < steps) & jnp.any(state["left"] > 0)

    def one_step(carry):
        step, state, drawn, given = carry
        active = state["left"] > 0
        # resting slots write past the cache's end, that is, nowhere
        at = jnp.where(active, state["position"], cache_length(state))
        hidden, cache = decoder.decode(
            config,
            runtime,
            variables,
            state["token"][:, None],
            at[:, None],
            state["cache"],
            lengths=state["position"] + 1,
        )
        logits = decoder.logits(config, runtime, variables, hidden[:, 0])
        keys = _step_keys(state["key"], state["position"] + 1)
        chosen = _choose(logits, state, keys, needs)
        token = jnp.where(active, chosen["token"], state["token"])
        stopped = jnp.any(token[:, None] == stop_ids[None, :], axis=1)
        state = state | {
            "cache": cache,
            "token": token,
            "position": state["position"] + active,
            "left": jnp.where(stopped, 0, jnp.maximum(state["left"] - 1, 0)),
        }
        if needs.penalty:
            state["seen"] = state["seen"].at[jnp.arange(slots), token].max(active)
        drawn = {name: jax.lax.dynamic_update_index_in_dim(drawn[name], leaf, step, 1) for name, leaf in chosen.items()}
        return step + 1, state, drawn, given + active

    empty = {"token": jnp.zeros((slots, steps), jnp.int32), "logprob": jnp.zeros((slots, steps), jnp.float32)}
    if needs.top:
        shape = (slots, steps, min(sampling.TOP, config.vocab_size))
        empty |= {"top_token": jnp.zeros(shape, jnp.int32), "top_logprob": jnp.zeros(shape, jnp.float32)}
    carry = (0, state, empty, jnp.zeros(slots, jnp.int32))
    _, state, drawn, given = jax.lax.while_loop(unfinished, one_step, carry)
    drawn, given = jax.tree.map(lambda part: runtime.constrain(part, *[None] * part.ndim), (drawn, given))
    return state, drawn, given


def _choose(logits: Array, rows: dict[str, Any], keys: Array, needs: sampling.Needs) -> dict[str, Array]:
    token, logprob = sampling.choose(logits, rows["seen"], rows["settings"], keys, needs)
    chosen = {"token": token, "logprob": logprob}
    if needs.top:
        chosen["top_token"], chosen["top_logprob"] = sampling.likeliest(logits)
    return chosen


def _step_keys(keys: Array, lengths: Array) -> Array:
    """A key for each token, by the answer's key and the token's position: the batch it is decoded in plays no part."""
    return jax.vmap(jax.random.fold_in)(keys, lengths)


def _place_cache(runtime: Runtime, cache):
    return jax.tree.map(lambda leaf: runtime.constrain(leaf, None, BATCH, "tensor", None, None), cache)


__all__ = ["advance", "cache_length", "insert", "new_state", "prefill", "resize"]
