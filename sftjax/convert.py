"""A model, or what a run has trained, as a Hugging Face folder or GGUF file (`tools/convert.py`)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from sftjax import checkpoint, job, loading, tree
from sftjax import config as config_lib
from sftjax.data import tokenizer_export
from sftjax.data.tokenizer import Tokenizer
from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig
from sftjax.peft import merge
from sftjax.weights import export, families, gguf, gguf_write, hf, peft_format


def convert(
    source: str, target: str, *, adapter: str | None = None, dtype: str | None = None, text_only: bool = False
) -> list[str]:
    """Writes `target`, a folder that `transformers` loads, or a .gguf file.

    Args:
      source: HF folder, .gguf file, hub id, run folder, or `RUN/checkpoints/STEP`.
      adapter: PEFT folder to merge (in float32).
      dtype: of the tensors; None: as the source has them (bfloat16 for GGUF; what the run's config says). For a
        .gguf file "float16", "bfloat16" (None) or "q8_0".
      text_only: of a multimodal model, its language model alone (a .gguf file always is).

    Returns:
      The names of the files written.
    """
    if dtype == "q8_0" and not target.endswith(".gguf"):
        raise ConfigError("q8_0 is a format of .gguf files; give --to a name that ends so")
    run = _run_of(source)
    if run is not None:
        return _convert_run(*run, target, adapter, dtype, text_only)
    files = hf.open_model(source)
    if target.endswith(".gguf"):
        params = hf.load_params(files, files.config, "float32")
        config, params, tokenizer = _merged(params, adapter, files) if adapter else (files.config, params, None)
        return _write_gguf(target, files, config, params, dtype, tokenizer)
    dtypes = hf.stored_dtypes(files) if dtype is None else dtype
    widest = "float32" if adapter or isinstance(dtypes, Mapping) else dtypes
    params = hf.load_params(files, files.config, widest)
    if not adapter:
        return export.export_model(
            target,
            files.config,
            params,
            dtype=dtypes,
            source=files,
            tokenizer=_tokenizer_files(files),
            text_only=text_only,
        )
    config, params, tokenizer = _merged(params, adapter, files)
    return export.export_model(
        target,
        config,
        params,
        dtype=dtypes,
        source=files,
        tokenizer=_tokenizer_files(files) if tokenizer is None else tokenizer.files(),
        stop_ids=() if tokenizer is None else tokenizer.stop_ids,
        text_only=text_only,
    )


def _tokenizer_files(files: hf.ModelFiles) -> dict[str, bytes]:
    """Those that a model came with."""
    return (
        gguf.tokenizer_files(files.path)
        if files.is_gguf
        else tokenizer_export.untouched(tokenizer_export.read(files.path))
    )


def _write_gguf(target: str, files: hf.ModelFiles, config: ModelConfig, params: Any, dtype: str | None, tokenizer=None):
    kinds = {None: "BF16", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}
    if dtype not in kinds:
        raise ConfigError(f"{target}: matrices in GGUF can be float16, bfloat16 or q8_0, not {dtype}")
    # as it is read here: llama.cpp knows no classes that put rules of their own in place of tokenizer.json's
    written = (tokenizer or loading.open_model(files.path).tokenizer).files()
    model_type = families.family_of(files.raw_config)
    stop_ids = _stop_ids(files) if tokenizer is None else tokenizer.stop_ids
    notes = gguf_write.write_gguf(
        target, config, params, kind=kinds[dtype], model_type=model_type, tokenizer=written, stop_ids=stop_ids
    )
    for note in notes:
        print(note)
    return [os.path.basename(target)]


def _merged(params: Any, adapter: str, files: hf.ModelFiles) -> tuple[ModelConfig, Any, Tokenizer | None]:
    """The model with the adapter folded in, and the adapter's tokenizer where it has one (it may have more tokens)."""
    own = loading.has_tokenizer(adapter)
    tokenizer = loading.open_model(files.path, adapter=adapter).tokenizer if own else None
    config, params, leaves = loading.with_adapter(files.config, params, adapter, files.family.layout)
    return config, merge.merge(params, leaves, dtype=jnp.float32), tokenizer


def _stop_ids(files: hf.ModelFiles) -> list[int]:
    """Tokens that a model's own generation settings stop on."""
    found = files.generation.get("eos_token_id")
    return [] if found is None else found if isinstance(found, list) else [found]


# ------------------------------------------------------------------------------------------------------------- runs


def _run_of(source: str) -> tuple[Path, int | None] | None:
    """(run folder, step or None for the newest) where `source` is a run or one of its checkpoints."""
    path = Path(source)
    if path.parent.name == "checkpoints" and re.fullmatch(r"\d+", path.name):
        return path.parent.parent, int(path.name)
    if path.is_dir() and (path / "checkpoints").is_dir() and (path / "config.json").is_file():
        return path, None
    return None


def _convert_run(
    run: Path, step: int | None, target: str, adapter: str | None, dtype: str | None, text_only: bool
) -> list[str]:
    if adapter:
        raise ConfigError("--adapter goes with a model; a run's own adapter is merged without being named")
    config = config_lib.of_run(str(run))
    opened = loading.open_model(
        config.model.path,
        chat_template=config.model.chat_template,
        end_of_turn=config.model.end_of_turn,
        template_kwargs=config.model.template_kwargs.to_dict(),
        add_tokens=config.model.add_tokens,
    )
    _, trained, _ = checkpoint.restore_params(os.path.join(run, "checkpoints"), step=step)
    model, params = _trained_params(config, opened, trained)
    if target.endswith(".gguf"):
        return _write_gguf(target, opened.files, model, params, dtype, opened.tokenizer)
    return export.export_model(
        target,
        model,
        params,
        dtype=dtype or config.export.dtype,
        source=opened.files,
        tokenizer=opened.tokenizer.files(),
        stop_ids=opened.tokenizer.stop_ids,
        text_only=text_only or config.export.text_only,
    )


def _trained_params(config: Any, opened: loading.Opened, trained: Mapping[str, Any]) -> tuple[Any, Any]:
    """(model configuration, parameters): the base with what was trained in its place, an adapter merged."""
    flat, model = tree.flatten(trained), opened.config
    rows = flat.get("params/embed_tokens/weight", flat.get("adapter/embed_tokens/weight"))
    if rows is not None and rows.shape[0] > model.vocab_size:
        model = model.replace(vocab_size=rows.shape[0])
    spec = job.adapter_spec(config, model=model, grows=bool(opened.new_token_ids))
    model = job.untied(config, model, spec)
    # a frozen base is what the run held, rounded or quantised as there: the adapter was trained beside that
    dtype = config.model.frozen_dtype if "adapter" in trained else "float32"
    variables = loading.load_base(opened, model, dtype, None, quantization=config.peft.quantization)
    if "adapter" in trained:
        if config.peft.adapter_path:
            layout = opened.files.family.layout
            variables["adapter"], _ = peft_format.load_adapter(config.peft.adapter_path, model, layout=layout)
        else:  # the constants beside what is trained
            variables["adapter"] = job.new_adapter(variables, spec, config.seed)
        if config.peft.quantization != "none" and config.export.merge_into == "original":
            variables = loading.load_base(opened, model, "float32", None) | {"adapter": variables["adapter"]}
    variables = tree.unflatten(tree.flatten(variables) | flat)
    if "adapter" not in variables:
        return model, variables["params"]
    return model, merge.merge(
        variables["params"], variables["adapter"], quant=variables.get("quant"), dtype=jnp.float32
    )
