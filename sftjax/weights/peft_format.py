"""Adapter folders as PEFT 0.21 reads and writes them.

    adapter_config.json             every field, keys sorted
    adapter_model.safetensors       base_model.model.<module>.lora_A.weight            [r, in]
                                    base_model.model.<module>.lora_B.weight            [out, r]
                                    base_model.model.<module>.lora_magnitude_vector    [out]          (DoRA)
                                    base_model.model.<module>.weight                   modules_to_save
                                    base_model.model.<module>.base_layer.bias          trained biases

Stacked layers are taken apart, zero padding of smaller ranks is cut off. A PiSSA adapter is written as the plain LoRA
of twice the rank that it amounts to, so it loads on the unchanged base. Where the checkpoint fuses what the tree keeps
apart (Phi-3's qkv_proj), A matrices are stacked and B matrices laid out along a diagonal.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from sftjax import tree
from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig, layer_address
from sftjax.peft.spec import AdapterSpec
from sftjax.utils import storage
from sftjax.weights import files, peft_settings, rules, safetensors

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
_LAYOUTS = ("plain", "phi3", "mixtral")


@dataclasses.dataclass(frozen=True)
class _Module:
    """A linear module of the checkpoint, and the modules of the tree that it holds, from top to bottom."""

    name: str  # model.layers.3.self_attn.q_proj
    pieces: tuple[_Piece, ...]


@dataclasses.dataclass(frozen=True)
class _Piece:
    path: str  # layers_0/0/self_attn/q_proj
    index: tuple[int, ...]
    name: str  # its own full name: equals the module's where nothing is fused
    rows: int
    columns: int


def save_adapter(
    directory: str | os.PathLike,
    adapter: tree.Tree,
    spec: AdapterSpec,
    config: ModelConfig,
    *,
    base_model: str | None = None,
    layout: str = "plain",
    dtype: np.dtype | type = np.float32,
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained(base, directory)` loads.

    Args:
      adapter: the adapter tree, device or host arrays.
      base_model: goes into `base_model_name_or_path`.
      layout: how the base's checkpoint names its tensors; see `rules.tensors`.
      dtype: of the tensors.

    Raises:
      ConfigError: a bottleneck adapter, which PEFT doesn't know: its parameters stay in the run's checkpoints.
      StorageError: the folder can't be written.
    """
    if spec.method != "lora":
        raise ConfigError(f"PEFT has no format for method {spec.method!r}")
    flat = {path: np.asarray(leaf) for path, leaf in tree.flatten(adapter).items()}
    modules = _modules(config, layout)
    tensors: dict[str, np.ndarray] = {}
    exported: dict[str, tuple[int, float]] = {}  # module -> (rank, scale)
    for module in modules:
        found = _export_module(module, flat, spec)
        if found is None:
            continue
        leaves, exported[module.name] = found
        tensors |= {f"{PREFIX}{module.name}.{name}": leaf for name, leaf in leaves.items()}
    tensors |= _export_copies(flat, spec, config, layout, set(exported))
    tensors = {name: np.ascontiguousarray(leaf.astype(dtype)) for name, leaf in tensors.items()}
    settings = peft_settings.write(spec, config, [module.name for module in modules], exported, base_model)
    storage.write_bytes(f"{directory}/{WEIGHTS}", save(tensors, metadata={"format": "pt"}))
    storage.write_text(f"{directory}/{CONFIG}", json.dumps(settings, indent=2, sort_keys=True))


def load_adapter(
    directory: str | os.PathLike, config: ModelConfig, *, layout: str | None = None
) -> tuple[dict, AdapterSpec]:
    """Reads a folder that PEFT, or `save_adapter`, has written.

    Args:
      config: of the base model.
      layout: how the base's checkpoint names its tensors; None: found from the names in the folder.

    Returns:
      (adapter tree, float32 numpy arrays; its spec).

    Raises:
      ConfigError: not a LoRA adapter, one that needs what this code lacks, or not one for this model.
      StorageError: files are missing or damaged.
    """
    folder = files.Folder(directory)
    settings, tensors = _read_settings(folder), _read_tensors(folder)
    spec = peft_settings.read(settings, f"{folder.path}/{CONFIG}")
    layout = layout or _find_layout(tensors, config)
    shapes = rules.leaf_shapes(config)
    flat: dict[str, np.ndarray] = {}
    seen: set[str] = set()
    ranks: dict[str, int] = {}
    for module in _modules(config, layout):
        leaves = {name: key for name in _LEAVES if (key := f"{PREFIX}{module.name}.{name}") in tensors}
        if not leaves:
            continue
        seen.update(leaves.values())
        arrays = {name: tensors[key] for name, key in leaves.items()}
        _import_module(module, arrays, flat, shapes, spec, ranks, where=folder.path)
    spec = _explicit_ranks(spec, ranks) if ranks else spec
    for path, pieces in _import_copies(tensors, config, layout, seen).items():
        flat[path] = np.zeros(shapes[path], np.float32)
        leading = math.prod(shapes[path][: len(pieces[0][0])])
        if len(pieces) != leading:
            raise ConfigError(f"{folder.path}: {path} is trained in {len(pieces)} of {leading} layers; all are needed")
        for index, value in pieces:
            flat[path][index] = value
    unknown = sorted(set(tensors) - seen)
    if unknown:
        raise ConfigError(f"{folder.path}: {len(unknown)} tensors fit nothing in this model, e.g. {unknown[0]!r}")
    if layout == "phi3":
        spec = _name_targets(spec, flat, config)
    return tree.unflatten(flat), spec


def is_adapter(directory: str | os.PathLike) -> bool:
    """Whether a folder holds an adapter, or the part of one that an interrupted export left."""
    return any((Path(directory) / name).exists() for name in (CONFIG, WEIGHTS, f"{WEIGHTS}.partial"))


def vocab_rows(directory: str | os.PathLike) -> int | None:
    """How many tokens the embedding or head that an adapter brings has; None if it brings neither."""
    folder = files.Folder(directory)
    if WEIGHTS not in folder:
        return None
    with folder.open(WEIGHTS) as file:
        header = safetensors.read_header(file)
    names = (f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight")
    return next((header[name].shape[0] for name in names if name in header), None)


_LEAVES = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


# ----------------------------------------------------------------------------------------------------------- names


def _modules(config: ModelConfig, layout: str) -> list[_Module]:
    """Every projection of the checkpoint."""
    layers = {
        (f"layers_{run}/{position}", repeat): layer
        for layer in range(config.num_layers)
        for run, position, repeat in [layer_address(config.layers, layer)]
    }
    found = []
    for tensor in rules.tensors(config, layout):
        if not tensor.name.endswith(".weight") or not tensor.parts[0].path.endswith("_proj/weight"):
            continue
        pieces = []
        for part in tensor.parts:
            path = part.path.removesuffix("/weight")
            run, position, *rest = path.split("/")
            layer = layers[f"{run}/{position}", part.index[0]]
            pieces.append(_Piece(path, part.index, f"model.layers.{layer}.{'.'.join(rest)}", *part.shape))
        found.append(_Module(tensor.name.removesuffix(".weight"), tuple(pieces)))
    return found


def _find_layout(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> str:
    modules = {
        name.removeprefix(PREFIX).rpartition(".lora_")[0].rpartition(".")[0] + "." + _last_module(name)
        for name in tensors
        if ".lora_" in name
    }
    for layout in _LAYOUTS:
        if modules <= {module.name for module in _modules(config, layout)}:
            return layout
    return "plain"


def _last_module(name: str) -> str:
    return name.removeprefix(PREFIX).rpartition(".lora_")[0].rpartition(".")[2]


# ---------------------------------------------------------------------------------------------------------- export


def _export_module(
    module: _Module, flat: Mapping[str, np.ndarray], spec: AdapterSpec
) -> tuple[dict[str, np.ndarray], tuple[int, float]] | None:
    """A module's tensors, and its (rank, scale); None if it has no adapter."""
    parts = [_trimmed(piece, flat, spec) for piece in module.pieces]
    if not any(parts):
        return None
    if len(parts) == 1:
        low_A, low_B, scale, magnitude = parts[0]
    else:
        low_A, low_B, scale = _fuse(module, parts)
        magnitude = None
        if any(part and part[3] is not None for part in parts):
            if not all(parts):
                raise ConfigError(f"DoRA on a part of the fused {module.name} has no PEFT form; target all of it")
            magnitude = np.concatenate([part[3] for part in parts])
    leaves = {"lora_A.weight": low_A, "lora_B.weight": low_B}
    if magnitude is not None:
        leaves["lora_magnitude_vector"] = magnitude
    return leaves, (low_A.shape[0], scale)


def _trimmed(piece: _Piece, flat: Mapping[str, np.ndarray], spec: AdapterSpec):
    """(A, B, scale, magnitude or None) of one piece without padding, PiSSA's two parts joined; None: no adapter."""
    if f"{piece.path}/lora_A" not in flat or not spec.targets(piece.name):
        return None
    rank = spec.rank_of(piece.name)
    low_A = flat[f"{piece.path}/lora_A"][piece.index][:rank]
    low_B = flat[f"{piece.path}/lora_B"][piece.index][:, :rank]
    if f"{piece.path}/initial_lora_A" in flat:
        low_A = np.concatenate([low_A, flat[f"{piece.path}/initial_lora_A"][piece.index][:rank]])
        low_B = np.concatenate([low_B, -flat[f"{piece.path}/initial_lora_B"][piece.index][:, :rank]], axis=1)
    scale = float(flat[f"{piece.path}/scale"][piece.index[0]])
    magnitude = flat.get(f"{piece.path}/magnitude")
    return low_A, low_B, scale, None if magnitude is None else magnitude[piece.index]


def _fuse(module: _Module, parts) -> tuple[np.ndarray, np.ndarray, float]:
    """One adapter for stacked rows: shared if all A are equal (as loaded from PEFT), else along a diagonal, scale 1."""
    first = next(part for part in parts if part)
    if all(part and np.array_equal(part[0], first[0]) and part[2] == first[2] for part in parts):
        return first[0], np.concatenate([part[1] for part in parts]), first[2]
    low_A = np.concatenate([part[0] for part in parts if part])
    low_B = np.zeros((sum(piece.rows for piece in module.pieces), low_A.shape[0]), np.float32)
    row = column = 0
    for piece, part in zip(module.pieces, parts, strict=True):
        if part:
            rank = part[0].shape[0]
            low_B[row : row + piece.rows, column : column + rank] = part[1] * part[2]
            column += rank
        row += piece.rows
    return low_A, low_B, 1.0


def _export_copies(
    flat: Mapping[str, np.ndarray], spec: AdapterSpec, config: ModelConfig, layout: str, adapted: set[str]
) -> dict[str, np.ndarray]:
    """Modules trained in full, and biases."""
    found: dict[str, np.ndarray] = {}
    for tensor in rules.tensors(config, layout):
        if not all(part.path in flat for part in tensor.parts):
            continue
        value = np.zeros(tensor.shape, np.float32)
        for part in tensor.parts:
            piece = flat[part.path][part.index]
            value[part.select] = piece.T if part.transpose else piece
        module, _, name = tensor.name.rpartition(".")
        inside = f"{module}.base_layer" if module in adapted else module
        found[f"{PREFIX}{inside}.{name}"] = value
    if config.tie_word_embeddings and "embed_tokens/weight" in flat:
        found[f"{PREFIX}lm_head.weight"] = flat["embed_tokens/weight"]
    return found


# ---------------------------------------------------------------------------------------------------------- import


def _read_settings(folder: files.Folder) -> dict[str, Any]:
    if CONFIG not in folder:
        raise ConfigError(f"{folder.path}: no {CONFIG}, so not a PEFT adapter folder")
    try:
        settings = json.loads(folder.read_bytes(CONFIG))
    except ValueError as error:
        raise ConfigError(f"{folder.path}/{CONFIG}: not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{folder.path}/{CONFIG}: not a JSON object")
    return settings


def _read_tensors(folder: files.Folder) -> dict[str, np.ndarray]:
    if WEIGHTS not in folder:
        raise ConfigError(f"{folder.path}: no {WEIGHTS}; adapters in pickles (.bin) aren't loaded: convert them")
    tensors = {}
    with folder.open(WEIGHTS) as file:
        for name, stored in safetensors.read_header(file).items():
            tensors[name] = np.empty(stored.shape, np.float32)
            stored.read((), tensors[name])
    return tensors


def _import_module(module: _Module, arrays, flat, shapes, spec: AdapterSpec, ranks: dict[str, int], *, where) -> None:
    """Writes one module's tensors into the stacked leaves of its pieces."""
    low_A, low_B = arrays.get("lora_A.weight"), arrays.get("lora_B.weight")
    rows, columns = sum(piece.rows for piece in module.pieces), module.pieces[0].columns
    if low_A is None or low_B is None or low_A.shape[1:] != (columns,) or low_B.shape != (rows, low_A.shape[0]):
        shape = None if low_A is None or low_B is None else (low_A.shape, low_B.shape)
        raise ConfigError(f"{where}: {module.name} is [{rows}, {columns}], its lora_A and lora_B are {shape}")
    rank, row, scale = low_A.shape[0], 0, spec.scale_of(module.name)
    if spec.rank_of(module.name) != rank:
        raise ConfigError(f"{where}: {module.name} has rank {rank}, its configuration says {spec.rank_of(module.name)}")
    for piece in module.pieces:
        ranks[piece.name] = rank
        leading = shapes[f"{piece.path}/weight"][:-2]
        _grow(flat, f"{piece.path}/lora_A", (*leading, rank, columns), axis=-2)[piece.index][:rank] = low_A
        block = low_B[row : row + piece.rows]
        _grow(flat, f"{piece.path}/lora_B", (*leading, piece.rows, rank), axis=-1)[piece.index][:, :rank] = block
        flat.setdefault(f"{piece.path}/scale", np.zeros(leading[:1], np.float32))[piece.index[0]] = scale
        if "lora_magnitude_vector" in arrays:
            values = arrays["lora_magnitude_vector"].reshape(-1)[row : row + piece.rows]
            flat.setdefault(f"{piece.path}/magnitude", np.ones((*leading, piece.rows), np.float32))[piece.index] = (
                values
            )
        row += piece.rows


def _grow(flat: dict[str, np.ndarray], path: str, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """The leaf of at least this shape, zeros where nothing was written."""
    old = flat.get(path)
    if old is None:
        flat[path] = np.zeros(shape, np.float32)
    elif old.shape[axis] < shape[axis]:
        flat[path] = np.zeros(shape, np.float32)
        flat[path][tuple(slice(0, size) for size in old.shape)] = old
    return flat[path]


def _import_copies(tensors, config: ModelConfig, layout: str, seen: set[str]) -> dict[str, list]:
    """`{path: [(index, value), ...]}` of modules trained in full and of biases; adds what it used to `seen`."""
    copies: dict[str, list] = {}
    for tensor in rules.tensors(config, layout):
        module, _, name = tensor.name.rpartition(".")
        keys = [f"{PREFIX}{inside}.{name}" for inside in (module, f"{module}.base_layer")]
        key = next((key for key in keys if key in tensors), None)
        if key is None:
            continue
        seen.add(key)
        if tensors[key].shape != tensor.shape:
            raise ConfigError(f"{key} has shape {tensors[key].shape}; this model's is {tensor.shape}")
        for part in tensor.parts:
            value = tensors[key][part.select]
            copies.setdefault(part.path, []).append((part.index, value.T if part.transpose else value))
    if config.tie_word_embeddings and f"{PREFIX}lm_head.weight" in tensors:
        seen.add(f"{PREFIX}lm_head.weight")
        head = tensors[f"{PREFIX}lm_head.weight"]
        if not np.array_equal(head, tensors.get(f"{PREFIX}model.embed_tokens.weight", head)):
            raise ConfigError("the adapter unties the output head from the embedding; this model keeps them tied")
        copies.setdefault("embed_tokens/weight", [((), head)])
    return copies


def _explicit_ranks(spec: AdapterSpec, ranks: Mapping[str, int]) -> AdapterSpec:
    """The spec, with ranks spelled out where its patterns don't give them (they named fused modules)."""
    wrong = {re.escape(name): rank for name, rank in ranks.items() if spec.rank_of(name) != rank}
    return spec.replace(rank_pattern=(*wrong.items(), *spec.rank_pattern)) if wrong else spec


def _name_targets(spec: AdapterSpec, flat: Mapping[str, Any], config: ModelConfig) -> AdapterSpec:
    """Targets by the names of the tree's own modules, where the file named fused ones."""
    pieces = [piece for module in _modules(config, "plain") for piece in module.pieces]
    chosen = {
        piece.name: 0
        for piece in pieces
        if f"{piece.path}/scale" in flat and flat[f"{piece.path}/scale"][piece.index[0]] != 0
    }
    return spec.replace(target_modules=tuple(peft_settings.target_names([piece.name for piece in pieces], chosen)))
