"""Toy sources and encoders for the tests of the pipeline (in a module of their own: worker processes import it)."""

from __future__ import annotations

import os
import signal

import numpy as np

from sftjax.data.mixture import Ingredient
from sftjax.data.types import RowError, Sample


class Rows:
    """A list of rows as a source."""

    def __init__(self, rows, name="toy"):
        self.rows, self.name = rows, name

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def location(self, index):
        return f"{self.name}.jsonl:{index + 1}"


def encode(row, index=0, source=0):
    """`n`: tokens (one int, or a list: several samples), all trained but the first `prompt`; `error`: a reason."""
    if "error" in row:
        raise RowError(row["error"], "planted")
    samples = []
    for number, n in enumerate(row["n"] if isinstance(row["n"], list) else [row["n"]]):
        tokens = (1000 * (index + 1) + np.arange(n)).astype(np.int32)
        weights = np.ones(n, np.float32)
        weights[: row.get("prompt", 1)] = 0
        samples.append(Sample(tokens, weights, source, index, number))
    return samples


def encode_and_die_once(row, index=0, source=0):
    """Kills its own process at row 20, the first time."""
    marker = row["marker"]
    if index == 20 and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(row, index, source)


def encode_unless_jax_started(row, index=0, source=0):
    """Fails where a jax backend has been initialised (Grain imports jax, and a second process can't have the TPU)."""
    import jax

    assert not jax._src.xla_bridge._backends
    return encode(row, index, source)


def lognormal_rows(count, mean=60, seed=0, sigma=0.8, **more):
    """Rows of lognormal length."""
    lengths = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return [{"n": int(max(4, n)), **more} for n in lengths]


def toy(rows, name="toy", **options):
    """An ingredient of toy rows."""
    return Ingredient(Rows(rows, name), options.pop("encode", encode), **options)
