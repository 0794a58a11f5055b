"""Models in Hugging Face layout (and GGUF files): opened, checked, loaded.

files = open_model("path/to/folder")        # or a .gguf file, or a hub id
params = load_params(files, files.config, "bfloat16", shardings)
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig
from sftjax.weights import families, gguf, load, quantised, rules, safetensors, wrappers
from sftjax.weights.files import Folder, is_remote

_HUB_ID = re.compile(r"[\w][\w.\-]*/[\w][\w.\-]*", re.ASCII)
# Beside the weights; in folders are only copies in other formats (`original/`, `onnx/`), but for chat templates.
_SMALL_FILES = ["*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken"]


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model on disk, its configuration read and understood; no tensor has been read yet."""

    path: str  # the folder, or the .gguf file
    config: ModelConfig
    raw_config: Mapping[str, Any]  # config.json as it was; for GGUF as transformers would write it
    generation: Mapping[str, Any]  # generation_config.json, or {}
    ignored: Sequence[str] = ()  # fields of config.json that neither this program nor transformers looks at
    names: wrappers.Names = wrappers.PLAIN  # where the files keep the language model of a multimodal one

    @property
    def is_wrapped(self) -> bool:
        return wrappers.text_config(self.raw_config) is not None

    @property
    def is_gguf(self) -> bool:
        return self.path.endswith(".gguf")

    @property
    def family(self) -> families.Family:
        return families.FAMILIES[families.family_of(self.raw_config)]


def open_model(path: str | os.PathLike) -> ModelFiles:
    """Finds a model: an HF folder (local or `gs://`), a `.gguf` file, or a hub id (`owner/name[@revision]`).

    Raises:
      ConfigError: there is no such model, or its config.json isn't understood.
      StorageError: it can't be read.
    """
    path = resolve(path)
    if path.endswith(".gguf"):
        raw = gguf.read_config(path)
        return ModelFiles(path, families.read_config(raw, path), raw, gguf.read_generation(path))
    folder = Folder(path)
    names = folder.names()
    if "config.json" not in names:
        hint = "; adapter_config.json is there: give its base model, and this folder as the adapter"
        hint = hint if "adapter_config.json" in names else ""
        raise ConfigError(f"{path}: no config.json, so not a model in Hugging Face layout{hint}")
    raw = _read_json(folder, "config.json")
    generation = _read_json(folder, "generation_config.json") if "generation_config.json" in names else {}
    wrapped = wrappers.text_config(raw) is not None
    stored = safetensors.open_folder(folder) if wrapped else {}
    place = wrappers.find_names(stored)
    if wrapped and raw.get("tie_word_embeddings") is None and place.stored("lm_head.weight") in stored:
        raw["tie_word_embeddings"] = False
    config, ignored = families.read_fields(raw, f"{path}/config.json")
    return ModelFiles(path, config, raw, generation, ignored, place)


def resolve(path: str | os.PathLike) -> str:
    """A local path or URL for a path, URL or hub id; downloads the latter where there is a network."""
    path = os.fspath(path)
    if is_remote(path) or os.path.isdir(path) or (os.path.isfile(path) and path.endswith(".gguf")):
        return path
    if os.path.exists(path):
        raise ConfigError(f"{path}: neither a folder nor a .gguf file")
    name, _, revision = path.partition("@")
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(f"{path}: no such folder or .gguf file")
    try:
        return _download(name, revision or None)
    except Exception as error:  # the hub's errors share no base class; all mean the same here
        raise ConfigError(
            f"{path}: no such folder here, and the hub can't provide it ({type(error).__name__}); "
            f"without a network, copy the model's folder to this machine and give its path"
        ) from error


def _download(name: str, revision: str | None) -> str:
    """A snapshot in the hub's cache, with those weights that are read: some repositories hold them several times."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        siblings = HfApi().model_info(name, revision=revision).siblings
    except Exception:  # no network, or none wanted: what was fetched before is as good
        if (cached := _cached(name, revision)) is None:
            raise
        return cached
    names = [file.rfilename for file in siblings or ()]
    small = [
        one
        for one in names
        if any(fnmatch.fnmatchcase(one, pattern) for pattern in _SMALL_FILES)
        and ("/" not in one or one.startswith("additional_chat_templates/"))
    ]
    folder = snapshot_download(name, revision=revision, allow_patterns=small)
    index = safetensors.INDEX in small
    weights = safetensors.files_of_index(Folder(folder)) if index else safetensors.weight_files(names)
    return snapshot_download(name, revision=revision, allow_patterns=[*small, *weights])


def _cached(name: str, revision: str | None) -> str | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:  # newer versions refuse a snapshot that lacks a file of those asked for, and so does what reads the weights
        return snapshot_download(name, revision=revision, allow_patterns=["config.json"], local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def _read_json(folder: Folder, name: str) -> dict[str, Any]:
    try:
        value = json.loads(folder.read_bytes(name, 2**24))
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{folder.path}/{name}: not valid JSON ({error})") from error


def load_config(path: str | os.PathLike) -> ModelConfig:
    """The configuration of a model; see `open_model`."""
    return open_model(path).config


class _FolderSource:
    """Safetensors as a `load.Source`: of a multimodal model its language model's, under their own names.

    Attributes:
      rest: the other tensors, by their names in the files.
    """

    def __init__(self, files: ModelFiles):
        self.where, stored = files.path, safetensors.open_folder(Folder(files.path))
        self._tensors, self.rest = stored, {}
        if files.is_wrapped:
            inside = {name: files.names.inside(name) for name in stored}
            self._tensors = {own: stored[name] for name, own in inside.items() if own is not None}
            self.rest = {name: stored[name] for name, own in inside.items() if own is None}

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return {name: (stored.shape, stored.dtype.name) for name, stored in self._tensors.items()}

    def read(self, name: str, index: tuple[int | slice, ...], out: np.ndarray) -> None:
        self._tensors[name].read(index, out)

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in {id(t.file): t.file for t in self._tensors.values()}.values())


def open_source(
    files: ModelFiles, *, beside: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[load.Source, list[rules.Tensor]]:
    """The tensors of a model, checked against its configuration, and the table that reads them.

    Args:
      beside: names and shapes of tensors that the folder has beside the decoder's, and that the table leaves out.

    Raises:
      ConfigError: listing every difference between the files and the configuration.
    """
    config = files.config
    if files.is_gguf:
        source: load.Source = gguf.GgufSource(files.path, config)
        table = rules.tensors(config, "stacked" if config.experts is not None else files.family.layout)
    else:
        settings = files.raw_config.get("quantization_config")
        source = quantised.DequantisedSource(_FolderSource(files), settings)
        layout = files.family.layout
        names = source.shapes()
        if layout == "gpt_oss" and any(name.endswith("experts.gate_up_proj") for name in source.stored):
            layout = "mxfp4"
        elif layout != "gpt_oss" and any(name.endswith("mlp.experts.gate_up_proj") for name in names):
            layout = "fused_experts"
        table = rules.tensors(config, layout)
    extra = [rules.Tensor(name, shape, ()) for name, shape in (beside or {}).items()]
    load.check(source, [*table, *extra], tied=config.tie_word_embeddings)
    return source, table


def load_params(
    model: ModelFiles | str | os.PathLike,
    config: ModelConfig,
    dtype: Any,
    shardings: Mapping[str, Any] | None = None,
    transform: load.Transform | None = None,
    transform_shardings: Mapping[str, Any] | None = None,
    *,
    keep_nf4: bool = False,
) -> Any:
    """The parameters as device arrays.

    Args:
      config: the model's own (`open_model(...).config`).
      dtype: of the parameters, whatever the file holds.
      shardings: tree of `Sharding` like the parameters; None: the default device.
      transform, transform_shardings: see `weights.load.load`; with a transform the result is the pair
        (parameters it kept, what it made).
      keep_nf4: take projections that the files have in NF4 as they are, not by way of `transform`.

    Raises:
      ConfigError: the files don't hold this model; all differences are listed.
    """
    files = model if isinstance(model, ModelFiles) else open_model(model)
    if config != files.config:
        raise ConfigError(f"{files.path}: its configuration isn't the one to load; load first, then change the model")
    source, table = open_source(files)
    shapes = rules.leaf_shapes(config)
    given = quantised.given_nf4(source, table) if keep_nf4 else {}
    kept, made = load.load(source, table, shapes, dtype, shardings, transform, transform_shardings, given)
    return kept if transform is None else (kept, made)


def given_nf4(files: ModelFiles) -> dict[str, str]:
    """`{path of a parameter: its form}` of those that the files have in NF4; see `kernels.nf4.abstract_split`."""
    if files.is_gguf or "quantization_config" not in files.raw_config:
        return {}
    source, table = open_source(files)
    return {path: given.form for path, given in quantised.given_nf4(source, table).items()}


def rest_of(files: ModelFiles) -> dict[str, safetensors.Stored]:
    """The tensors of a multimodal model that aren't its language model's: they are never read, only copied."""
    return _FolderSource(files).rest if files.is_wrapped else {}


def stored_dtypes(files: ModelFiles) -> str | dict[str, str]:
    """The dtype of the files' tensors: one name if all are alike, else `{tensor: dtype}`; bfloat16 for GGUF."""
    if files.is_gguf:
        return "bfloat16"
    source, table = open_source(files)
    shapes = source.shapes()
    dtypes = {tensor.name: shapes[tensor.name][1] for tensor in table}
    kinds = set(dtypes.values())
    return kinds.pop() if len(kinds) == 1 else dtypes


def fingerprint(model: ModelFiles | str | os.PathLike) -> str:
    """Hex digest of which weights these are: configuration, names, shapes, dtypes, and some bytes of each tensor.

    A sample (the first row of each matrix), so it takes no time on a large model; two fine-tunes of one base differ.
    """
    files = model if isinstance(model, ModelFiles) else open_model(model)
    source, table = open_source(files)
    digest = hashlib.sha256(json.dumps(dict(files.raw_config), sort_keys=True, default=str).encode())
    shapes = source.shapes()
    for tensor in sorted(table, key=lambda tensor: tensor.name):
        digest.update(f"{tensor.name} {shapes[tensor.name]}".encode())
        first = (0,) * (len(tensor.shape) - 1)
        out = np.empty(tensor.shape[-1], np.float32)
        source.read(tensor.name, first, out)
        digest.update(out.tobytes())
    return digest.hexdigest()[:32]
