"""Paths as people give them: relative ones, `~`, and those that a run wrote down in another working folder."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import fsspec

# Settings that name files. Those of data are sources: a path, or a dict with one.
FIELDS = ("model.path", "model.chat_template", "peft.adapter_path", "eval.prompts")
SOURCES = ("data.train", "data.replay", "data.eval", "eval.forgetting")


def absolute(path: str | os.PathLike[str]) -> str:
    """A local path from the root on; an address (`gs://...`) as it is."""
    path = os.fspath(path)
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def with_home(arguments: Sequence[str]) -> list[str]:
    """A command line in which `--name=~/file` is what it means: shells only expand a `~` that begins a word."""
    home = os.path.expanduser("~")
    return [text.replace("=~/", f"={home}/", 1) if text.startswith("--") else text for text in arguments]


def working_folder(run_dir: str) -> str:
    """Where a run's command was given, which its relative paths begin at; "" where its folder doesn't say.

    A relative `run_dir` tells it best: that holds when the folders have been moved together.
    """
    given = os.path.normpath(str(_read_json(run_dir, "config.json").get("run_dir", "/")))
    place = absolute(run_dir)
    if not os.path.isabs(given) and place.endswith(os.sep + given):
        return place.removesuffix(given)
    return str(_read_json(run_dir, "environment.json").get("working_folder", ""))


def _read_json(run_dir: str, name: str) -> dict[str, Any]:
    try:
        with fsspec.open(f"{run_dir}/{name}", "r", encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def found(path: str, folder: str) -> str:
    """`path`; or, if nothing is there but something is where it leads to from `folder`, that place."""
    elsewhere = os.path.join(folder, path) if folder else path
    return elsewhere if not _exists(path) and _exists(elsewhere) else path


def spelled_as(saved: Mapping[str, Any], there: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` (nested dicts), in which whatever names the same files as in `saved` is spelled as there.

    Args:
      there: the working folder of `saved`; that of `settings` is the present one.
    """
    before = map_settings(saved, lambda path: _from(there, path))
    now = map_settings(settings, lambda path: _from("", path))
    same = map_settings(settings, lambda path: path)
    for group, name in (field.split(".") for field in (*FIELDS, *SOURCES)):
        if name in saved.get(group, {}) and before[group][name] == now.get(group, {}).get(name):
            same[group][name] = saved[group][name]
    return same


def map_settings(config: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A copy of a configuration, as nested dicts, with `change` applied to each setting that names a file."""

    def source(entry: Any) -> Any:
        if isinstance(entry, Mapping):
            return {key: change(value) if key == "path" else value for key, value in entry.items()}
        return change(entry) if isinstance(entry, str) else entry

    copy = {group: dict(fields) if isinstance(fields, Mapping) else fields for group, fields in config.items()}
    for field in (*FIELDS, *SOURCES):
        group, name = field.split(".")
        value = copy.get(group, {}).get(name)
        if isinstance(value, str) and value:
            copy[group][name] = change(value)
        elif isinstance(value, list | tuple) and field in SOURCES:
            copy[group][name] = [source(entry) for entry in value]
    return copy


def _from(folder: str, path: str) -> str:
    return path if "://" in path else absolute(os.path.join(folder, os.path.expanduser(path)))


def _exists(path: str) -> bool:
    path = os.path.expanduser(path.split("!")[0])  # archive.zip!file
    return "://" in path or os.path.exists(path) or (glob.has_magic(path) and bool(glob.glob(path)))
