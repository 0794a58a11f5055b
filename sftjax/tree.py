"""Parameter trees as paths: one regex language for freezing, decay, sharding and adapters.

A tree is nested dicts with array leaves. Its *path form* joins the keys with "/":
`{"mlp": {"up_proj": {"weight": w}}}` is `{"mlp/up_proj/weight": w}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Tree = Mapping[str, Any]


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Nested dicts to `{path: leaf}`, in the tree's own order; empty dicts vanish."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, path + "/"))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`.

    Raises:
      ValueError: a path is both a leaf and a branch.
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *branches, name = path.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path!r} runs through a leaf")
        if name in node:
            raise ValueError(f"{path!r} appears twice")
        node[name] = leaf
    return tree


def partition(tree: Tree, regex: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a tree into (leaves whose whole path matches `regex`, the rest)."""
    pattern = re.compile(regex)
    chosen, rest = {}, {}
    for path, leaf in flatten(tree).items():
        (chosen if pattern.fullmatch(path) else rest)[path] = leaf
    return unflatten(chosen), unflatten(rest)


def merge(*trees: Tree) -> dict[str, Any]:
    """Joins trees with disjoint paths; the inverse of `partition`.

    Raises:
      ValueError: a path appears in two of them.
    """
    flat: dict[str, Any] = {}
    for tree in trees:
        for path, leaf in flatten(tree).items():
            if path in flat:
                raise ValueError(f"{path!r} is in two of the trees to merge")
            flat[path] = leaf
    return unflatten(flat)


def first_match(rules: Iterable[tuple[str, Any]], path: str) -> Any:
    """The value of the first rule whose regex matches the whole path.

    Raises:
      KeyError: no rule covers the path.
    """
    for regex, value in rules:
        if re.fullmatch(regex, path):
            return value
    raise KeyError(f"no rule covers the parameter {path!r}")


def map_paths(function, tree: Tree) -> dict[str, Any]:
    """`function(path, leaf)` on every leaf."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})
