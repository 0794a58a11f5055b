"""Sequence classifiers in Hugging Face layout (`...ForSequenceClassification`): a decoder, and `score.weight` over it.

model.embed_tokens.weight, model.layers..., model.norm.weight    as in a language model; there is no lm_head
score.weight [labels, D]                                         the head, without a bias
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig
from sftjax.weights import hf, load, rules

HEAD = "score.weight"


def load_classifier(files: hf.ModelFiles, dtype: Any) -> tuple[ModelConfig, Any, jax.Array]:
    """The decoder's configuration (tied: it has no head of its own) and parameters, and the head f32 `[labels, D]`.

    Raises:
      ConfigError: not a sequence classifier, or the tensors don't fit.
    """
    source, table, config = _open(files)
    params, _ = load.load(source, table, rules.leaf_shapes(config), dtype)
    return config, params, jnp.asarray(_read_head(source))


def fingerprint(files: hf.ModelFiles) -> str:
    """Hex digest of which weights these are: the head, and the first row of each of the decoder's tensors."""
    source, table, _ = _open(files)
    digest = hashlib.sha256(_read_head(source).tobytes())
    for tensor in sorted(table, key=lambda tensor: tensor.name):
        row = np.empty(tensor.shape[-1], np.float32)
        source.read(tensor.name, (0,) * (len(tensor.shape) - 1), row)
        digest.update(tensor.name.encode() + row.tobytes())
    return digest.hexdigest()[:32]


def _open(files: hf.ModelFiles) -> tuple[load.Source, list[rules.Tensor], ModelConfig]:
    architectures = files.raw_config.get("architectures") or [""]
    if files.is_gguf or not str(architectures[0]).endswith("ForSequenceClassification"):
        raise ConfigError(f"{files.path}: not a sequence classifier ({architectures[0] or 'no architecture'})")
    config = files.config.replace(tie_word_embeddings=True)
    files = dataclasses.replace(files, config=config)
    labels = files.raw_config.get("id2label") or range(files.raw_config.get("num_labels") or 2)
    source, table = hf.open_source(files, beside={HEAD: (len(labels), config.hidden_size)})
    return source, table, config


def _read_head(source: load.Source) -> np.ndarray:
    head = np.empty(source.shapes()[HEAD][0], np.float32)
    source.read(HEAD, (), head)
    return head
