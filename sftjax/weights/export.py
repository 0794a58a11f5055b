"""A model out, as `transformers` itself would have saved it: streamed, sharded, and whole or not there at all.

A folder is written beside its final name (`.<name>.partial`), flushed to disk, and renamed; so a reader sees all of
an export or none. On `gs://` and the like, where nothing can be renamed, config.json is written last.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
import jax
import numpy as np
from jax.experimental import multihost_utils

import sftjax
from sftjax import tree
from sftjax.errors import ConfigError, StorageError
from sftjax.models.config import ModelConfig
from sftjax.utils import storage
from sftjax.weights import companions, families, hf, rules, safetensors, wrappers
from sftjax.weights.files import Folder, copy_converted, is_remote
from sftjax.weights.hf import ModelFiles

_MARKER = "export.json"  # by it an earlier export of ours is known, and may be replaced


def export_model(
    directory: str | os.PathLike,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    dtype: Any,
    source: ModelFiles | None = None,
    tokenizer: Mapping[str, bytes] | None = None,
    stop_ids: Sequence[int] = (),
    shard_bytes: float = 5e9,
    text_only: bool = False,
) -> list[str]:
    """Writes a model folder: weights, config.json, generation_config.json, tokenizer, README.md.

    With several processes all must call it; each writes its share of the weight files (on a shared file system).

    Args:
      config: where it has a `valid_vocab`, the rows of the embedding from there on are left out.
      params: the parameter tree.
      dtype: of the tensors; or `{tensor name: dtype}` to keep what a mixed checkpoint had.
      source: the model it came from: its family and harmless fields are carried on.
      tokenizer: the tokenizer's files, by name.
      stop_ids: tokens that end an answer; they go to generation_config.json.
      shard_bytes: the largest weight file.
      text_only: of a multimodal model, its language model alone.

    Returns:
      The names of the files.

    Raises:
      ConfigError: the folder holds something else, or the configuration can't be expressed.
      StorageError: it can't be written.
    """
    config = families.exported(config)
    dtypes = {} if not isinstance(dtype, Mapping) else {name: np.dtype(kind) for name, kind in dtype.items()}
    default = np.dtype(dtype) if not dtypes else max(set(dtypes.values()), key=list(dtypes.values()).count)
    options = {"source": source, "tokenizer": tokenizer, "stop_ids": stop_ids, "text_only": text_only}
    beside = companions.files(config, dtype=default.name, **options)
    raw = json.loads(beside["config.json"])
    table = rules.tensors(config, families.FAMILIES[families.family_of(raw)].layout)
    names, rest = wrappers.PLAIN, {}
    if source is not None and not text_only:
        names, rest = source.names, hf.rest_of(source)
    leaves = tree.flatten(params)
    _check_leaves(leaves, config)
    entries = [_Entry(names.stored(tensor.name), dtypes.get(tensor.name, default), tensor) for tensor in table]
    entries += [_Entry(name, stored.dtype, stored) for name, stored in rest.items()]
    shards = _shards(entries, shard_bytes)
    try:
        with _target(directory) as target:
            _write_weights(target, shards, leaves)
            if jax.process_index() == 0:
                configuration = beside.pop("config.json")
                beside["README.md"] = _readme(raw["model_type"], default)
                beside[_MARKER] = companions.to_json(
                    {"written_by": "sftjax", "version": sftjax.__version__, "dtype": default.name}
                )
                for name, text in (beside | {"config.json": configuration}).items():  # that one last
                    target.write(name, text)
    except OSError as error:
        raise StorageError(f"{directory}: the export can't be written ({error.strerror or error})") from error
    return Folder(directory).names()


class _Entry(NamedTuple):
    """A tensor to write: one of the table, made of parameters, or one that is copied from where the model came from."""

    name: str
    dtype: np.dtype
    content: rules.Tensor | safetensors.Stored

    def array(self, leaves: Mapping[str, Any]) -> np.ndarray:
        if isinstance(self.content, rules.Tensor):
            return assemble(self.content, self.dtype, leaves)
        out = np.empty(self.content.shape, self.dtype)
        self.content.read((), out)
        return out


def _check_leaves(leaves: Mapping[str, Any], config: ModelConfig) -> None:
    shapes = rules.leaf_shapes(config)
    vocab = {"embed_tokens/weight", "lm_head/weight"}
    problems = [f"{path} is missing" for path in shapes if path not in leaves]
    problems += [f"{path} is unexpected" for path in leaves if path not in shapes]
    for path, shape in shapes.items():
        have = tuple(leaves[path].shape) if path in leaves else shape
        padded = path in vocab and have[0] >= shape[0] and have[1:] == shape[1:]
        if have != shape and not padded:
            problems.append(f"{path} is {list(have)}, not {list(shape)}")
    if problems:
        raise ConfigError(f"the parameters don't fit the model's configuration: {'; '.join(problems)}")


# -------------------------------------------------------------------------------------------------------- weights


def _shards(tensors: list[_Entry], limit: float) -> list[tuple[str, list[_Entry]]]:
    """Tensors in order, dealt to files of at most `limit` bytes (a larger tensor has a file of its own)."""
    groups: list[list] = [[]]
    used = 0
    for entry in tensors:
        size = math.prod(entry.content.shape) * entry.dtype.itemsize
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(entry)
        used += size
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    count = len(groups)
    return [(f"model-{number:05d}-of-{count:05d}.safetensors", group) for number, group in enumerate(groups, 1)]


def _write_weights(target: _Target, shards: list[tuple[str, list[_Entry]]], leaves: Mapping[str, Any]) -> None:
    total_bytes, total_values, weight_map = 0, 0, {}
    for number, (file_name, tensors) in enumerate(shards):
        mine = number % jax.process_count() == jax.process_index()
        with target.open(file_name) if mine else contextlib.nullcontext() as out:
            if mine:
                entries = [(entry.name, entry.dtype, entry.content.shape) for entry in tensors]
                out.write(safetensors.header_bytes(entries, {"format": "pt"}))
            for entry in tensors:
                array = entry.array(leaves)  # every process takes part: shards come from all
                if mine:
                    safetensors.write_array(out, array)
                total_values += array.size
                total_bytes += array.nbytes
                weight_map[entry.name] = file_name
    if len(shards) > 1 and jax.process_index() == 0:
        metadata = {"total_parameters": total_values, "total_size": total_bytes}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        target.write("model.safetensors.index.json", companions.to_json(index))


def assemble(tensor: rules.Tensor, dtype: np.dtype, leaves: Mapping[str, Any]) -> np.ndarray:
    """One tensor as it is stored, from its parts; `leaves`: parameters by path."""
    if len(tensor.parts) == 1 and not tensor.parts[0].select and not tensor.parts[0].transpose:
        value = _fetch(leaves[tensor.parts[0].path], tensor.parts[0])
        return value if value.dtype == dtype else value.astype(dtype)
    out = np.empty(tensor.shape, dtype)
    for part in tensor.parts:
        value = _fetch(leaves[part.path], part)
        # `out[ints and slices]` is a view, so this writes into the tensor
        copy_converted(value.T if part.transpose else value, out[part.select] if part.select else out)
    return out


def _fetch(leaf: Any, part: rules.Part) -> np.ndarray:
    """One layer's (and expert's) slice on the host."""
    if isinstance(leaf, np.ndarray) or _one_cpu_device(leaf):
        value = np.asarray(leaf)[part.index]  # a view: nothing is copied
    else:
        piece = _take(leaf, part.index)
        local = piece.is_fully_addressable
        value = np.asarray(piece if local else multihost_utils.process_allgather(piece, tiled=True))
    return value[tuple(slice(0, size) for size in part.shape)]


def _one_cpu_device(leaf: jax.Array) -> bool:
    return [device.platform for device in leaf.sharding.device_set] == ["cpu"] and leaf.is_fully_addressable


def _take(leaf: jax.Array, index: tuple[int, ...]) -> jax.Array:
    return _taker(len(index))(leaf, *index)


@functools.cache
def _taker(count: int):
    def take(leaf, *index):
        for at in index:
            leaf = jax.lax.dynamic_index_in_dim(leaf, at, keepdims=False)
        return leaf

    return jax.jit(take)


def _readme(model_type: str, dtype: np.dtype) -> bytes:
    return (
        "---\nlibrary_name: transformers\n---\n\n"
        f"A `{model_type}` model in {dtype.name}, exported by sftjax {sftjax.__version__}.\n"
    ).encode()


# ---------------------------------------------------------------------------------------------------- where it goes


class _Target:
    """A folder being written."""

    def __init__(self, path: str, filesystem: fsspec.AbstractFileSystem | None):
        self.path, self._fs = path, filesystem

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        path = f"{self.path}/{name}"
        if self._fs is not None:
            self._fs.makedirs(os.path.dirname(path), exist_ok=True)
            with self._fs.open(path, "wb") as file:
                yield file
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def write(self, name: str, content: bytes) -> None:
        with self.open(name) as file:
            file.write(content)


@contextlib.contextmanager
def _target(directory: str | os.PathLike) -> Iterator[_Target]:
    with whole_folder(directory) as place:
        filesystem, path = fsspec.core.url_to_fs(place) if is_remote(place) else (None, place)
        yield _Target(path.rstrip("/"), filesystem)


@contextlib.contextmanager
def whole_folder(directory: str | os.PathLike, *, adapter: bool = False) -> Iterator[str]:
    """Gives the folder to write an export into; at the end of the block it takes its final name, and replaces an
    earlier export whole. (A remote one is written in place.) Every process enters it; the first one renames.

    Args:
      directory: where the export goes.
      adapter: it may replace an adapter's folder.

    Raises:
      ConfigError: see `check_replaceable`.
    """
    if is_remote(directory):
        filesystem, path = fsspec.core.url_to_fs(str(directory))
        filesystem.makedirs(path, exist_ok=True)
        yield str(directory)
        _barrier("export written")
        return
    final = Path(os.path.abspath(directory))
    check_replaceable(final, adapter=adapter)
    partial = final.with_name(f".{final.name}.partial")
    if jax.process_index() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier("export started")
    yield str(partial)
    _barrier("export written")
    if jax.process_index() == 0:
        storage.fsync(partial)
        storage.moment("export renaming", str(final))
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        storage.moment("export between", str(final))
        partial.rename(final)
        storage.fsync(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    _barrier("export finished")


def check_replaceable(directory: str | os.PathLike, *, adapter: bool = False) -> None:
    """Raises `ConfigError` if something other than an earlier export (or an adapter, where that may be) is in the
    way."""
    path = Path(directory)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ConfigError(f"{path}: in the way of the export, and not a folder")
    markers = [_MARKER, *(["adapter_config.json"] if adapter else [])]
    if path.is_dir() and any(path.iterdir()) and not any((path / name).is_file() for name in markers):
        raise ConfigError(f"{path}: not empty, and not an earlier export; choose another folder or empty this one")


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"sftjax {name}")
