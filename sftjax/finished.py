"""Which folder a run goes into when the one that it names has been used: a finished run isn't trained over."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import fsspec
import jax
import numpy as np

from sftjax import lock, paths, runs
from sftjax.errors import ConfigError

SUMMARY = "summary.json"  # written last: a run that has it is finished


def check(
    folder: runs.RunFolder,
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any],
    fingerprints: Mapping[str, str] | None = None,
) -> None:
    """Refuses what was changed since a run finished: nothing would come of it.

    Args:
      settings, defaults: configurations as JSON has them; a field that the run's version didn't have had its default.
      fingerprints: of data, template, tokenizer and weights as they are now; None where they can't be had any more.

    Raises:
      ConfigError: names what differs, and what to do instead.
    """
    saved = folder.read_json("config.json") or {}
    filled = {group: fields | saved.get(group, {}) if isinstance(fields, Mapping) else saved.get(group, fields)
              for group, fields in defaults.items()}  # fmt: skip
    found = [str(change) for change in _changes(folder, filled, settings)]
    if fingerprints is not None:
        before = (folder.read_json("environment.json") or {}).get("fingerprints", {})
        found += [f"the {name} (another content)" for name in before if fingerprints.get(name) != before[name]]
    if found:
        raise ConfigError(
            f"{folder.path}: this run is finished, and these have changed since: {'; '.join(found)}. Add --new to "
            "train in a new folder, or give another run_dir; tools/convert.py writes the same weights in another form"
        )


def next_folder(run_dir: str, settings: Mapping[str, Any]) -> str:
    """The first of NAME, NAME-2, NAME-3, ... that is free, or has an unfinished run with the same settings: so the same
    command goes on with a run that was interrupted. Every process gets the first one's answer."""
    number = next(n for n, path in _names(run_dir) if _can_take(path, settings)) if jax.process_index() == 0 else 0
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    return next(path for n, path in _names(run_dir) if n == number)


def _names(run_dir: str) -> Iterator[tuple[int, str]]:
    name = run_dir.rstrip("/")
    return ((n, f"{name}-{n}" if n > 1 else name) for n in itertools.count(1))


def _can_take(path: str, settings: Mapping[str, Any]) -> bool:
    files, root = fsspec.core.url_to_fs(paths.absolute(path))
    if files.isfile(root):
        return False
    folder = runs.RunFolder.open(path, dry_run=True)
    if not files.exists(root):
        return True
    names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in files.ls(root, detail=False)}
    if names <= {lock.NAME}:
        return True
    saved = folder.read_json("config.json") if "config.json" in names and SUMMARY not in names else None
    return saved is not None and not _changes(folder, saved, settings)


def _changes(folder: runs.RunFolder, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> list[runs.Change]:
    now = paths.spelled_as(saved, paths.working_folder(folder.path), settings)
    return [change for change in runs.changes(saved, now) if change.field != "run_dir"]
