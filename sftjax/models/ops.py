"""The decoder's mathematics as pure functions of arrays.

Shapes: `B` batch, `L` length, `D` model, `H` heads, `G` key/value heads, `K` head size, `P` rotated pairs (dim / 2).
Norms, rotary angles and softmax are float32 whatever the arrays' dtype.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sftjax.kernels import cpu
from sftjax.models.config import Rope, RopeScaling

Array = jax.Array


def rms_norm(x: Array, weight: Array, eps: float, plus_one: bool = False) -> Array:
    """x / rms(x) * weight over the last axis (arXiv:1910.07467); `plus_one`: the weight is stored minus 1."""
    if x.dtype == jnp.float32:
        return _exact_rms_norm(x, weight.astype(jnp.float32), eps, plus_one)
    return _rms_norm(x.astype(jnp.float32), weight, eps, plus_one).astype(x.dtype)


def _rms_norm(x: Array, weight: Array, eps: float, plus_one: bool) -> Array:
    normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return normed * _last_axis(_scale(weight, plus_one), x.ndim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _exact_rms_norm(x: Array, weight: Array, eps: float, plus_one: bool) -> Array:
    return cpu.in_float64(lambda x, weight: _rms_norm(x, weight, eps, plus_one), x, weight)


def _exact_backward(eps: float, plus_one: bool, saved: tuple[Array, Array], dy: Array) -> tuple[Array, ...]:
    def gradient(number, x, weight, dy):
        return jax.vjp(lambda *args: _rms_norm(*args, eps, plus_one), x, weight)[1](dy)[number]

    return tuple(cpu.in_float64(functools.partial(gradient, number), *saved, dy) for number in (0, 1))


_exact_rms_norm.defvjp(
    lambda x, weight, eps, plus_one: (_exact_rms_norm(x, weight, eps, plus_one), (x, weight)), _exact_backward
)


def layer_norm(x: Array, weight: Array, eps: float, plus_one: bool = False) -> Array:
    """Mean-centred norm over the last axis, with a scale and no bias (Cohere)."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * _last_axis(_scale(weight, plus_one), x.ndim)).astype(x.dtype)


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap * tanh(x / cap): keeps x within (-cap, cap) (Gemma 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def gated_activation(gate: Array, up: Array, kind: str, limit: float | None = None) -> Array:
    """What enters the MLP's down projection: activation(gate) * up.

    "swiglu_oai" (GPT-OSS) clamps both to `limit`, has a steeper sigmoid, and offsets `up` by 1.
    """
    if kind == "swiglu_oai":
        if limit is not None:
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return (up + 1) * (gate * jax.nn.sigmoid(1.702 * gate))
    if kind == "silu":
        return jax.nn.silu(gate) * up
    if kind in ("gelu", "gelu_tanh"):
        return jax.nn.gelu(gate, approximate=kind == "gelu_tanh") * up
    raise ValueError(f"unknown activation {kind!r}")


def dropout(x: Array, rate: float, rng: Array | None) -> Array:
    """Zeroes a fraction of x and scales the rest; without a key, x itself."""
    if rng is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def segment_lengths(positions_BxL: Array, segment_ids_BxL: Array) -> Array:
    """For each token, how long its segment is: the segment's largest position + 1. `[B, L]` i32.

    positions    0 1 2 0 1 0        segment_ids  1 1 1 2 2 3        ->  3 3 3 2 2 1
    """
    return segment_reduce(jax.ops.segment_max, positions_BxL, segment_ids_BxL) + 1


def real_tokens(weights_BxL: Array, segment_ids_BxL: Array) -> Array:
    """Which tokens belong to an example, not to padding: their segment has a token that is trained. `[B, L]` bool."""
    trained = (weights_BxL != 0).astype(jnp.int32)
    return segment_reduce(jax.ops.segment_max, trained, segment_ids_BxL) > 0


def segment_reduce(reduce, values_BxL: Array, segment_ids_BxL: Array) -> Array:
    """A reduction over each segment of a row, handed back to every token of it. Ids are 1.. and at most L."""
    bins = values_BxL.shape[1] + 1

    def one_row(values, ids):
        return reduce(values, ids, num_segments=bins)[ids]

    return jax.vmap(one_row)(values_BxL, segment_ids_BxL)


def neftune(x_BxLxD: Array, alpha: float, lengths_BxL: Array, real_BxL: Array, rng: Array) -> Array:
    """Uniform noise on embeddings (arXiv:2310.05914): alpha / sqrt(L D) * U[-1, 1], L the length of the own segment.

    Padding gets none.
    """
    size = alpha * jax.lax.rsqrt(lengths_BxL.astype(jnp.float32) * x_BxLxD.shape[-1])
    size = jnp.where(real_BxL, size, 0.0)[..., None]
    noise = jax.random.uniform(rng, x_BxLxD.shape, jnp.float32, -1.0, 1.0)
    return (x_BxLxD + size * noise).astype(x_BxLxD.dtype)


# ----------------------------------------------------------------------------------------------------------- RoPE


def rope_depends_on_length(rope: Rope | None) -> bool:
    return rope is not None and rope.scaling is not None and rope.scaling.kind in ("dynamic", "longrope")


def rope_tables(rope: Rope, max_position: int, positions_BxL: Array, lengths_BxL: Array) -> tuple[Array, Array]:
    """cos and sin of every token's angles, float32 `[B, L, P]`, times the scaling's attention factor.

    Args:
      rope: bases and scaling.
      max_position: the model's; where the scaling leaves `original_max_position` open.
      positions_BxL: within the segment.
      lengths_BxL: of the own segment, which "dynamic" and "longrope" choose their frequencies by.
    """
    frequencies, factor = rope_frequencies(rope, max_position, lengths_BxL)
    angles = positions_BxL.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rope_frequencies(rope: Rope, max_position: int, lengths_BxL: Array) -> tuple[Array, float]:
    """Angle per position, f32 `[1, 1, P]` or (chosen by length) `[B, L, P]`, and the factor on cos and sin.

    Formulas as in transformers' `modeling_rope_utils`, in float32 as there, so that angles agree to the last bits.
    """
    exponents = np.arange(0, rope.dim, 2).astype(np.float32) / np.float32(rope.dim)
    wavelengths = np.float32(rope.theta) ** exponents  # over 2 pi
    scaling = rope.scaling
    if scaling is None:
        return _constant(1 / wavelengths), 1.0
    original = scaling.original_max_position or max_position
    if scaling.kind == "linear":
        return _constant(1 / wavelengths / np.float32(scaling.factor)), 1.0
    if scaling.kind == "llama3":
        return _constant(_llama3(1 / wavelengths, scaling, original)), 1.0
    if scaling.kind == "yarn":
        return _constant(_yarn(wavelengths, rope, original)), _yarn_factor(scaling)
    if scaling.kind == "longrope":
        short = 1 / (np.asarray(scaling.short_factor, np.float32) * wavelengths)
        long = 1 / (np.asarray(scaling.long_factor, np.float32) * wavelengths)
        chosen = jnp.where((lengths_BxL > original)[..., None], _constant(long), _constant(short))
        return chosen, _longrope_factor(scaling, original)
    if scaling.kind == "dynamic":
        growth = scaling.factor * jnp.maximum(lengths_BxL, original).astype(jnp.float32) / original
        base = rope.theta * (growth - (scaling.factor - 1)) ** (rope.dim / (rope.dim - 2))
        return 1 / (base[..., None] ** _constant(exponents)), 1.0
    raise ValueError(f"unknown RoPE scaling {scaling.kind!r}")


def apply_rope(x_BxLxHxK: Array, tables: tuple[Array, Array], interleaved: bool = False) -> Array:
    """Rotates the first 2P of K dimensions of each head, in float32 (arXiv:2104.09864).

    Pairs are (i, i + P), or (2i, 2i + 1) if `interleaved`.
    """
    cos, sin = (table[:, :, None, :] for table in tables)
    dim = 2 * cos.shape[-1]
    rotated, rest = x_BxLxHxK[..., :dim].astype(jnp.float32), x_BxLxHxK[..., dim:]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = jnp.split(rotated, 2, axis=-1)
    parts = (first * cos - second * sin, second * cos + first * sin)
    rotated = jnp.stack(parts, axis=-1).reshape(rotated.shape) if interleaved else jnp.concatenate(parts, axis=-1)
    return jnp.concatenate([rotated.astype(x_BxLxHxK.dtype), rest], axis=-1)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling, original: int) -> np.ndarray:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, those between interpolated."""
    waves = np.float32(2 * math.pi) / frequencies
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    factor = np.float32(scaling.factor)
    smooth = (np.float32(original) / waves - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    stretched = np.where(waves > original / scaling.low_freq_factor, frequencies / factor, between)
    return np.where(waves < original / scaling.high_freq_factor, frequencies, stretched)


def _yarn(wavelengths: np.ndarray, rope: Rope, original: int) -> np.ndarray:
    """YaRN (arXiv:2309.00071): a ramp over the dimensions between kept and stretched frequencies."""
    scaling = rope.scaling

    def dimension_of(rotations: float) -> float:
        """The dimension that turns `rotations` times within the original length."""
        return rope.dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    return 1 / (np.float32(scaling.factor) * wavelengths) * ramp + 1 / wavelengths * (1 - ramp)


def _yarn_factor(scaling: RopeScaling) -> float:
    def scale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1.0)


def _longrope_factor(scaling: RopeScaling, original: int) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1.0 if scaling.factor <= 1 else math.sqrt(1 + math.log(scaling.factor) / math.log(original))


# --------------------------------------------------------------------------------------------------------- decoding


def _scale(weight: Array, plus_one: bool) -> Array:
    weight = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    return weight + 1 if plus_one else weight


def _last_axis(vector: Array, ndim: int) -> Array:
    return vector.reshape((1,) * (ndim - vector.ndim) + vector.shape)


def _constant(vector: np.ndarray) -> Array:
    return jnp.asarray(vector, jnp.float32)[None, None, :]
