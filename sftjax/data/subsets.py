"""Parts of a source: a held-out share, the first rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sftjax.data.mixture import Ingredient
from sftjax.errors import DataError


class Subset:
    """Some rows of a source, as a source. `rows`: their numbers, int64 [n]; `location` names the place in the file."""

    def __init__(self, source: Any, rows: np.ndarray):
        self.source, self.rows, self.name = source, np.asarray(rows, np.int64), source.name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.rows[index])]

    def location(self, index: int) -> str:
        return self.source.location(int(self.rows[index]))

    def fingerprint(self) -> str:
        return hashlib.sha256(self.source.fingerprint().encode() + self.rows.tobytes()).hexdigest()


def hold_out(
    ingredients: Sequence[Ingredient], fraction: float, seed: int = 0
) -> tuple[list[Ingredient], list[Ingredient]]:
    """Splits every source by rows (a conversation is never in both parts), at random by `seed`; replay text is left.

    Raises:
      DataError: a source too small for a row in each part.
    """
    train, held = [], []
    for number, ingredient in enumerate(ingredients):
        if ingredient.replay:
            train.append(ingredient)
            continue
        size = len(ingredient.source)
        count = max(1, round(size * fraction))
        if count >= size:
            raise DataError(
                f"{ingredient.source.name}: {size} rows can't give {fraction:g} to the held-out split and keep one; "
                "add rows, or set data.eval to a file"
            )
        order = np.random.default_rng([seed, number]).permutation(size)
        # weights and shares are for training: what is held out is seen once, and counts alike
        held.append(Ingredient(Subset(ingredient.source, np.sort(order[:count])), ingredient.encode))
        train.append(replace(ingredient, source=Subset(ingredient.source, np.sort(order[count:]))))
    return train, held


def first_rows(ingredients: Sequence[Ingredient], count: int) -> list[Ingredient]:
    """Every source cut to `count` rows over all of them, each in proportion to its size (at least one)."""
    total = sum(len(i.source) for i in ingredients)
    if total <= count:
        return list(ingredients)
    return [replace(i, source=Subset(i.source, np.arange(max(1, len(i.source) * count // total)))) for i in ingredients]
