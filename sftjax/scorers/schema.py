"""JSON Schema, the part that formats of answers need. A keyword that isn't known is refused, never ignored.

Known: type, enum, const; properties, required, additionalProperties, minProperties, maxProperties; items, prefixItems,
minItems, maxItems, uniqueItems; minLength, maxLength, pattern; minimum, maximum, exclusiveMinimum, exclusiveMaximum,
multipleOf; anyOf, allOf, oneOf, not; $ref to "#/...", with $defs or definitions. Words that only describe are skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sftjax.errors import ConfigError

Schema = Mapping[str, Any] | bool
_DESCRIBES = {"$schema", "$id", "$comment", "title", "description", "default", "examples", "format", "deprecated"}
_TYPES = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: _is_number(value),
    "integer": lambda value: _is_number(value) and float(value).is_integer(),
}
# keyword -> (kind of value that it speaks of, whether the value is fine)
_SIMPLE = {
    "minLength": (str, lambda value, limit: len(value) >= limit),
    "maxLength": (str, lambda value, limit: len(value) <= limit),
    "pattern": (str, lambda value, pattern: re.search(pattern, value) is not None),
    "minItems": (list, lambda value, limit: len(value) >= limit),
    "maxItems": (list, lambda value, limit: len(value) <= limit),
    "uniqueItems": (list, lambda value, wanted: not wanted or len(set(map(_key, value))) == len(value)),
    "minProperties": (dict, lambda value, limit: len(value) >= limit),
    "maxProperties": (dict, lambda value, limit: len(value) <= limit),
    "required": (dict, lambda value, names: all(name in value for name in names)),
    "minimum": (float, lambda value, limit: value >= limit),
    "maximum": (float, lambda value, limit: value <= limit),
    "exclusiveMinimum": (float, lambda value, limit: value > limit),
    "exclusiveMaximum": (float, lambda value, limit: value < limit),
    "multipleOf": (float, lambda value, step: float(value / step).is_integer()),
}
_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_MAPPINGS = ("properties", "$defs", "definitions")
_INNER = ("not", "items", "additionalProperties")
_KNOWN = _DESCRIBES | set(_SIMPLE) | {"type", "enum", "const", "$ref", *_LISTS, *_MAPPINGS, *_INNER}


def check(schema: Schema) -> None:
    """Raises ConfigError where the schema uses what isn't known here."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise ConfigError(f"JSON schema: {schema!r} is no schema")
    for keyword, value in schema.items():
        if keyword not in _KNOWN:
            raise ConfigError(f"JSON schema: the keyword {keyword!r} isn't understood; score with a Python function")
        if keyword == "$ref" and not str(value).startswith("#"):
            raise ConfigError(f"JSON schema: {value!r}: only references into the schema itself (#/...) are followed")
        inner = value.values() if keyword in _MAPPINGS else value if keyword in _LISTS else ()
        for part in [*inner, *([value] if keyword in _INNER else [])]:
            check(part)
    types = schema.get("type", [])
    for name in [types] if isinstance(types, str) else types:
        if name not in _TYPES:
            raise ConfigError(f"JSON schema: there is no type {name!r}")


def problem(value: Any, schema: Schema, root: Schema | None = None, where: str = "") -> str | None:
    """What is wrong with a value, in words; None when it fits. The schema has been through `check`."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return None if schema else f"{where or 'value'}: nothing is allowed here"
    if "$ref" in schema and (found := problem(value, _resolve(schema["$ref"], root), root, where)):
        return found
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(_TYPES[name](value) for name in types):
        return f"{where or 'value'}: not of type {' or '.join(types)}"
    if "enum" in schema and _key(value) not in map(_key, schema["enum"]):
        return f"{where or 'value'}: not one of {schema['enum']}"
    if "const" in schema and _key(value) != _key(schema["const"]):
        return f"{where or 'value'}: not {schema['const']!r}"
    for keyword, (kind, fine) in _SIMPLE.items():
        if keyword in schema and _is_kind(value, kind) and not fine(value, schema[keyword]):
            return f"{where or 'value'}: {keyword} {schema[keyword]!r}"
    return _inside(value, schema, root, where) or _combined(value, schema, root, where)


def _inside(value: Any, schema: Mapping[str, Any], root: Schema, where: str) -> str | None:
    parts: list[tuple[Any, Schema, str]] = []
    if isinstance(value, dict):
        known = schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        parts = [(part, known.get(name, others), f"{where}/{name}") for name, part in value.items()]
    elif isinstance(value, list):
        first = schema.get("prefixItems", [])
        rest = schema.get("items", True)
        parts = [
            (part, first[place] if place < len(first) else rest, f"{where}/{place}") for place, part in enumerate(value)
        ]
    return next(filter(None, (problem(part, inner, root, place) for part, inner, place in parts)), None)


def _combined(value: Any, schema: Mapping[str, Any], root: Schema, where: str) -> str | None:
    def fitting(keyword: str) -> int:
        return sum(problem(value, part, root, where) is None for part in schema[keyword])

    if "allOf" in schema and fitting("allOf") < len(schema["allOf"]):
        return f"{where or 'value'}: not all of allOf"
    if "anyOf" in schema and not fitting("anyOf"):
        return f"{where or 'value'}: none of anyOf"
    if "oneOf" in schema and fitting("oneOf") != 1:
        return f"{where or 'value'}: not exactly one of oneOf"
    if "not" in schema and problem(value, schema["not"], root, where) is None:
        return f"{where or 'value'}: fits what it must not"
    return None


def _resolve(reference: str, root: Schema) -> Schema:
    found: Any = root
    for name in reference.lstrip("#").strip("/").split("/") if len(reference) > 1 else ():
        name = name.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    if found is None:
        raise ConfigError(f"JSON schema: there is nothing at {reference!r}")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_kind(value: Any, kind: type) -> bool:
    return _is_number(value) if kind is float else isinstance(value, kind)


def _key(value: Any) -> str:
    """A text that is equal for values that JSON calls equal: 1 is 1.0, but not true."""
    if isinstance(value, dict):
        return json.dumps({name: _key(part) for name, part in value.items()}, sort_keys=True)
    if isinstance(value, list):
        return json.dumps([_key(part) for part in value])
    return json.dumps(float(value) if _is_number(value) else value)
