"""Which fields of a config.json transformers knows, for each model type that is read here.

The table is `reference.json`; `reference_scan.py` makes it from transformers' source, and a `--parity` test compares it
with the transformers that is installed. What nobody there reads can't change a model; what somebody reads might.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("reference.json")
UNKNOWN: dict = {}  # in place of a value: the field is read, but what its absence means isn't a constant


@functools.cache
def table() -> dict[str, Any]:
    return json.loads(PATH.read_text("utf-8"))


def known(model_type: Any) -> dict[str, Any] | None:
    """`{field: its value where config.json has none, or UNKNOWN}`; None where transformers lacks the model type."""
    models = table()["models"]
    return table()["shared"] | models[model_type] if isinstance(model_type, str) and model_type in models else None


def declared(model_type: str) -> dict[str, Any]:
    """The defaults of the model type's class, less null and computed ones; {} where transformers lacks it."""
    models = table()["models"]
    return {name: value for name, value in models.get(model_type, {}).items() if value is not None and value != UNKNOWN}


def rope_keys(rope_type: str) -> set[str]:
    """The keys of `rope_parameters` that transformers reads for a rope type."""
    rope = table()["rope"]
    return {*rope["all"], *rope.get(rope_type, ())}
