"""A digest of arrays that finds any flipped bit and doesn't depend on how many devices hold them.

Computed where the arrays are, at the speed of reading them (21 GB/s on two CPU cores); nothing is gathered.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from sftjax import compat

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
    terms = []
    for first, second in MULTIPLIERS:
        factor = (position + np.uint32(1)) * np.uint32(first)
        factor = (factor ^ (factor >> 15)) * np.uint32(second)
        factor = (factor ^ (factor >> 13)) | np.uint32(1)
        terms.append(words * factor)
    zero = np.uint32(0)
    # One reduction of both: XLA:CPU writes out the products before a plain sum (29 times slower, twice the memory).
    sums = jax.lax.reduce(tuple(terms), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(words.ndim)))
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
        replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        if sharding is not None and sharding.memory_kind == compat.HOST_MEMORY:  # where nothing can be computed
            leaf = jax.device_put(leaf, sharding.with_memory_kind("device"))
        sums[path] = compat.in_turn(_jitted_digest(replicated)(leaf))
    found = jax.device_get(sums)
    return {path: f"{signature(flat[path])} {value[0]:08x}{value[1]:08x}" for path, value in found.items()}


def signature(leaf: Any) -> str:
    """Dtype and shape, such as "float32[2,64]"."""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


# --- the document that is saved ---------------------------------------------------------------------------------------


class Damaged(Exception):
    """A checkpoint can't be read, or isn't what was written."""


def as_json(value: Any) -> Any:
    """What reading the JSON of `value` will give: lists for tuples, strings for keys."""
    return json.loads(json.dumps(value))


def _json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def seal(leaves: dict[str, str], documents: dict[str, Any]) -> dict[str, Any]:
    """The digest item: of every leaf, of the JSON documents beside them, and of itself."""
    item = {"leaves": leaves, "documents": {name: _json_digest(value) for name, value in documents.items()}}
    return {**item, "self": _json_digest(item)}


def check_seal(item: Any) -> dict[str, Any]:
    unsigned = {key: item[key] for key in item if key != "self"} if isinstance(item, dict) else {}
    if not unsigned or _json_digest(unsigned) != item.get("self"):
        raise Damaged("its digest file was altered")
    return item


def check_leaves(seal: dict[str, Any], flat: Mapping[str, Any]) -> None:
    found = digest(flat)
    wrong = [path for path in seal["leaves"] if found.get(path) != seal["leaves"][path]]
    if wrong:
        raise Damaged(f"the digest of {wrong[0]} differs" + (f", and of {len(wrong) - 1} more" if wrong[1:] else ""))


def check_documents(seal: dict[str, Any], documents: dict[str, Any]) -> None:
    for name, value in documents.items():
        if _json_digest(value) != seal["documents"].get(name):
            raise Damaged(f"its {name} was altered")
