"""Bottleneck adapters as folders of the `adapters` library (1.3), which knows what PEFT doesn't.

    adapter_config.json     {"config": {...}, "hidden_size": ..., "model_class": ..., "name": ..., "version": ...}
    adapter.safetensors     model.layers.3.attention_adapters.adapters.<name>.adapter_down.0.weight   [size, D]
                            model.layers.3.output_adapters.adapters.<name>.adapter_up.weight          [D, size], biases

The library has classes for Llama and Mistral; there `model.load_adapter(folder, use_safetensors=True)` reads it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save

from sftjax import tree
from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig, layer_address, layer_plan
from sftjax.peft.spec import AdapterSpec
from sftjax.utils import storage
from sftjax.weights import files, safetensors

CONFIG, WEIGHTS, NAME = "adapter_config.json", "adapter.safetensors", "sftjax"
_PLACES = {"adapter_attn": "attention_adapters", "adapter_mlp": "output_adapters"}
_PARTS = {"down": "adapter_down.0", "up": "adapter_up"}
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_pytorch_tanh", "silu": "silu", "tanh": "tanh"}
# What makes the library compute y = h + up(activation(down(h))) on what a sublayer adds to the residual stream.
_FIXED = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "ln_after": False,
    "ln_before": False,
    "original_ln_after": True,
    "original_ln_before": False,
    "phm_layer": False,
    "residual_before_ln": True,
    "scaling": 1.0,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
_NO_EFFECT = {"architecture", "init_weights", "init_weights_seed"}
_NAME = re.compile(r"(?:model\.)?layers\.(\d+)\.(attention|output)_adapters\.adapters\.([^.]+)\.(.+)\.(weight|bias)")


def is_bottleneck(directory: str | os.PathLike) -> bool:
    """Whether a folder is one of the `adapters` library's."""
    folder = files.Folder(directory)
    content = folder.read_bytes(CONFIG) if CONFIG in folder else b""
    return b'"config"' in content and b'"peft_type"' not in content


def save_adapter(
    directory: str | os.PathLike,
    adapter: tree.Tree,
    spec: AdapterSpec,
    config: ModelConfig,
    *,
    model_type: str,
    model_class: str,
    base_model: str | None = None,
) -> None:
    """Writes a folder that the `adapters` library loads.

    Args:
      adapter: the adapter tree, device or host arrays; nothing but bottlenecks.
      model_type, model_class: of the base, as transformers has them.

    Raises:
      ConfigError: something was trained beside them, for which the library has no place.
      StorageError: the folder can't be written.
    """
    check(tree.flatten(adapter))
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in tree.flatten(adapter).items()}
    tensors = {}
    for layer in range(config.num_layers):
        run, position, repeat = layer_address(config.layers, layer)
        for place, theirs in _PLACES.items():
            for part, name in _PARTS.items():
                for kind in ("weight", "bias"):
                    leaf = flat.get(f"layers_{run}/{position}/{place}/{part}/{kind}")
                    if leaf is not None:
                        key = f"model.layers.{layer}.{theirs}.adapters.{NAME}.{name}.{kind}"
                        tensors[key] = np.ascontiguousarray(leaf[repeat])
    settings = {
        "config": _FIXED
        | {
            "leave_out": [],
            "mh_adapter": spec.method == "houlsby",
            "non_linearity": _ACTIVATIONS[spec.bottleneck_activation],
            "output_adapter": True,
            # the library rounds hidden size / factor down
            "reduction_factor": _factor(config.hidden_size, spec.bottleneck_size),
        },
        "hidden_size": config.hidden_size,
        "model_class": model_class,
        "model_name": base_model,
        "model_type": model_type,
        "name": NAME,
        "version": "adapters.1.3.0",
    }
    storage.write_bytes(f"{directory}/{WEIGHTS}", save(tensors))
    storage.write_text(f"{directory}/{CONFIG}", json.dumps(settings, indent=2, sort_keys=True))


def _factor(hidden: int, size: int) -> float:
    return hidden / size if int(hidden // (hidden / size)) == size else hidden / (size + 0.5)


def check(leaves: Mapping[str, Any]) -> None:
    """Raises ConfigError where something else than bottlenecks is trained: an adapter folder has no place for it."""
    other = [path for path in leaves if "/adapter_" not in path]
    if other:
        raise ConfigError(f"{other[0]} is trained beside bottleneck adapters, and their folder has no place for it")


def load_adapter(directory: str | os.PathLike, config: ModelConfig) -> tuple[dict, AdapterSpec]:
    """Reads a folder that the `adapters` library, or `save_adapter`, has written.

    Returns:
      (adapter tree, float32 numpy arrays; its spec).

    Raises:
      ConfigError: another kind of adapter, one that computes something else, or not one for this model.
    """
    folder = files.Folder(directory)
    try:
        settings = json.loads(folder.read_bytes(CONFIG))
        given = dict(settings["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder.path}/{CONFIG}: not of the `adapters` library ({error})") from error
    spec = _spec(given, config, f"{folder.path}/{CONFIG}")
    if WEIGHTS not in folder:
        raise ConfigError(f"{folder.path}: no {WEIGHTS}; save the adapter with use_safetensors=True")
    flat: dict[str, np.ndarray] = {}
    with folder.open(WEIGHTS) as file:
        for name, stored in safetensors.read_header(file).items():
            path, repeat, repeats = _place(name, config, folder.path)
            value = np.empty(stored.shape, np.float32)
            stored.read((), value)
            flat.setdefault(path, np.zeros((repeats, *stored.shape), np.float32))[repeat] = value
    wanted = _shapes(spec, config)
    for path in {**wanted, **flat}:
        have = flat[path].shape if path in flat else None
        if have != wanted.get(path):
            raise ConfigError(f"{folder.path}: {path} is {have or 'missing'}, and this model has {wanted.get(path)}")
    return tree.unflatten(flat), spec


def _spec(given: dict[str, Any], config: ModelConfig, where: str) -> AdapterSpec:
    names = {theirs: ours for ours, theirs in _ACTIVATIONS.items()} | {"swish": "silu", "gelu_new": "gelu"}
    activation, attention = given.pop("non_linearity", None), given.pop("mh_adapter", None)
    factor, after = given.pop("reduction_factor", None), given.pop("output_adapter", None)
    left_out = given.pop("leave_out", None)
    wrong = [name for name, value in _FIXED.items() if given.get(name, value) != value]
    off = {"phm", "factorized", "shared", "learn", "hypercomplex"}  # of a layer that isn't used
    wrong += [name for name in given if name not in {*_FIXED, *_NO_EFFECT} and name.partition("_")[0] not in off]
    if wrong or left_out or not after or activation not in names or not isinstance(factor, int | float):
        reason = ", ".join(f"{name}={given[name]!r}" for name in wrong) or "leave_out, output_adapter or non_linearity"
        raise ConfigError(f"{where}: {reason}: only bottlenecks behind attention and MLP are supported")
    return AdapterSpec(
        method="houlsby" if attention else "pfeiffer",
        bottleneck_size=int(config.hidden_size // factor),
        bottleneck_activation=names[activation],
    )


def _place(name: str, config: ModelConfig, where: str) -> tuple[str, int, int]:
    """(path, repeat, repeats) of a tensor."""
    match = _NAME.fullmatch(name)
    parts = {theirs: ours for ours, theirs in _PARTS.items()}
    if match is None or match[4] not in parts or int(match[1]) >= config.num_layers:
        raise ConfigError(f"{where}: {name} fits nothing in this model")
    run, position, repeat = layer_address(config.layers, int(match[1]))
    place = "adapter_attn" if match[2] == "attention" else "adapter_mlp"
    repeats = layer_plan(config.layers)[run][1]
    return f"layers_{run}/{position}/{place}/{parts[match[4]]}/{match[5]}", repeat, repeats


def _shapes(spec: AdapterSpec, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    size, width = spec.bottleneck_size, config.hidden_size
    one = {"down/weight": (size, width), "down/bias": (size,), "up/weight": (width, size), "up/bias": (width,)}
    counts: dict[tuple[int, int], int] = {}
    for layer in range(config.num_layers):
        run, position, _ = layer_address(config.layers, layer)
        counts[run, position] = counts.get((run, position), 0) + 1
    places = _PLACES if spec.method == "houlsby" else ("adapter_mlp",)
    return {
        f"layers_{run}/{position}/{place}/{leaf}": (count, *shape)
        for (run, position), count in counts.items()
        for place in places
        for leaf, shape in one.items()
    }
