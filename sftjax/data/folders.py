"""Which files of a folder are data, and of which split: as the hub's own loader would have it.

    README.md             its `configs:` say it all, where it has them; a card is never data itself
    dataset_dict.json     what `DatasetDict.save_to_disk` leaves: a folder for each split
    state.json            what `Dataset.save_to_disk` leaves: Arrow files, which it lists
    refs/  snapshots/     the hub's cache: the snapshot that refs/main names
    else                  files of the most frequent kind, at any depth; splits by the names of files and folders

Nothing hidden, no licence, no script is data; text and Markdown are where there is nothing else. A name of a file is a
path below the folder, with slashes.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

import orjson

from sftjax.errors import ConfigError, DataError

KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
    ".text": "text",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_PREFERRED = ("parquet", "json", "csv", "arrow", "text")  # between kinds that are as frequent
_METADATA = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json|config\.json|cache-\w+\.arrow")
_ABOUT = (  # texts that stand beside data
    *("readme", "license", "licence", "copying", "notice", "changelog", "contributing", "citation", "authors"),
    *("requirements", "code_of_conduct", "security"),
)
_MEDIA = re.compile(r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|wav|mp3|flac|ogg|m4a|mp4|mkv|mov|avi|webm)\Z", re.I)
_KEYWORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_KEYWORD = re.compile(rf"(?:\A|(?<=[-._ 0-9]))(?:{'|'.join(_KEYWORDS)})(?=[-._ 0-9]|\Z)")
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5,}")

log = logging.getLogger(__name__)


def kind_of(name: str) -> str | None:
    """The kind that a file's name tells; None for another."""
    return KINDS.get(_suffix(name))


def _suffix(name: str) -> str:
    name = name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return PurePosixPath(name).suffix


def choose(folder: str, names: Sequence[str], read: Callable[[str], str], split: str, config: str) -> list[str]:
    """The files of a split.

    Args:
      folder: what the folder is called in messages.
      names: all files below it.
      read: gives the text of one of them.
      split: its name; "" = train, or the only one; "all" = every one.
      config: name of a configuration; "" = the default, or the only one.

    Raises:
      ConfigError: there is no such configuration, or one has to be named.
      DataError: there is no such split, or no data.
    """
    names = [name for name in names if not any(part.startswith((".", "__")) for part in name.split("/"))]
    if "refs/main" in names and any(name.startswith("snapshots/") for name in names):
        return _below(f"snapshots/{read('refs/main').strip()}", folder, names, read, split, config)
    if "dataset_dict.json" in names:
        splits = {name: [name] for name in _json(read, "dataset_dict.json", folder).get("splits", ())}
        chosen = _of_split(splits, split, folder)
        return [file for name in chosen for file in _below(name, folder, names, read, "all", "")]
    if "state.json" in names and any(name.endswith(".arrow") for name in names):
        state = _json(read, "state.json", folder)
        if split not in ("", "all", state.get("_split") or "train"):
            raise DataError(f"{folder}: no split {split!r}; this is {state.get('_split')}")
        return [file["filename"] for file in state.get("_data_files", ())]
    configs = _configs(names, read, folder)
    if not configs:
        if config and any(name.startswith(f"{config}/") for name in names):
            return _below(config, folder, names, read, split, "")
        if config:
            raise ConfigError(
                f"{folder}: config={config!r} names no folder there, and the dataset card no configuration"
            )
        return _of_split(by_split(data_files(names, folder)), split, folder)
    return _of_config(_chosen(configs, config, folder), folder, names, read, split)


def _below(start: str, folder, names, read, split, config) -> list[str]:
    """The same for a folder below."""
    inner = [name[len(start) + 1 :] for name in names if name.startswith(f"{start}/")]
    found = choose(f"{folder}/{start}", inner, lambda name: read(f"{start}/{name}"), split, config)
    return [f"{start}/{name}" for name in found]


def _json(read: Callable[[str], str], name: str, folder: str) -> dict[str, Any]:
    try:
        found = orjson.loads(read(name))
    except orjson.JSONDecodeError as error:
        raise DataError(f"{folder}/{name} is not JSON ({error}): save the data set again") from None
    return found if isinstance(found, dict) else {}


# --- by names --------------------------------------------------------------------------------------------------------


def data_files(names: Sequence[str], folder: str) -> list[str]:
    """The data files among `names`: those of the most frequent kind; text only where there is nothing else."""
    usable = [name for name in names if _may_be_data(name)]
    pictures = sum(bool(_MEDIA.search(name)) for name in names)
    if pictures > len(usable):
        raise DataError(f"{folder} is a folder of pictures, sound or video ({pictures} files), and only text is read")
    counts = Counter(kind_of(name) for name in usable)
    if len(counts) > 1:
        counts.pop("text", None)
    if not counts:
        return []
    kind = max(counts, key=lambda kind: (counts[kind], -_PREFERRED.index(kind)))
    taken = sorted(name for name in usable if kind_of(name) == kind)
    left = [name for name in usable if kind_of(name) not in (kind, "text")]
    _tell_left_out(folder, left, f"the data are {kind} files")
    return taken


def _may_be_data(name: str) -> bool:
    file = PurePosixPath(name).name.lower()
    kind = kind_of(file)
    if kind == "text":
        return file.split(".")[0] not in _ABOUT
    return kind is not None and not _METADATA.fullmatch(file)


def _tell_left_out(folder: str, names: Sequence[str], why: str) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        log.warning("%s: not read: %s%s (%s; give their paths to have them)", folder, ", ".join(names[:3]), more, why)


def by_split(names: Sequence[str]) -> dict[str, list[str]]:
    """Split -> files, as their names tell; all are "train" where none tells."""
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(split_of(name), []).append(name)
    return {"train": splits[""]} if splits.keys() == {""} else splits


def split_of(name: str) -> str:
    """The split of a file: `test` of "data/test-00000-of-00001.parquet", "x-test.jsonl" and "test/a.csv"; "" = untold.

    A name of its own (`train_sft`) counts only where the hub writes it: as a shard in a folder `data`.
    """
    *folders, file = name.split("/")
    shard = _SHARD.match(file)
    if shard and (shard[1] in _KEYWORDS or folders[-1:] == ["data"]):
        return _KEYWORDS.get(shard[1], shard[1])
    for part in (file, *reversed(folders)):
        if word := _KEYWORD.search(part.lower()):
            return _KEYWORDS[word[0]]
    return ""


def _of_split(splits: dict[str, list[str]], wanted: str, folder: str) -> list[str]:
    if wanted == "all":
        return [name for files in splits.values() for name in files]
    name = wanted or "train"
    name = name if name in splits else _KEYWORDS.get(name, name)
    if name not in splits and not wanted and len(splits) == 1 and not splits.keys() & set(_KEYWORDS.values()):
        name = next(iter(splits))
    if name not in splits:
        told = ", ".join(sorted(filter(None, splits))) or "none"
        raise DataError(f"{folder}: no split {name!r}; there are: {told} (set split in the source's dict)")
    if "" in splits:
        _tell_left_out(folder, splits[""], "their names tell no split, and others' do")
    return splits[name]


# --- by the dataset card ---------------------------------------------------------------------------------------------


def _configs(names: Sequence[str], read: Callable[[str], str], folder: str) -> list[dict[str, Any]]:
    """`configs` of the card's front matter; [] where it has none."""
    if "README.md" not in names:
        return []
    front = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", read("README.md"), re.S | re.M)
    if front is None or "configs:" not in front[1]:
        return []
    import yaml

    try:
        card = yaml.safe_load(front[1])
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{folder}/README.md: its front matter is not YAML ({first}): mend it, or name files") from None
    found = card.get("configs") if isinstance(card, dict) else None
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _chosen(configs: Sequence[dict[str, Any]], wanted: str, folder: str) -> dict[str, Any]:
    named = {str(one.get("config_name", "default")): one for one in configs}
    if wanted:
        if wanted not in named:
            raise ConfigError(f"{folder}: no configuration {wanted!r}; there are: {', '.join(named)}")
        return named[wanted]
    default = [one for one in configs if one.get("default") is True] or [named[n] for n in named if n == "default"]
    if default or len(named) == 1:
        return default[0] if default else configs[0]
    raise ConfigError(
        f"{folder} has several configurations: name one, as {{'path': ..., 'config': {next(iter(named))!r}}}; there "
        f"are: {', '.join(named)}"
    )


def _of_config(config: dict[str, Any], folder: str, names: Sequence[str], read, split: str) -> list[str]:
    start = str(config.get("data_dir") or "").strip("/").removeprefix("./")
    listed = config.get("data_files")
    if listed is None:
        if start:
            inner = [name[len(start) + 1 :] for name in names if name.startswith(f"{start}/")]
            return [f"{start}/{name}" for name in _of_split(by_split(data_files(inner, folder)), split, folder)]
        return _of_split(by_split(data_files(names, folder)), split, folder)
    patterns: dict[str, list[str]] = {}
    for name, paths in _listed(listed):
        patterns.setdefault(name, []).extend(f"{start}/{path}" if start else path for path in paths)
    chosen: dict[str, None] = {}
    for pattern in _of_split(patterns, split, folder):
        found = [name for name in sorted(names) if matches(name, pattern) and _may_be_data(name)]
        if not found:
            raise DataError(f"{folder}: its dataset card names {pattern!r}, which isn't there: fetch it")
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _listed(data_files: Any) -> list[tuple[str, list[str]]]:
    """(split, patterns) of a card's `data_files`, in any of its forms."""
    if isinstance(data_files, str):
        return [("train", [data_files])]
    if isinstance(data_files, dict):
        return [(str(split), _texts(paths)) for split, paths in data_files.items()]
    found: list[tuple[str, list[str]]] = []
    for one in data_files if isinstance(data_files, list) else []:
        if isinstance(one, dict):
            found.append((str(one.get("split", "train")), _texts(one.get("path"))))
        else:
            found.append(("train", _texts(one)))
    return found


def _texts(value: Any) -> list[str]:
    return [str(one).removeprefix("./") for one in (value if isinstance(value, list) else [value]) if one]


def matches(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern: `*` within a folder, `**` across folders, `?`, `[a-z]`."""
    parts = re.split(r"(\*\*/?|\*|\?|\[[^\]]*\])", pattern)
    written = {"**/": r"(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    text = "".join(
        written.get(part, part.replace("[!", "[^") if part.startswith("[") and part.endswith("]") else re.escape(part))
        for part in parts
    )
    return re.fullmatch(text, name) is not None
