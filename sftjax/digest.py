"""A digest of arrays that finds any flipped bit and doesn't depend on how many devices hold them.

Computed where the arrays are, at the speed of reading them; nothing is gathered.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

# Odd constants of the splitmix and murmur finalisers; any two unrelated odd pairs would do.
MULTIPLIERS = ((0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F))


def words_of(leaf: jax.Array) -> jax.Array:
    """The bits of an array as uint32 `[..., words]`; exact for every dtype."""
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    bits = jnp.iinfo(leaf.dtype).bits if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.finfo(leaf.dtype).bits
    if bits < 8:  # int4 and such: widening keeps the value, and so the bits
        leaf, bits = leaf.astype(jnp.int8), 8
    if bits >= 32:
        words = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        return words if bits > 32 else words[..., None]
    return jax.lax.bitcast_convert_type(leaf, {8: jnp.uint8, 16: jnp.uint16}[bits]).astype(jnp.uint32)[..., None]


def leaf_digest(leaf: jax.Array) -> jax.Array:
    """Two 32-bit sums over all words of `word * odd hash of its position`, modulo 2^32: uint32 `[2]`.

    Integer addition is associative, so the result doesn't depend on how many devices hold the array. An odd factor
    makes every single-bit change visible; the position in the factor makes exchanged blocks visible.
    """
    words = words_of(leaf)
    words ^= words >> 16  # round floats have empty low halves, which a product never reaches
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, stride in enumerate(_strides(words.shape)):
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
    sums = []
    for first, second in MULTIPLIERS:
        factor = (position + np.uint32(1)) * np.uint32(first)
        factor = (factor ^ (factor >> 15)) * np.uint32(second)
        factor = (factor ^ (factor >> 13)) | np.uint32(1)
        sums.append(jnp.sum(words * factor, dtype=jnp.uint32))
    return jnp.stack(sums)


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


@functools.lru_cache(maxsize=16)
def _jitted_digest(replicated: Sharding | None):
    return jax.jit(leaf_digest, out_shardings=replicated)


def digest(flat: Mapping[str, Any]) -> dict[str, str]:
    """`{path: "float32[2,64] 0123456789abcdef"}` of `{path: array}`; the same on any number of devices."""
    sums = {}
    for path, leaf in flat.items():
        sharding = leaf.sharding if isinstance(leaf, jax.Array) else None
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        sums[path] = _jitted_digest(NamedSharding(mesh, PartitionSpec()) if mesh is not None else None)(leaf)
    return {path: f"{signature(flat[path])} {_hex(value)}" for path, value in sums.items()}


def _hex(sums: jax.Array) -> str:
    return "".join(f"{int(value):08x}" for value in np.asarray(sums))


def signature(leaf: Any) -> str:
    """Dtype and shape, such as "float32[2,64]"."""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
