"""NF4 and int8 weights, against bitsandbytes' own arrays and against plain reasoning."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax.errors import ConfigError
from sftjax.kernels import blockwise, nf4
from sftjax.kernels.linear import linear

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "nf4.npz")
NAMES = sorted({name.split("/")[0] for name in GOLDEN.files if "/" in name})


def golden(name):
    return {key.split("/")[1]: GOLDEN[key] for key in GOLDEN.files if key.startswith(f"{name}/")}


def test_the_maps_are_bitsandbytes_own():
    assert str(GOLDEN["version"]) == "0.50.2"
    np.testing.assert_array_equal(blockwise.dynamic_map(True), GOLDEN["dynamic_map"])
    np.testing.assert_array_equal(blockwise.dynamic_map(False), GOLDEN["dynamic_map_unsigned"])


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_bitsandbytes_own_to_the_bit(name):
    """The offset is a mean, whose summation order is nobody's promise: 2 ulp. What follows from it, with its offset."""
    want = golden(name)
    got = jax.jit(nf4.quantise)(want["weight"])
    np.testing.assert_array_equal(got["codes"], want["codes"])
    np.testing.assert_array_max_ulp(np.asarray(got["absmax_offset"]), want["absmax_offset"], 2)
    scales = jax.jit(nf4.quantise_scales)(want["largest"], want["absmax_offset"])
    np.testing.assert_array_equal(scales["absmax"], want["absmax"])
    np.testing.assert_array_equal(scales["absmax_scale"], want["absmax_scale"])
    # our own mean: the same codes here too, the second scale as near as the mean
    np.testing.assert_array_equal(got["absmax"], want["absmax"])
    np.testing.assert_allclose(got["absmax_scale"], want["absmax_scale"], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_dequantised_values(name):
    want = golden(name)
    stored = {key: jnp.asarray(want[key]) for key in ("codes", "absmax", "absmax_scale", "absmax_offset")}
    np.testing.assert_allclose(nf4.dequantise(stored), want["values"], rtol=1e-6, atol=1e-9)
    assert nf4.dequantise(stored, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_stacked_layers_and_experts_are_quantised_one_by_one(kind):
    weight = jax.random.normal(jax.random.key(0), (2, 3, 16, 128))
    stored = nf4.quantise(weight, kind)
    for layer in range(2):
        for expert in range(3):
            alone = nf4.quantise(weight[layer, expert], kind)
            for key, leaf in alone.items():
                np.testing.assert_array_equal(stored[key][layer, expert], leaf)
    error = jnp.abs(nf4.dequantise(stored) - weight).mean() / jnp.abs(weight).mean()
    assert error < (0.1 if kind == "nf4" else 0.01)
    shapes = nf4.stored_shapes(weight.shape, kind)
    assert {key: leaf.shape for key, leaf in shapes.items()} == {key: leaf.shape for key, leaf in stored.items()}


def test_bits_a_parameter():
    """4 bits, 8 for 64, 32 for 64 * 256, 32 once: 4.127 and a little."""
    shapes = nf4.stored_shapes((1024, 4096))
    bits = sum(8 * leaf.size * leaf.dtype.itemsize for leaf in shapes.values()) / (1024 * 4096)
    assert bits == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_linear_keeps_codes_and_nothing_else(kind):
    """Forward and dx equal those of the dequantised weight; the backward pass holds no float weight."""
    weight = jax.random.normal(jax.random.key(0), (96, 128))
    x = jax.random.normal(jax.random.key(1), (5, 128))
    stored = nf4.quantise(weight, kind)
    plain = nf4.dequantise(stored)
    out, pullback = jax.vjp(lambda x: nf4.linear_quant(x, stored), x)
    want, want_pullback = jax.vjp(lambda x: linear(x, plain), x)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    dy = jax.random.normal(jax.random.key(2), out.shape)
    np.testing.assert_allclose(pullback(dy)[0], want_pullback(dy)[0], rtol=1e-5, atol=1e-5)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "dtype")]
    assert not [leaf.shape for leaf in kept if leaf.dtype == jnp.float32 and leaf.size >= weight.size]


def test_quantising_makes_no_wide_temporary():
    """Thresholds are compared one level at a time: no array of 16 candidates for each weight."""
    weight = jax.ShapeDtypeStruct((512, 1024), jnp.float32)
    memory = jax.jit(nf4.quantise).lower(weight).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3 * 512 * 1024 * 4


def test_rows_that_are_no_whole_blocks_are_refused():
    with pytest.raises(ConfigError, match="blocks of 64"):
        nf4.quantise(jnp.zeros((8, 100)))


def test_transform_takes_projections_only():
    transform = nf4.make_transform("nf4", nf4.is_projection)
    weight = jnp.ones((8, 64))
    assert transform("layers_0/0/mlp/up_proj/weight", weight).keys() == nf4.quantise(weight).keys()
    assert transform("layers_0/0/mlp/up_proj/bias", weight[0]) is None
    assert transform("embed_tokens/weight", weight) is None
    assert transform("layers_0/0/mlp/router/weight", weight) is None


@pytest.mark.parametrize("signed", [True, False])
def test_count_below_is_the_nearest_value(signed):
    x = jax.random.uniform(jax.random.key(0), (4000,), minval=-1.0 if signed else 0.0)
    values = blockwise.dynamic_map(signed)
    codes = np.asarray(blockwise.count_below(x, blockwise.thresholds(signed)))
    nearest = np.abs(np.asarray(x)[:, None] - values).min(axis=1)
    np.testing.assert_allclose(np.abs(np.asarray(x) - values[codes]), nearest, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("last", "shards", "block"), [(576, 1, 192), (4096, 8, 256), (1536, 1, 256), (100, 3, 100), (7, 1, 7)]
)
def test_block_size(last, shards, block):
    assert blockwise.block_size(last, shards) == block
