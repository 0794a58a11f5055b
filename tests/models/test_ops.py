import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax.models import ops
from sftjax.models.config import Rope, RopeScaling


def test_segment_lengths_as_drawn():
    positions = jnp.array([[0, 1, 2, 0, 1, 0]])
    segments = jnp.array([[1, 1, 1, 2, 2, 3]])
    np.testing.assert_array_equal(ops.segment_lengths(positions, segments), [[3, 3, 3, 2, 2, 1]])


def test_a_segment_with_a_trained_token_is_real_and_padding_is_not():
    weights = jnp.array([[0, 0.5, 0, 0, 0, 0]])
    segments = jnp.array([[1, 1, 1, 2, 2, 2]])
    np.testing.assert_array_equal(ops.real_tokens(weights, segments), [[True] * 3 + [False] * 3])


@pytest.mark.parametrize("position", [0, 255, 257, 8191])
def test_rope_angles_are_float32_even_at_far_positions(position):
    """bfloat16 can't tell 8191 from 8192: the error would be as large as the values."""
    cos, sin = ops.rope_tables(Rope(10_000.0, 64), 8192, jnp.array([[position]]), jnp.array([[position + 1]]))
    angles = position / 10_000.0 ** (np.arange(0, 64, 2) / 64)
    assert np.abs(cos[0, 0] - np.cos(angles)).max() <= 1e-7 * position + 1e-6
    assert np.abs(sin[0, 0] - np.sin(angles)).max() <= 1e-7 * position + 1e-6


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones(factor):
    scaling = RopeScaling("llama3", factor, original_max_position=8192)
    scaled, attention = ops.rope_frequencies(Rope(500_000.0, 128, scaling), 131072, jnp.ones((1, 1)))
    plain = 500_000.0 ** -(np.arange(0, 128, 2) / 128)
    waves = 2 * np.pi / plain
    assert attention == 1
    np.testing.assert_allclose(scaled[0, 0][waves < 2048], plain[waves < 2048], rtol=1e-6)
    np.testing.assert_allclose(scaled[0, 0][waves > 8192], plain[waves > 8192] / factor, rtol=1e-6)
    between = (waves >= 2048) & (waves <= 8192)
    assert np.all(scaled[0, 0][between] <= plain[between]) and np.all(scaled[0, 0][between] >= plain[between] / factor)


def test_length_dependent_frequencies_are_chosen_by_segment():
    scaling = RopeScaling("longrope", 4.0, 4, short_factor=(1.0, 2.0), long_factor=(3.0, 5.0))
    positions, segments = jnp.array([[0, 1, 2, 3, 4, 0, 1]]), jnp.array([[1, 1, 1, 1, 1, 2, 2]])
    lengths = ops.segment_lengths(positions, segments)
    frequencies, factor = ops.rope_frequencies(Rope(100.0, 4, scaling), 16, lengths)
    plain = np.array([1.0, 0.1])
    np.testing.assert_allclose(frequencies[0, 0], plain / [3, 5], rtol=1e-6)
    np.testing.assert_allclose(frequencies[0, 6], plain / [1, 2], rtol=1e-6)
    assert factor == pytest.approx(np.sqrt(2))  # sqrt(1 + ln 4 / ln 4)


def test_rope_leaves_the_rest_of_a_head_alone():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    tables = ops.rope_tables(Rope(10.0, 4), 16, jnp.arange(3)[None], jnp.full((1, 3), 3))
    rotated = ops.apply_rope(x, tables)
    np.testing.assert_array_equal(rotated[..., 4:], x[..., 4:])
    np.testing.assert_allclose(rotated[:, 0], x[:, 0])
    np.testing.assert_allclose(jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)


def test_norms_are_float32_inside():
    x = (1000 + jax.random.normal(jax.random.key(0), (4, 64))).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    normed = ops.rms_norm(x, jnp.ones(64), 1e-6)
    assert normed.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(normed, np.float64), exact, rtol=2**-8)


def test_neftune_noise_has_the_size_of_the_own_segment_and_spares_padding():
    length, dim, alpha = 12, 64, 5.0
    lengths = jnp.array([[4] * 4 + [8] * 8])
    real = jnp.array([[True] * 8 + [False] * 4])
    noise = ops.neftune(jnp.zeros((1, length, dim)), alpha, lengths, real, jax.random.key(1))[0]
    for rows, size in ((slice(0, 4), 4), (slice(4, 8), 8)):
        bound = alpha / np.sqrt(size * dim)
        assert 0.95 * bound < np.abs(noise[rows]).max() <= bound
    assert not noise[8:].any()
