"""A tokenizer's files out: as they came, with what changed since, in words that transformers 4 and 5 both know.

What was read is what is written, byte for byte, wherever nothing changed: a class name, a special-tokens map or a named
chat template that a rewriting would lose is what some other program looks for. Changed are tokenizer.json where tokens
were added (or where the folder had none), and the chat templates where another one was trained with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import fsspec

NAMES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "tekken.json", "tiktoken.model",
)  # fmt: skip
NAMED_TEMPLATES = "additional_chat_templates"  # a folder: NAME.jinja each
_NEUTRAL_CLASS = "PreTrainedTokenizerFast"  # tokenizer.json and nothing else, in every version


def read(path: str | os.PathLike) -> dict[str, bytes]:
    """The tokenizer's files of a model folder (local, or an address that fsspec knows), by their names in it."""
    filesystem, root = fsspec.core.url_to_fs(os.fspath(path))
    found = [f"{root}/{name}" for name in NAMES if filesystem.isfile(f"{root}/{name}")]
    if filesystem.isdir(f"{root}/{NAMED_TEMPLATES}"):
        found += sorted(name for name in filesystem.ls(f"{root}/{NAMED_TEMPLATES}", detail=False) if ".jinja" in name)
    return {name.removeprefix(f"{root}/"): filesystem.cat_file(name) for name in found}


def untouched(came: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files that `read` gave, with a class name that transformers 4 knows too, and without code that came along."""
    out = dict(came)
    settings = _settings(came)
    _make_portable(settings)
    if settings != _settings(came):
        out["tokenizer_config.json"] = _json(settings)
    return out


def files(hf: Any, came: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a tokenizer, which may have got tokens or another template since it was read.

    Args:
      hf: the fast transformers tokenizer.
      came: the files it was read from.
    """
    out, settings = dict(came), _settings(came)
    trained = hf.backend_tokenizer.to_str(pretty=True)
    if "tokenizer.json" not in came:  # from another format: this is the one that both versions read alike
        out["tokenizer.json"] = trained.encode()
        settings = {name: str(token) for name, token in hf.special_tokens_map.items()} | settings
        settings.setdefault("clean_up_tokenization_spaces", False)
        if type(hf).__name__ in ("TokenizersBackend", _NEUTRAL_CLASS):
            settings["tokenizer_class"] = _NEUTRAL_CLASS
    elif not _same(came["tokenizer.json"], trained):
        out["tokenizer.json"] = trained.encode()
        _add_tokens(out, settings, hf)
    _put_templates(out, settings, _by_name(hf.chat_template))
    _make_portable(settings)
    if settings != _settings(came):
        out["tokenizer_config.json"] = _json(settings)
    return out


def _settings(came: Mapping[str, bytes]) -> dict[str, Any]:
    return json.loads(came.get("tokenizer_config.json", b"{}"))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _make_portable(settings: dict[str, Any]) -> None:
    """Names that only transformers 5 writes, as both versions read them."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    settings.pop("auto_map", None)  # the code of a checkpoint is never carried on
    known = settings.get("tokenizer_class") or ""
    if known and (known.endswith("Backend") or tokenizer_class_from_name(known) is None):
        settings["tokenizer_class"] = _NEUTRAL_CLASS
    if isinstance(settings.get("extra_special_tokens"), list):  # a dict in transformers 4, which fails on a list
        more = settings.pop("extra_special_tokens")
        settings.setdefault("additional_special_tokens", more)


# --------------------------------------------------------------------------------------------------------- tokens


def _same(came: bytes, trained: str) -> bool:
    """Whether a tokenizer.json is this tokenizer: some classes of transformers 5 put rules of their own there."""
    from tokenizers import Tokenizer

    return _essence(Tokenizer.from_str(came.decode()).to_str()) == _essence(trained)


def _essence(text: str) -> dict[str, Any]:
    """A tokenizer.json without what is each call's own (padding, truncation) and with one word for "nothing"."""
    found = json.loads(text) | {"padding": None, "truncation": None}
    after = found["post_processor"]
    if after and after["type"] == "TemplateProcessing" and not after["special_tokens"]:
        found["post_processor"] = None
    found["model"] = {name: value for name, value in found["model"].items() if value not in (None, "", False)}
    return found


def _add_tokens(out: dict[str, bytes], settings: dict[str, Any], hf: Any) -> None:
    """Writes new tokens wherever the older formats list them as well."""
    added = hf.added_tokens_decoder
    if "added_tokens_decoder" in settings:
        flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        entries = {str(number): {flag: getattr(token, flag) for flag in flags} for number, token in added.items()}
        settings["added_tokens_decoder"] = settings["added_tokens_decoder"] | entries
    if "added_tokens.json" in out:
        out["added_tokens.json"] = _json(
            json.loads(out["added_tokens.json"]) | {token.content: number for number, token in added.items()}
        )


# ------------------------------------------------------------------------------------------------------ templates


def _by_name(templates: Any) -> dict[str, str]:
    """Chat templates as transformers and its files have them (none, one, a list, a dict), by name."""
    if not templates:
        return {}
    if isinstance(templates, str):
        return {"default": templates}
    return dict(templates) if isinstance(templates, Mapping) else {one["name"]: one["template"] for one in templates}


def _templates(came: Mapping[str, bytes]) -> dict[str, str]:
    """The templates of a folder: its .jinja files or, without one, those of tokenizer_config.json."""
    found = {_template_name(name): text.decode() for name, text in came.items() if name.endswith(".jinja")}
    return found or _by_name(_settings(came).get("chat_template"))


def _template_name(file: str) -> str:
    inside = file.startswith(NAMED_TEMPLATES + "/")
    return file.removeprefix(NAMED_TEMPLATES + "/").removesuffix(".jinja") if inside else "default"


def _put_templates(out: dict[str, bytes], settings: dict[str, Any], now: dict[str, str]) -> None:
    """Writes the templates the way they came; as files where none came."""
    before = _templates(out)
    if now == before:
        return
    in_files = not before or any(name.endswith(".jinja") for name in out)
    for name in [name for name in out if name.endswith(".jinja")]:
        del out[name]
    settings.pop("chat_template", None)
    if not in_files:
        named = [{"name": name, "template": text} for name, text in now.items()]
        settings["chat_template"] = now["default"] if [*now] == ["default"] else named
        return
    for name, text in now.items():
        file = "chat_template.jinja" if name == "default" else f"{NAMED_TEMPLATES}/{name}.jinja"
        out[file] = text.encode()
