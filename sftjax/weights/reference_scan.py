"""Which fields of a config.json transformers knows: read off its source, for `reference.json`.

A field counts as known where the configuration class declares it, or where the code of that model type reads it:
`config.NAME`, `getattr(config, "NAME", default)`, or a keyword that the class takes apart. The shared code that every
model runs through (masks, rope, caches, layers) is scanned once. Nothing is executed but the configuration classes,
so torch isn't needed.

    python tools/scan_reference.py      # writes sftjax/weights/reference.json anew
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sftjax.weights import reference

_SHARED = ("configuration_utils.py", "masking_utils.py", "modeling_layers.py", "cache_utils.py", "modeling_utils.py")
_ROPE = "modeling_rope_utils.py"
_READ, _TAKEN = {"getattr", "hasattr"}, {"get", "pop", "setdefault"}


def scan(model_types: Iterable[str]) -> dict[str, Any]:
    """The table, for these model types.

    Returns:
      {"transformers": version, "shared": fields, "models": {model_type: fields}, "rope": {rope_type: names}}, where
      fields are `{name: its value where the file has none}`; a name whose value there isn't known has `{}` for it.
    """
    root = Path(transformers.__file__).parent
    shared: dict[str, Any] = {}
    for name in (*_SHARED, _ROPE):
        shared = _merged(shared, _reads(root / name).items())
    shared |= _declared(transformers.PreTrainedConfig)
    models = {name: _of_model(name) for name in sorted(model_types)}
    return {
        "transformers": transformers.__version__,
        "shared": dict(sorted(shared.items())),
        "models": {
            name: dict(sorted((key, value) for key, value in fields.items() if shared.get(key, ...) != value))
            for name, fields in models.items()
        },
        "rope": _rope(root / _ROPE),
    }


def write(model_types: Iterable[str]) -> None:
    """Writes the table to where `weights.reference` reads it; one line per model type."""
    table = scan(model_types)
    lines = [f'  "{key}": {json.dumps(table[key])}' for key in ("transformers", "rope", "shared")]
    models = ",\n".join(f'    "{name}": {json.dumps(fields)}' for name, fields in table["models"].items())
    text = "{\n" + ",\n".join(lines) + ',\n  "models": {\n' + models + "\n  }\n}\n"
    reference.PATH.write_text(text, "utf-8")


def _of_model(model_type: str) -> dict[str, Any]:
    """Declared by the class of this type, or read by its files."""
    kind = CONFIG_MAPPING[model_type]
    config_file = Path(inspect.getsourcefile(kind))
    found: dict[str, Any] = {}
    for file in (config_file, config_file.with_name(config_file.name.replace("configuration", "modeling"))):
        found = _merged(found, _reads(file).items())
    for old, new in kind.attribute_map.items():
        found |= {old: reference.UNKNOWN, new: reference.UNKNOWN}
    return found | _declared(kind)


def _declared(kind: type) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(kind):
        value = field.default_factory() if callable(field.default_factory) else field.default
        found[field.name] = value if _is_json(value) else reference.UNKNOWN
    return found


def _is_json(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str)) or value == []


def _reads(path: Path) -> dict[str, Any]:
    """`{name: default}` of the configuration's fields that a file reads."""
    return _merged({}, _all_reads(ast.parse(path.read_text("utf-8")), path.name.startswith("configuration")))


def _merged(found: dict[str, Any], more: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Two defaults that differ are none."""
    found = dict(found)
    for name, default in more:
        found[name] = default if found.get(name, default) == default else reference.UNKNOWN
    return found


def _all_reads(tree: ast.AST, is_configuration: bool) -> Iterator[tuple[str, Any]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_config(node.value):
            yield node.attr, reference.UNKNOWN
        elif isinstance(node, ast.Call) and _name(node.func) in _READ and _is_config(node.args[0]):
            yield from _literal(node.args[1:])
        elif is_configuration and isinstance(node, ast.Call) and _name(node.func) in _READ:
            yield from ((name, reference.UNKNOWN) for name, _ in _literal(node.args[1:]))
        elif is_configuration and isinstance(node, ast.Call) and _is_keyword(node.func):
            yield from ((name, reference.UNKNOWN) for name, _ in _literal(node.args))


def _is_config(node: ast.AST) -> bool:
    return (_name(node) or "").endswith("config")


def _is_keyword(node: ast.AST) -> bool:
    """`kwargs.get` and its like."""
    return isinstance(node, ast.Attribute) and node.attr in _TAKEN and _name(node.value) == "kwargs"


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def _literal(arguments: list[ast.expr]) -> Iterator[tuple[str, Any]]:
    """The name, and the default where it is a constant."""
    if arguments and isinstance(arguments[0], ast.Constant) and isinstance(arguments[0].value, str):
        default = arguments[1] if len(arguments) > 1 else None
        yield arguments[0].value, default.value if isinstance(default, ast.Constant) else reference.UNKNOWN


def _rope(path: Path) -> dict[str, list[str]]:
    """The keys of `rope_parameters` that each rope type's function reads, and those that are looked at for all."""
    tree = ast.parse(path.read_text("utf-8"))
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    kinds = next(
        dict(zip((key.value for key in node.value.keys), (value.id for value in node.value.values), strict=True))
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and _target(node) == "ROPE_INIT_FUNCTIONS"
    )
    found = {kind: sorted(_rope_keys(functions[name])) for kind, name in kinds.items()}
    return {"all": sorted(_rope_keys(functions["standardize_rope_params"]))} | found


def _rope_keys(function: ast.FunctionDef) -> set[str]:
    keys = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _TAKEN:
            keys |= {name for name, _ in _literal(node.args)}
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            keys.add(node.slice.value)
    return {key for key in keys if isinstance(key, str) and key.isidentifier()}


def _target(node: ast.Assign | ast.AnnAssign) -> str | None:
    return _name(node.targets[0] if isinstance(node, ast.Assign) else node.target)
