"""All settings of a curation, with their defaults. A config file starts from these (configs/curate/default.py)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sftjax.errors import ConfigError

MODES = ("off", "report", "remove")


@dataclass(frozen=True)
class Quality:
    """The score of a row; see rules.build."""

    preset: str = "default"  # default, guide, none
    threshold: float = 0.7  # rows with a lower score are removed
    keep_top: float = 0.0  # above 0: instead of the threshold, the share of rows to keep, best first
    weights: Mapping[str, float] = field(default_factory=dict)  # rule -> another weight; 0 leaves it out
    word_list: str = ""  # file of words no response should have, one a line
    language: str = ""  # code of the language of the responses; empty: that of their prompts
    extra: tuple = ()  # further rules: (name, function or "file.py:function", weight)


@dataclass(frozen=True)
class Exact:
    """Rows with the same words."""

    mode: str = "remove"


@dataclass(frozen=True)
class Near:
    """Rows that share most of their runs of words."""

    mode: str = "remove"
    threshold: float = 0.7  # Jaccard index
    words: int = 3  # in a run


@dataclass(frozen=True)
class Semantic:
    """Rows that say the same in other words."""

    mode: str = "remove"
    threshold: float = 0.55  # cosine; of the TF-IDF vectors that are used where no encoder is given
    encoder: Any = ""  # "file.py:function" that makes an object with encode(texts), or the object


@dataclass(frozen=True)
class Contamination:
    """Rows that hold benchmark items."""

    mode: str = "remove"
    benchmarks: tuple = ()  # names (benchmarks.KNOWN), paths, or dicts: path, name, columns, split
    folder: str = ""  # where files and wheels of named benchmarks lie
    threshold: float = 0.5  # an item is contaminated when a larger share of its words is covered


@dataclass(frozen=True)
class Personal:
    """E-mail addresses, telephone numbers, cards, keys."""

    mode: str = "report"  # off, report, mask


@dataclass(frozen=True)
class Balance:
    """Caps: above 1 the most rows of a kind, else its largest share of what stays; 0 is none."""

    max_per_source: float = 0.0
    max_per_task: float = 0.0
    max_per_length: float = 0.0


@dataclass(frozen=True)
class Settings:
    """Everything. `sources` and `output` are what a run must set."""

    sources: tuple = ()  # paths, or dicts: path, name, format, split, fields, licence
    output: str = ""  # folder
    output_format: str = "jsonl"  # jsonl, parquet
    tokenizer: str = ""  # tokenizer.json to count tokens with; empty: estimated from words
    workers: int = 0  # processes; 0: one for each core
    quality: Quality = field(default_factory=Quality)
    exact: Exact = field(default_factory=Exact)
    near: Near = field(default_factory=Near)
    semantic: Semantic = field(default_factory=Semantic)
    contamination: Contamination = field(default_factory=Contamination)
    personal: Personal = field(default_factory=Personal)
    balance: Balance = field(default_factory=Balance)


def from_mapping(values: Mapping[str, Any]) -> Settings:
    """Settings from nested mappings, checked.

    Raises:
      ConfigError: a field doesn't exist, or its value can't be.
    """
    settings = _filled(Settings, values, "")
    _check(settings)
    return settings


def field_names(kind: type = Settings, prefix: str = "") -> list[str]:
    """The names of all settings: "sources", "quality.mode", ..."""
    names = []
    for field_name, default in ((one.name, getattr(kind(), one.name)) for one in dataclasses.fields(kind)):
        nested = dataclasses.is_dataclass(default)
        names += field_names(type(default), f"{field_name}.") if nested else [f"{prefix}{field_name}"]
    return names


def _filled(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {one.name: one for one in dataclasses.fields(kind)}
    changed = {}
    for name, value in values.items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            raise ConfigError(
                f"config: there is no field {prefix}{name}" + (f"; did you mean {close[0]}?" if close else "")
            )
        default = getattr(kind(), name)
        changed[name] = _filled(type(default), value, f"{name}.") if dataclasses.is_dataclass(default) else value
    return kind(**changed)


def _check(settings: Settings) -> None:
    problems = []

    def require(condition: bool, message: str) -> None:
        if not condition:
            problems.append(message)

    require(bool(settings.sources), "sources is empty: name at least one file")
    require(bool(settings.output), "output is empty: name a folder")
    require(
        settings.output_format in ("jsonl", "parquet"), f"output_format={settings.output_format!r}: jsonl or parquet"
    )
    for name in ("exact", "near", "semantic", "contamination"):
        mode = getattr(settings, name).mode
        require(mode in MODES, f"{name}.mode={mode!r}: choose one of {', '.join(MODES)}")
    require(
        settings.personal.mode in ("off", "report", "mask"),
        f"personal.mode={settings.personal.mode!r}: off, report, mask",
    )
    for name in (
        "quality.threshold",
        "quality.keep_top",
        "near.threshold",
        "semantic.threshold",
        "contamination.threshold",
    ):
        group, key = name.split(".")
        value = getattr(getattr(settings, group), key)
        require(0 <= value <= 1, f"{name}={value} is not between 0 and 1")
    require(settings.near.words >= 1, f"near.words={settings.near.words} must be at least 1")
    for key, value in dataclasses.asdict(settings.balance).items():
        require(value >= 0, f"balance.{key}={value} is negative")
    require(settings.workers >= 0, f"workers={settings.workers} is negative")
    if problems:
        raise ConfigError("config: " + "; ".join(problems))
