"""Adam whose moments take two or four bytes a parameter instead of eight.

8 bit: block-wise dynamic-tree quantisation (arXiv:2110.02861), a float32 maximum for each block of at most 256 numbers
of a row: 2.03 bytes a parameter. The second moment is kept as its square root, which is what the update divides by:
the map's seven decades then cover seven decades of gradient size, not three and a half, so that no small gradient
meets a second moment that was rounded to nothing. bfloat16: four bytes. Both are rounded stochastically, because an
average that moves by a thousandth a step would otherwise never move.

Parameters of fewer than 4,096 numbers a layer (norms, biases) keep float32 moments, as in bitsandbytes.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sftjax import tree
from sftjax.kernels import blockwise

Array = jax.Array
SMALL = 4096


class Adam8bitState(NamedTuple):
    """Trees like the parameters. Codes have a parameter's shape (u8; small ones the float32 moment itself), scales
    `[..., blocks]` (small ones an unused `[1]`: Orbax can't save an array without elements)."""

    count: Array
    mu_codes: Any
    mu_scales: Any
    nu_codes: Any
    nu_scales: Any


class AdamBf16State(NamedTuple):
    count: Array
    key: Array  # raw key data of the rounding
    mu: Any
    nu: Any


def scale_by_adam_8bit(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, last_axis_shards: int = 1
) -> optax.GradientTransformation:
    """Adam's direction from 8-bit moments; the arithmetic is float32, the new moments are rounded after use.

    Args:
      last_axis_shards: into how many parts a last axis may be cut by sharding; blocks don't cross them.
    """

    def init(params):
        flat = tree.flatten(params)
        codes, scales = {}, {}
        for path, param in flat.items():
            if _is_small(path, param.shape):
                codes[path], scales[path] = jnp.zeros(param.shape, jnp.float32), jnp.zeros((1,), jnp.float32)
                continue
            block = blockwise.block_size(param.shape[-1], last_axis_shards)
            codes[path] = jnp.zeros(param.shape, jnp.uint8)
            scales[path] = jnp.zeros((*param.shape[:-1], param.shape[-1] // block), jnp.float32)
        # separate buffers: a donated state must not hold one array twice
        copies = [tree.unflatten({path: jnp.array(leaf) for path, leaf in t.items()}) for t in (codes, scales) * 2]
        return Adam8bitState(jnp.zeros([], jnp.int32), *copies)

    def update(updates, state, params=None):
        del params
        count = state.count + 1

        def one(gradient, mu_codes, mu_scales, nu_codes, nu_scales, seed):
            mu = _load(mu_codes, mu_scales, signed=True)
            root = _load(nu_codes, nu_scales, signed=False)
            gradient = gradient.astype(jnp.float32)
            mu = b1 * mu + (1 - b1) * gradient
            nu = b2 * jnp.square(root) + (1 - b2) * jnp.square(gradient)
            return (
                _direction(mu, nu, count, b1, b2, eps),
                *_store(mu, mu_codes, mu_scales, seed, signed=True),
                *_store(jnp.sqrt(nu), nu_codes, nu_scales, seed + 1, signed=False),
            )

        old = [tree.flatten(t) for t in state[1:]]
        new: list[dict[str, Array]] = [{} for _ in range(5)]
        for path, gradient in tree.flatten(updates).items():
            arguments = (gradient, *(t[path] for t in old))
            seed = count.astype(jnp.uint32) * 2 + np.uint32(zlib.crc32(path.encode()))
            if _is_stacked(path) and arguments[1].dtype == jnp.uint8:
                # A layer at a time: float32 moments of all at once would take what 8 bits save.
                seeds = seed + jnp.arange(gradient.shape[0], dtype=jnp.uint32) * np.uint32(0x85EBCA6B)
                results = jax.lax.map(lambda args: one(*args), (*arguments, seeds))
            else:
                results = one(*arguments, seed)
            for flat, result in zip(new, results, strict=True):
                flat[path] = result
        direction, *moments = new
        return _like(updates, direction), Adam8bitState(count, *(tree.unflatten(t) for t in moments))

    return optax.GradientTransformation(init, update)


def scale_by_adam_bf16(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, seed: int = 0
) -> optax.GradientTransformation:
    """Adam's direction from bfloat16 moments, rounded stochastically."""

    def init(params):
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.bfloat16), params)  # noqa: E731
        return AdamBf16State(jnp.zeros([], jnp.int32), jax.random.key_data(jax.random.key(seed)), zeros(), zeros())

    def update(updates, state, params=None):
        del params
        count = state.count + 1
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), count)
        old_mu, old_nu = tree.flatten(state.mu), tree.flatten(state.nu)
        direction, new_mu, new_nu = {}, {}, {}
        for path, gradient in tree.flatten(updates).items():
            gradient = gradient.astype(jnp.float32)
            mu = b1 * old_mu[path].astype(jnp.float32) + (1 - b1) * gradient
            nu = b2 * old_nu[path].astype(jnp.float32) + (1 - b2) * jnp.square(gradient)
            direction[path] = _direction(mu, nu, count, b1, b2, eps)
            key_mu, key_nu = jax.random.split(path_key(step_key, path))
            new_mu[path], new_nu[path] = round_stochastically(key_mu, mu), round_stochastically(key_nu, nu)
        state = AdamBf16State(count, state.key, tree.unflatten(new_mu), tree.unflatten(new_nu))
        return _like(updates, direction), state

    return optax.GradientTransformation(init, update)


def round_stochastically(key: Array, x: Array) -> Array:
    """float32 to bfloat16, up or down with probabilities that make the expectation exact."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type(((bits + noise) >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), cut, x.astype(jnp.bfloat16))


def path_key(key: Array, path: str) -> Array:
    """A key of its own for each path."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def state_bytes(state: Any) -> int:
    """Bytes of an optimizer state (arrays or shapes)."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _direction(mu: Array, nu: Array, count: Array, b1: float, b2: float, eps: float) -> Array:
    step = count.astype(jnp.float32)
    return (mu / (1 - b1**step)) / (jnp.sqrt(nu / (1 - b2**step)) + eps)


def _is_small(path: str, shape: tuple[int, ...]) -> bool:
    return math.prod(shape[_is_stacked(path) :]) < SMALL


def _is_stacked(path: str) -> bool:
    return path.startswith("layers_") or "/layers_" in path


def _load(codes: Array, scales: Array, *, signed: bool) -> Array:
    return codes if codes.dtype == jnp.float32 else blockwise.dequantise(codes, scales, signed=signed)


def _store(moment: Array, codes: Array, scales: Array, seed: Array, *, signed: bool) -> tuple[Array, Array]:
    if codes.dtype == jnp.float32:
        return moment, scales
    noise = blockwise.hash_noise(moment.shape, seed)
    return blockwise.quantise(moment, codes.shape[-1] // scales.shape[-1], signed=signed, noise=noise)


def _like(template: tree.Tree, flat: dict[str, Array]) -> tree.Tree:
    return tree.map_paths(lambda path, _: flat[path], template)
