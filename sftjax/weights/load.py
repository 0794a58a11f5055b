"""Tensors of a checkpoint into (sharded) device arrays, layer by layer.

Host memory stays near the largest single tensor: on the CPU each shard has one aligned buffer, which is filled layer
by layer and becomes the array without a copy; on an accelerator each layer is placed by itself and written into the
stacked array there. A process reads only the bytes that its own devices need, and replicas share one read.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from sftjax import tree
from sftjax.errors import ConfigError
from sftjax.weights.rules import Part, Shape, Tensor

_ALIGNMENT = 64  # what XLA:CPU needs to take a numpy buffer as it is
_IGNORABLE = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias)")
_FLOATS = {"float32", "float16", "bfloat16", "float64"}


class Given(Protocol):
    """A parameter's stored form, as the source has it."""

    def layer(self, repeat: int) -> Mapping[str, np.ndarray] | None:
        """The leaves of one layer; None: the parameter is kept as it is."""


Transform = Callable[[str, jax.Array], Mapping[str, jax.Array] | None]


class Source(Protocol):
    """Where tensors come from: a safetensors folder, a GGUF file."""

    where: str

    def shapes(self) -> Mapping[str, tuple[Shape, str]]:
        """`{name: (shape, dtype name)}`."""

    def read(self, name: str, index: tuple[int | slice, ...], out: np.ndarray) -> None:
        """`out[...] = tensor[index]`, converted to `out`'s dtype."""


def check(source: Source, expected: Iterable[Tensor], *, tied: bool) -> None:
    """Compares a checkpoint's tensors with those the configuration asks for.

    Raises:
      ConfigError: listing every tensor that is missing, unexpected, or has another shape or an unusable dtype.
    """
    have = dict(source.shapes())
    problems = []
    if tied and "lm_head.weight" in have:
        problems += _compare_tied(source)
        have.pop("lm_head.weight")
    for tensor in expected:
        if tensor.name not in have:
            problems.append(f"{tensor.name} {list(tensor.shape)} is missing")
            continue
        shape, dtype = have.pop(tensor.name)
        if shape != tensor.shape:
            problems.append(f"{tensor.name} is {list(shape)}, not {list(tensor.shape)}")
        if dtype not in _FLOATS:
            problems.append(f"{tensor.name} is {dtype}, not a float")
    problems += [f"{name} {list(have[name][0])} is unexpected" for name in have if not _IGNORABLE.fullmatch(name)]
    if problems:
        more = f"; and {len(problems) - 200} more" if len(problems) > 200 else ""
        raise ConfigError(
            f"{source.where}: the tensors don't fit config.json, {len(problems)} differences: "
            f"{'; '.join(problems[:200])}{more}"
        )


def _compare_tied(source: Source) -> list[str]:
    """A tied model's file may repeat the embedding as lm_head; a different one would be lost without a word."""
    shapes = source.shapes()
    head, embedding = shapes["lm_head.weight"], shapes.get("model.embed_tokens.weight")
    if embedding is None or head[0] != embedding[0]:
        return [f"lm_head.weight {list(head[0])} beside a tied embedding"]
    rows, columns = head[0]
    step = max(1, 2**24 // max(1, columns))
    for first in range(0, rows, step):
        at = (slice(first, min(rows, first + step)),)
        pair = [np.empty((at[0].stop - first, columns), np.float32) for _ in range(2)]
        source.read("lm_head.weight", at, pair[0])
        source.read("model.embed_tokens.weight", at, pair[1])
        if not np.array_equal(*pair):
            return ["lm_head.weight differs from the embedding, but tie_word_embeddings is true: set it to false"]
    return []


# -------------------------------------------------------------------------------------------------------- loading


def load(
    source: Source,
    tensors: Iterable[Tensor],
    shapes: Mapping[str, Shape],
    dtype: Any,
    shardings: Mapping[str, Any] | None = None,
    transform: Transform | None = None,
    transform_shardings: Mapping[str, Any] | None = None,
    given: Mapping[str, Given] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameter tree, and the tree of what `transform` made.

    Args:
      tensors, shapes: from `weights.rules`.
      dtype: of the parameters.
      shardings: tree like the parameters; None: the default device.
      transform: `(path, weight [out, in] of one layer) -> {name: array}` in place of the parameter (quantisation), or
        None to keep it. The results, stacked over the leading axes, are at `<path without its last name>/<name>`.
      transform_shardings: tree for those; None: as XLA puts them.
      given: `{path: what stands in for transform}` where the source has the stored form itself.
    """
    dtype = np.dtype(dtype)
    by_path: dict[str, list[tuple[str, Shape, Part]]] = {path: [] for path in shapes}
    for tensor in tensors:
        for part in tensor.parts:
            by_path[part.path].append((tensor.name, tensor.shape, part))
    placed = tree.flatten(shardings) if shardings is not None else {}
    extra_placed = tree.flatten(transform_shardings) if transform_shardings is not None else {}
    default = SingleDeviceSharding(jnp.zeros(()).devices().pop())
    kept: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for path, pieces in by_path.items():
            leaf = _Leaf(source, pieces, shapes[path], dtype, pool)
            sharding = placed[path] if shardings is not None else default
            made = None
            if given and path in given:
                made = _load_made(leaf, path, given[path].layer, extra_placed)
            elif transform is not None and len(leaf.shape) > 2:
                layer = functools.partial(_transformed_layer, leaf, path, sharding, transform)
                made = _load_made(leaf, path, layer, extra_placed)
            if made is not None:
                extra |= made
            else:
                kept[path] = _load_leaf(leaf, sharding)
    return tree.unflatten(kept), tree.unflatten(extra)


class _Leaf:
    """A parameter about to be read: which slices of which tensors fill it."""

    def __init__(self, source: Source, pieces: list, shape: Shape, dtype: np.dtype, pool: ThreadPoolExecutor):
        self.source, self.shape, self.dtype, self._pool = source, shape, dtype, pool
        self.pieces = {part.index: (name, whole, part) for name, whole, part in pieces}

    def fill(self, index: tuple[slice, ...]) -> np.ndarray:
        """`leaf[index]` read into a new aligned buffer; slices must have a step of 1."""
        spans = [range(size)[at] for at, size in zip(index, self.shape, strict=True)]
        out = _aligned_empty(tuple(map(len, spans)), self.dtype)
        jobs = []
        for at, piece in self.pieces.items():
            if all(number in span for number, span in zip(at, spans, strict=False)):
                local = tuple(number - span.start for number, span in zip(at, spans, strict=False))
                jobs.append((piece, out[local] if local else out, spans[len(at) :]))
        list(self._pool.map(lambda job: self._read(*job), jobs))
        return out

    def _read(self, piece: tuple[str, Shape, Part], out: np.ndarray, spans: list[range]) -> None:
        name, whole, part = piece
        self.source.read(name, compose(part, whole, spans), out.T if part.transpose else out)


def compose(part: Part, shape: Shape, spans: list[range]) -> tuple[int | slice, ...]:
    """The index into a tensor of `shape` that is `part`, cut to `spans` on the part's own axes."""
    select = part.select + (slice(None),) * (len(shape) - len(part.select))
    spans = spans[::-1] if part.transpose else spans
    rest, index = iter(spans), []
    for at, size in zip(select, shape, strict=True):
        if isinstance(at, slice):
            span = next(rest)
            chosen = range(size)[at][span.start : span.stop]
            index.append(slice(chosen.start, chosen.stop, chosen.step))
        else:
            index.append(at)
    return tuple(index)


def _aligned_empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    count = math.prod(shape) * dtype.itemsize
    raw = np.empty(count + _ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % _ALIGNMENT
    return raw[first : first + count].view(dtype).reshape(shape)


def _load_leaf(leaf: _Leaf, sharding: Sharding) -> jax.Array:
    """On the CPU the buffers read are the array; elsewhere stacks are written layer by layer on the device."""
    if _fills_in_place(sharding) or not _stacked(leaf, sharding):
        return _place(leaf.shape, sharding, leaf.fill)
    stack = _zeros(leaf.shape, leaf.dtype, sharding)
    for repeat in range(leaf.shape[0]):
        piece = _load_layer(leaf, sharding, repeat)
        stack = _write(stack, piece, repeat, sharding)
        jax.block_until_ready(piece)  # so that the host holds one layer, not a queue of them
    return stack


def _fills_in_place(sharding: Sharding) -> bool:
    return all(device.platform == "cpu" for device in sharding.device_set)


def _stacked(leaf: _Leaf, sharding: Sharding) -> bool:
    if () in leaf.pieces:
        return False
    return not (isinstance(sharding, NamedSharding) and len(sharding.spec) > 0 and sharding.spec[0] is not None)


def _load_layer(leaf: _Leaf, sharding: Sharding, repeat: int) -> jax.Array:
    """`leaf[repeat]` on its devices."""
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return _place(leaf.shape[1:], sharding, lambda index: leaf.fill((slice(repeat, repeat + 1), *index))[0])


def _place(shape: Shape, sharding: Sharding, fill: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
    """An array from one buffer per different shard; devices with the same shard share the read."""
    by_index: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        spans = tuple(at.indices(size)[:2] for at, size in zip(index or (), shape, strict=True))
        by_index.setdefault(spans, []).append(device)
    arrays = []
    for spans, devices in by_index.items():
        buffer = fill(tuple(slice(*span) for span in spans))
        arrays += [jax.device_put(buffer if first == 0 else buffer.copy(), d) for first, d in enumerate(devices)]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _load_made(
    leaf: _Leaf, path: str, make: Callable[[int], Mapping[str, Any] | None], placed: Mapping[str, Any]
) -> dict[str, jax.Array] | None:
    """What `make` gives for each layer, stacked; None where it keeps the parameter."""
    stacks: dict[str, jax.Array] = {}
    module = path.rpartition("/")[0]
    for repeat in range(leaf.shape[0]):
        made = make(repeat)
        if made is None:
            return None
        for name, value in made.items():
            where = f"{module}/{name}"
            if repeat == 0:
                stacks[where] = _zeros((leaf.shape[0], *value.shape), value.dtype, placed.get(where))
            stacks[where] = _write(stacks[where], value, repeat, placed.get(where))
        jax.block_until_ready(made)
    return stacks


def _transformed_layer(
    leaf: _Leaf, path: str, sharding: Sharding, transform: Transform, repeat: int
) -> dict[str, jax.Array] | None:
    layer = _load_layer(leaf, sharding, repeat)
    if layer.ndim == 2:
        made = transform(path, layer)
        return None if made is None else dict(made)
    experts = [transform(path, layer[expert]) for expert in range(layer.shape[0])]
    if experts[0] is None:
        return None
    return {name: jnp.stack([made[name] for made in experts]) for name in experts[0]}


def _zeros(shape: Shape, dtype: Any, sharding: Sharding | None) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


def _write(stack: jax.Array, piece: jax.Array, at: int, sharding: Sharding | None) -> jax.Array:
    return _writer(sharding)(stack, piece, at)


@functools.lru_cache(maxsize=256)
def _writer(sharding: Sharding | None):
    def write(stack, piece, at):
        return jax.lax.dynamic_update_index_in_dim(stack, piece, at, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
