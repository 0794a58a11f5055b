"""What lies beside the weights, for every way out: a full export, a merged one, an adapter, `tools/convert.py`.

One function, so that a tokenizer, a stop token or a setting that one of them carries, all carry. It gives bytes; who
writes them decides where (a folder under another name first, a bucket, an adapter's folder).
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sftjax.models.config import ModelConfig
from sftjax.weights import families
from sftjax.weights.files import Folder
from sftjax.weights.hf import ModelFiles

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def files(
    config: ModelConfig | None,
    *,
    dtype: str = "float32",
    source: ModelFiles | None = None,
    tokenizer: Mapping[str, bytes] | None = None,
    stop_ids: Sequence[int] = (),
    text_only: bool = False,
) -> dict[str, bytes]:
    """The small files of an export, by their names in its folder: tokenizer, generation_config.json, config.json.

    Args:
      config: what config.json says; None for an adapter, whose base has one.
      dtype: of the tensors.
      source: the model it came from (for an adapter its base): its family, harmless fields and generation settings
        are carried on.
      tokenizer: the tokenizer's files, by name.
      stop_ids: tokens that end an answer; they go to generation_config.json.
      text_only: of a multimodal model, its language model alone.

    Raises:
      ConfigError: the configuration can't be expressed.
    """
    version = importlib.metadata.version("transformers")
    out = dict(tokenizer or {})
    raw: dict[str, Any] = {} if source is None else dict(source.raw_config)
    if config is not None:
        like = None if source is None else source.raw_config
        raw = families.write_config(config, dtype=dtype, like=like, text_only=text_only)
        if source is not None and source.is_wrapped and not text_only:
            folder = Folder(source.path)
            out |= {name: folder.read_bytes(name) for name in folder.names() if name in _PROCESSOR_FILES}
        out["config.json"] = to_json(raw | {"transformers_version": version})
    out["generation_config.json"] = to_json(_generation(raw, source, stop_ids) | {"transformers_version": version})
    return out


def _generation(raw: Mapping[str, Any], source: ModelFiles | None, stop_ids: Sequence[int]) -> dict[str, Any]:
    """The model's own settings, with the stop tokens that answers end on."""
    out = {} if source is None else {key: value for key, value in source.generation.items() if key[0] != "_"}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if raw.get(name) is not None:
            out.setdefault(name, raw[name])
    if stop_ids:
        had = out.get("eos_token_id", [])
        stops = list(dict.fromkeys([*(int(i) for i in stop_ids), *(had if isinstance(had, list) else [had])]))
        out["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    return dict(sorted(out.items()))


def to_json(value: Any) -> bytes:
    """JSON as transformers lays it out."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
