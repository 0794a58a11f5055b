"""Adapter folders as PEFT 0.21 reads and writes them.

    adapter_config.json             every field, keys sorted
    adapter_model.safetensors       base_model.model.<module>.lora_A.weight            [r, in]
                                    base_model.model.<module>.lora_B.weight            [out, r]
                                    base_model.model.<module>.lora_B.bias              [out]          (lora_bias)
                                    base_model.model.<module>.lora_magnitude_vector    [out]          (DoRA)
                                    base_model.model.<embedding>.lora_embedding_A      [r, V], and _B [D, r]
                                    base_model.model.<experts>.lora_A.weight           [E r, in]      (fused experts)
                                    base_model.model.<experts>.lora_B.weight           [out, r E]
                                    base_model.model.<module>.weight                   modules_to_save
                                    base_model.model.<module>.base_layer.bias          trained biases
                                    base_model.model.<embedding>.token_adapter.trainable_tokens_delta [rows, D]

What can be adapted, and under which names: `peft_units`. What PEFT makes of a configuration: `peft_rules`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from sftjax import tree
from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig
from sftjax.peft.spec import AdapterSpec
from sftjax.utils import storage
from sftjax.weights import peft_read, peft_write
from sftjax.weights.peft_read import CONFIG, PICKLE, WEIGHTS


def save_adapter(
    directory: str | os.PathLike,
    adapter: tree.Tree,
    spec: AdapterSpec,
    config: ModelConfig,
    *,
    layout: str,
    base_model: str | None = None,
    dtype: np.dtype | type = np.float32,
) -> list[str]:
    """Writes a folder that `peft.PeftModel.from_pretrained(base, directory)` loads.

    Args:
      adapter: the adapter tree, device or host arrays.
      layout: how the base's checkpoint names its tensors; see `rules.tensors`.
      base_model: goes into `base_model_name_or_path`.
      dtype: of the tensors.

    Returns:
      the major versions of transformers under which PEFT loads it whole.

    Raises:
      ConfigError: a bottleneck adapter, which PEFT doesn't know, or something that PEFT would drop.
      StorageError: the folder can't be written.
    """
    if spec.method != "lora":
        raise ConfigError(f"PEFT has no format for method {spec.method!r}")
    written = peft_write.export(adapter, spec, config, layout, base_model)
    shapes = {name: value.shape for name, value in written.tensors.items()}
    versions = peft_write.verify(written.settings, shapes, config, layout)
    tensors = {name: np.ascontiguousarray(value.astype(dtype)) for name, value in written.tensors.items()}
    storage.write_bytes(f"{directory}/{WEIGHTS}", save(tensors, metadata={"format": "pt"}))
    storage.write_text(f"{directory}/{CONFIG}", json.dumps(written.settings, indent=2, sort_keys=True))
    return versions


def load_adapter(
    directory: str | os.PathLike, config: ModelConfig, *, layout: str | None = None
) -> tuple[dict, AdapterSpec]:
    """Reads a folder that PEFT, or `save_adapter`, has written.

    Args:
      config: of the base model.
      layout: how the base's checkpoint names its tensors; None: found from the names in the folder.

    Returns:
      (adapter tree, float32 numpy arrays, to stand beside a model of `fitted_config`; its spec).

    Raises:
      ConfigError: not a LoRA adapter, one that needs what this code lacks, or not one for this model.
      StorageError: files are missing or damaged.
    """
    flat, spec, _ = peft_read.leaves(peft_read.open_folder(directory), config, layout)
    return tree.unflatten(flat), spec


def fitted_config(directory: str | os.PathLike, config: ModelConfig) -> ModelConfig:
    """The configuration of the model that an adapter stands beside.

    It has a head of its own where the adapter changes the embedding and a head that is tied to it apart, as PEFT does
    with LoRA on either, and with one of them in `modules_to_save` without `ensure_weight_tying`.
    """
    return peft_read.fitted(peft_read.open_folder(directory), config)


def read_spec(directory: str | os.PathLike) -> AdapterSpec:
    """What an adapter folder says that it is, in PEFT's words."""
    return peft_read.open_folder(directory).spec


def is_adapter(directory: str | os.PathLike) -> bool:
    """Whether a folder holds an adapter, or the part of one that an interrupted export left."""
    return any((Path(directory) / name).exists() for name in (CONFIG, WEIGHTS, PICKLE, f"{WEIGHTS}.partial"))


def vocab_rows(directory: str | os.PathLike) -> int | None:
    """How many tokens the embedding or head that an adapter changes must have; None if it changes neither."""
    return peft_read.open_folder(directory).vocab_rows


def verify_folder(directory: str | os.PathLike, config: ModelConfig, *, layout: str) -> list[str]:
    """Holds a written folder against what PEFT looks for on this model.

    Returns:
      the major versions of transformers under which PEFT loads it whole.

    Raises:
      ConfigError: something would be dropped, module by module.
    """
    opened = peft_read.open_folder(directory)
    settings: Mapping[str, Any] = json.loads(opened.folder.read_bytes(CONFIG))
    return peft_write.verify(settings, opened.shapes, config, layout)
