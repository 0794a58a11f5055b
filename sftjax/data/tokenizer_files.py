"""Reads tokenizer files: whatever a model folder has of them, as a fast transformers tokenizer, or one clear error."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from tokenizers import Tokenizer as Backend

from sftjax.data import byte_ranks, spm
from sftjax.errors import ConfigError


def load(path: Path):
    """The transformers tokenizer of a folder. Raises ConfigError."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; a model folder has tokenizer.json or tokenizer.model in it")
    has_fast, has_spm = (path / "tokenizer.json").is_file(), (path / "tokenizer.model").is_file()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)  # "PyTorch was not found" is as it should be
    if not has_fast:
        if (path / "tekken.json").is_file():
            return _with_settings(path, *byte_ranks.read_tekken(path / "tekken.json"))
        _refuse_tiktoken(path)
        if has_spm:
            settings = _settings(path)
            return _with_settings(path, *spm.build(path / "tokenizer.model", add_bos=settings.get("add_bos_token")))
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not has_fast and not (path / "vocab.json").is_file():
        raise ConfigError(
            f"{path} has no tokenizer.json, tokenizer.model or vocab.json (or tekken.json): copy the model's tokenizer "
            "there"
        )
    try:
        return _checked(AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False), path)
    except ConfigError:
        raise
    except Exception as first:  # an unknown class, a class that wants other files: tokenizer.json says enough
        if not has_fast:
            raise ConfigError(f"{path}: the tokenizer can't be loaded: {_one_line(first)}") from None
        try:
            return _checked(PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True), path)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"{path}/tokenizer.json can't be read, fetch it again: {_one_line(error)}") from None


def _checked(hf, path: Path):
    if getattr(hf, "backend_tokenizer", None) is None:
        raise ConfigError(f"{path}: only a slow tokenizer is there; save it once as tokenizer.json with transformers")
    return hf


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _refuse_tiktoken(path: Path) -> None:
    """A list of ranks alone isn't a tokenizer: how text is split into words stands in the model's own code."""
    for file in sorted([*path.glob("*.tiktoken"), *path.glob("tokenizer.model")]):
        if byte_ranks.is_tiktoken(file):
            raise ConfigError(
                f"{file} is a vocabulary in tiktoken's form, which lacks the rule that splits text into words; that is "
                f"pat_str in the model's Python code. Make a tokenizer.json once: pip install tiktoken transformers; "
                f'python -c "from transformers.convert_slow_tokenizer import TikTokenConverter as C; '
                f"C(vocab_file='{file}', pattern=PAT_STR, extra_special_tokens=NAMES).converted()"
                f".save('{path}/tokenizer.json')\""
            )


def _settings(path: Path) -> dict:
    """tokenizer_config.json, or {}."""
    config_file = path / "tokenizer_config.json"
    if not config_file.is_file():
        return {}
    try:
        return json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{config_file} is not JSON: {error}") from None


def _with_settings(path: Path, backend: Backend, names: dict[str, str]):
    """A transformers tokenizer of one that was built here, with what the folder's settings say beside it."""
    from transformers import PreTrainedTokenizerFast

    settings = _settings(path)
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(role)
        value = value["content"] if isinstance(value, dict) else value
        if value:
            names[role] = value
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path=str(path), **names)
    template_file = path / "chat_template.jinja"
    if template_file.is_file():
        hf.chat_template = template_file.read_text(encoding="utf-8")
    elif settings.get("chat_template"):
        hf.chat_template = settings["chat_template"]
    return hf


def generation_stops(path: Path, vocab_size: int) -> list[int]:
    """`eos_token_id` of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        if (path / name).is_file():
            try:
                value = json.loads((path / name).read_text(encoding="utf-8")).get("eos_token_id")
            except (ValueError, AttributeError) as error:
                raise ConfigError(f"{path / name} is not a JSON object: {error}") from None
            numbers = value if isinstance(value, list) else [value]
            numbers = [n for n in numbers if isinstance(n, int) and 0 <= n < vocab_size]
            if numbers:
                return numbers
    return []
