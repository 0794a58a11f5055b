"""What formats read rows with: values checked for their type, JSON text decoded, with one-line reasons."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from sftjax.data.types import RowError

_ODD = re.compile(r"[^\w.-]")
_MEDIA_NAMES = ("image", "images", "video", "videos", "audio", "audios")
MEDIA = frozenset((*_MEDIA_NAMES, *map(str.capitalize, _MEDIA_NAMES), *map(str.upper, _MEDIA_NAMES)))


def kind(value) -> str:
    """What a value is, in words."""
    if value is None:
        return "missing or null"
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def check_text(text: str, where: str) -> None:
    """Refuses what no text of a conversation should hold."""
    if "\0" in text:
        raise RowError("nul_character", f"{where} contains a NUL character")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowError("not_unicode", f"{where} contains half of a surrogate pair") from None


def text_of(row, key: str) -> str:
    """A row's value that has to be text."""
    value = row.get(key)
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise RowError("not_unicode", f"{key} is not UTF-8") from None
    if not isinstance(value, str):
        raise RowError("wrong_type", f"{key} is {kind(value)}, not text")
    check_text(value, key)
    return value


def decoded(value, name: str):
    """The value; JSON text as what it says, arrays and tuples as lists."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise RowError("not_unicode", f"{name} is not UTF-8") from None
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise RowError("wrong_type", f"{name} is text, and not JSON ({error})") from None
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, tuple):
        value = list(value)
    return value


def list_of(row, key: str) -> list:
    """A row's value that has to be a list, or a dict of lists."""
    value = decoded(row.get(key), key)
    if isinstance(value, Mapping):
        value = list_of_dicts(value)
    if not isinstance(value, list):
        raise RowError("wrong_type", f"{key} is {kind(value)}, not a list")
    return value


def mapping_of(row, key: str) -> dict:
    """A row's value that has to be an object, or nothing."""
    value = row.get(key)
    if value is None:
        return {}
    value = decoded(value, key)
    if not isinstance(value, Mapping):
        raise RowError("wrong_type", f"{key} is {kind(value)}, not an object")
    return dict(value)


def list_of_dicts(columns: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """{"role": [a, b], "content": [c, d]} -> [{"role": a, "content": c}, {"role": b, "content": d}]; else None."""
    values = [value for value in columns.values()]
    if not values or not all(isinstance(value, (list, tuple, np.ndarray)) for value in values):
        return None
    if len({len(value) for value in values}) != 1:
        return None
    return [dict(zip(columns, items, strict=True)) for items in zip(*values, strict=True)]


def as_json(value) -> str:
    """A value as JSON text, its keys sorted; what JSON can't hold, as Python writes it."""
    try:
        return orjson.dumps(value, default=str, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # half a surrogate pair, a huge number
        return repr(value)


def refuse_media(holder: Mapping[str, Any], where: str) -> None:
    """Refuses a row or a message with a picture, video or sound: the model wouldn't see it, and would be trained."""
    named = () if MEDIA.isdisjoint(holder) else [key for key in holder if key in MEDIA and not _is_empty(holder[key])]
    files = ()
    if dict in map(type, holder.values()):  # a file as Arrow holds it
        files = [k for k, v in holder.items() if type(v) is dict and v.keys() == {"bytes", "path"} and any(v.values())]
    for key in (*named, *files):
        raise RowError(
            "unsupported_content",
            f"{where} has {key!r}, and only text is read: leave such rows out, or the column where the text stands "
            "without it",
        )


def _is_empty(value) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_empty, value))
    return value is None or (isinstance(value, (str, bytes, dict)) and not value)


# --- what is there and not read -------------------------------------------------------------------------------------


def note(kind: str, name) -> str:
    """A flag for the ledger that names a key of a row: short, and of letters that steer no terminal."""
    return f"{kind}:{_ODD.sub('_', str(name))[:40]}"


def texts_in(value, most: int = 8) -> list[str]:
    """The first few texts of more than a word in a value, at any depth; names, numbers and dates aren't such."""
    if isinstance(value, str):
        return [value.strip()] if len(value.split(None, 1)) > 1 or (len(value) > 3 and not value.isascii()) else []
    found: list[str] = []
    if isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            found += texts_in(item, most - len(found))
            if len(found) >= most:
                break
    return found
