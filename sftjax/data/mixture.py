"""Several sources as one stream of rows with random access.

Place k of the stream is a pure function of the seed: (epoch, source, row). Nothing is drawn one after the other, so a
run continues at any k, in any number of processes, without replaying. An epoch takes `count[i]` rows of source i, in
an order shuffled over all sources; a source hands out each of its rows once before any comes again.

The permutations are Grain's `index_shuffle` (no table of N entries, 3 us a row).
"""

from __future__ import annotations

import bisect
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from grain.experimental import index_shuffle

from sftjax.data.types import RowError, Sample
from sftjax.errors import ConfigError, DataError

Encoder = Callable[[dict, int, int], list[Sample]]  # (row, index, source) -> samples; data.encode.RowEncoder is one
ENDLESS = sys.maxsize
_PROBED_ROWS = 64  # rows of a source encoded to learn its mean length, where shares are of tokens


@dataclass(frozen=True)
class Ingredient:
    """One source of a mixture.

    Attributes:
      source: rows by number (`len`, `[i]`, `.name`, `.location(i)`); picklable.
      encode: makes samples of a row; picklable.
      weight: how many times an epoch shows each row (1 = once; 0.5 = half of the rows, the other half next epoch).
      proportion: share of this source in the mixture, whatever its size; then every source that isn't replay needs one.
      max_epochs: the source is left out once each of its rows has come this many times.
      loss_weight: factor on the weights of its tokens.
      replay: plain pre-training text against forgetting; its share is `replay_share`, and nothing else counts it.
    """

    source: Any
    encode: Encoder
    weight: float = 1.0
    proportion: float | None = None
    max_epochs: float | None = None
    loss_weight: float = 1.0
    replay: bool = False


class Mixture:
    """The stream of rows: `len`, `locate(k)`, `epoch_at(rows)`. Picklable."""

    def __init__(
        self,
        ingredients: Sequence[Ingredient],
        *,
        seed: int = 0,
        shuffle: bool = True,
        epochs: float | None = 1.0,
        temperature: float = 1.0,
        replay_share: float = 0.0,
        shares_of: str = "rows",
        curriculum: str | None = None,
        descending: bool = False,
    ):
        """Mixes sources.

        Args:
          ingredients: the sources.
          seed: of the shuffles.
          shuffle: False keeps the order of the files, one source after the other.
          epochs: passes over the mixture (fractions allowed); None = endless, the caller stops after its steps.
          temperature: shares are taken to the power 1/temperature: above 1 evens the sources out.
          replay_share: share of the replay sources in the whole, such as 0.05.
          shares_of: "rows", or "tokens": proportions and replay share are of tokens, estimated from 64 rows a source.
          curriculum: None, "length" (of the row's text) or the name of a numeric field: within an epoch the rows come
            in ascending order of it.
          descending: turns the curriculum round.

        Raises:
          ConfigError: settings that contradict each other.
          DataError: a source without rows, or a row without the curriculum's field.
        """
        _check(ingredients, temperature=temperature, replay_share=replay_share, shares_of=shares_of, epochs=epochs)
        self.ingredients = tuple(ingredients)
        self.names = _unique_names(ingredients)
        self.sizes = tuple(len(i.source) for i in ingredients)
        for name, size in zip(self.names, self.sizes, strict=True):
            if size == 0:
                raise DataError(f"{name}: no rows; check the path and the slice, or leave this source out")
        self.seed, self.shuffle = seed, shuffle
        self.counts = _rows_per_epoch(self.ingredients, self.sizes, temperature, replay_share, shares_of)
        self._caps = tuple(
            ENDLESS if i.max_epochs is None else round(i.max_epochs * size)
            for i, size in zip(self.ingredients, self.sizes, strict=True)
        )
        self._starts = [0]  # stream place at which each epoch begins, as far as worked out
        self.curriculum, self.descending = curriculum, descending
        self._keys = None if curriculum is None else tuple(_curriculum_keys(i.source, curriculum) for i in ingredients)
        self.epochs = epochs
        self._length, self._epochs_covered = self._extent(epochs)

    def __len__(self) -> int:
        """Rows of the whole stream; ENDLESS without `epochs`."""
        return self._length

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the first epoch (later ones can be shorter where `max_epochs` caps a source)."""
        return sum(self.epoch_counts(0))

    def epoch_counts(self, epoch: int) -> tuple[int, ...]:
        """Rows of each source in an epoch."""
        return tuple(
            max(0, min(count, cap - epoch * count)) for count, cap in zip(self.counts, self._caps, strict=True)
        )

    def locate(self, place: int) -> tuple[int, int, int]:
        """(epoch, source, row) at a place of the stream."""
        epoch = self._epoch_of(place)
        slot = place - self._starts[epoch]
        counts = self.epoch_counts(epoch)
        if self._keys is not None:
            slot = int(self._curriculum_order(epoch)[slot])
        elif self.shuffle:
            slot = index_shuffle(slot, sum(counts) - 1, _seed(self.seed, 0, epoch), 4)
        source = 0
        while slot >= counts[source]:
            slot -= counts[source]
            source += 1
        return epoch, source, self._row(source, epoch * self.counts[source] + slot)

    def location(self, source: int, row: int) -> str:
        """Where a row stands, such as "train.jsonl:17"."""
        return self.ingredients[source].source.location(row)

    def epoch_at(self, rows: float) -> float:
        """Epochs passed after `rows` rows of the stream, as a float."""
        if self._length != ENDLESS and rows >= self._length:
            return self._epochs_covered
        epoch = self._epoch_of(int(rows))
        return epoch + (rows - self._starts[epoch]) / sum(self.epoch_counts(epoch))

    def settings(self) -> dict[str, Any]:
        """What decides the order of the stream, JSON-able, to be compared on resume."""
        return {
            "sources": list(self.names),
            "sizes": list(self.sizes),
            "rows_per_epoch": list(self.counts),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "max_epochs": [i.max_epochs for i in self.ingredients],
            "loss_weights": [i.loss_weight for i in self.ingredients],
            "curriculum": self.curriculum,
            "descending": self.descending,
        }

    def _row(self, source: int, drawn: int) -> int:
        """Row behind the `drawn`-th draw from a source."""
        passed, index = divmod(drawn, self.sizes[source])
        if not self.shuffle:
            return index
        return index_shuffle(index, self.sizes[source] - 1, _seed(self.seed, 1 + source, passed), 4)

    def _epoch_of(self, place: int) -> int:
        while self._starts[-1] <= place:
            rows = sum(self.epoch_counts(len(self._starts) - 1))
            if rows == 0:
                raise IndexError(place)  # every source has reached its cap
            self._starts.append(self._starts[-1] + rows)
        return bisect.bisect_right(self._starts, place) - 1

    def _extent(self, epochs: float | None) -> tuple[int, float]:
        """Rows of the whole stream, and the epochs they make: fewer than asked where every source is capped."""
        if epochs is None and ENDLESS in self._caps:
            return ENDLESS, float("inf")
        total, epoch = 0, 0
        while epochs is None or epoch < epochs:
            rows = sum(self.epoch_counts(epoch))
            if rows == 0:
                return total, float(epoch)
            total += rows if epochs is None else round(rows * min(1.0, epochs - epoch))
            epoch += 1
        return total, float(epochs)

    def _curriculum_order(self, epoch: int) -> np.ndarray:
        """Slots of an epoch in ascending order of their rows' keys; the last epoch's is kept."""
        cached = self.__dict__.get("_order")
        if cached is None or cached[0] != epoch:
            keys = [
                self._keys[source][[self._row(source, epoch * self.counts[source] + q) for q in range(count)]]
                for source, count in enumerate(self.epoch_counts(epoch))
            ]
            key = np.concatenate(keys)
            self._order = cached = (epoch, np.argsort(-key if self.descending else key, kind="stable"))
        return cached[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_order"}


@functools.lru_cache(maxsize=1024)
def _seed(*parts: int) -> int:
    """32 bits of a seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _check(ingredients, *, temperature, replay_share, shares_of, epochs) -> None:
    chat = [i for i in ingredients if not i.replay]
    if not chat:
        raise ConfigError("data.train: no source to train on: name at least one file")
    given = [i.proportion is not None for i in chat]
    if any(given) and not all(given):
        raise ConfigError("data.train: give `proportion` to every source, or to none")
    if any(i.replay for i in ingredients) != (replay_share > 0):
        raise ConfigError("data.replay_share and data.replay need each other: set both or neither")
    if not 0 <= replay_share < 1:
        raise ConfigError(f"data.replay_share={replay_share} must lie in [0, 1): 0.05 to 0.1 is usual")
    if temperature <= 0:
        raise ConfigError(f"data.mixing_temperature={temperature} must be above 0")
    if shares_of not in ("rows", "tokens"):
        raise ConfigError(f"data.shares_of={shares_of!r} must be 'rows' or 'tokens'")
    if epochs is not None and epochs <= 0:
        raise ConfigError(f"train.num_train_epochs={epochs} must be above 0")
    for i in ingredients:
        if i.weight <= 0 or (i.proportion is not None and i.proportion <= 0):
            raise ConfigError(f"data.train: {i.source.name}: weight and proportion must be above 0; remove the source")
        if i.max_epochs is not None and i.max_epochs <= 0:
            raise ConfigError(f"data.train: {i.source.name}: max_epochs={i.max_epochs} must be above 0")


def _unique_names(ingredients: Sequence[Ingredient]) -> tuple[str, ...]:
    names: list[str] = []
    for ingredient in ingredients:
        name, n = ingredient.source.name, 2
        while name in names:
            name, n = f"{ingredient.source.name}#{n}", n + 1
        names.append(name)
    return tuple(names)


def _rows_per_epoch(ingredients, sizes, temperature, replay_share, shares_of) -> tuple[int, ...]:
    """Rows that each source gives to an epoch; without proportions and temperature, weight * size."""
    replay = np.array([i.replay for i in ingredients])
    mass = np.array([i.weight * size for i, size in zip(ingredients, sizes, strict=True)], float)
    cost = np.ones(len(sizes))  # of a row, in the unit of the shares
    proportioned = any(i.proportion is not None for i in ingredients)
    if shares_of == "tokens" and (proportioned or temperature != 1 or replay_share):
        cost = np.array([mean_tokens(i) for i in ingredients])
    mass *= cost
    if proportioned or temperature != 1:
        total = sum(size * c for size, c, r in zip(sizes, cost, replay, strict=True) if not r)
        given = [i.proportion or 0.0 for i in ingredients]
        shares = np.where(replay, 0.0, given if proportioned else mass)
        shares = (shares / shares.sum()) ** (1 / temperature)
        mass = np.where(replay, mass, total * shares / shares.sum())
    if replay_share:
        wanted = mass[~replay].sum() * replay_share / (1 - replay_share)
        mass = np.where(replay, wanted * mass / mass[replay].sum(), mass)
    return tuple(max(1, round(m / c)) for m, c in zip(mass, cost, strict=True))


def mean_tokens(ingredient: Ingredient) -> float:
    """Mean tokens of a row, from up to 64 rows spread evenly over the source."""
    size = len(ingredient.source)
    totals = []
    for row in sorted({int(i * size / _PROBED_ROWS) for i in range(_PROBED_ROWS)}):
        try:
            totals.append(sum(len(s.tokens) for s in ingredient.encode(ingredient.source[row], row, 0)))
        except RowError:
            continue
    if not totals:
        raise DataError(f"{ingredient.source.name}: none of {_PROBED_ROWS} rows tried gives a sample; check its format")
    return max(1.0, float(np.mean(totals)))


def _curriculum_keys(source: Any, field: str) -> np.ndarray:
    """float64 [rows]: what the rows are ordered by. A row that can't be read comes last; the ledger will count it."""
    keys = np.full(len(source), np.inf)
    for row in range(len(source)):
        try:
            record = source[row]
        except RowError:
            continue
        if field == "length":
            keys[row] = _text_size(record)
            continue
        try:
            keys[row] = float(record[field])
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{source.location(row)}: no number in the field {field!r} that data.curriculum orders by; "
                "add it to every row, or use curriculum='length'"
            ) from None
    return keys


def _text_size(value: Any) -> int:
    """Characters of all text in a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_text_size(v) for v in value.values())
    if isinstance(value, list | tuple):
        return sum(_text_size(v) for v in value)
    return 0
