"""One seam for every matmul with a weight: dense here, NF4 and int8 through `stored_linear`.

A weight is kept as Hugging Face keeps it, `[out, in]`. The gradient rule is written by hand for three reasons:
the residual is the weight's *stored form* (autodiff would keep a dequantised copy of NF4 codes), a frozen weight
costs no weight gradient, and the CPU wants its operands in particular forms (`kernels/cpu.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sftjax.kernels import cpu

Array = jax.Array


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """`x[..., in] @ weight[out, in].T + bias[out]`, as `[..., out]` in `x.dtype`.

    The weight may be stored in another type: it is cast to `x.dtype` for the product, its gradient is in its own.
    Products accumulate in float32; float32 operands are multiplied as real float32 on every platform.
    """
    y = stored_linear(dense, x, weight)
    return y if bias is None else y + bias.astype(y.dtype)


def dense(stored: Array, dtype: jnp.dtype) -> Array:
    """The stored form of a plain weight: itself."""
    return stored.astype(dtype)


def stored_linear(materialise: Callable[[Any, jnp.dtype], Array], x: Array, stored: Any) -> Array:
    """`x[..., in]` times the transpose of `materialise(stored, x.dtype)`, which is `[out, in]`.

    Args:
      materialise: a module-level function (it is a static argument); called in the forward and in the backward pass.
      stored: a pytree. Only `stored` is kept for the backward pass. If `materialise` is `dense`, it is the weight and
        gets a gradient when it is being trained; any other stored form is a constant.
    """
    return _stored_linear(materialise, x, stored)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stored_linear(materialise, x, stored):
    return forward_product(x, materialise(stored, x.dtype), x.dtype)


def _forward(materialise, x, stored):
    leaves, treedef = jax.tree.flatten(stored, is_leaf=_is_primal)
    trained = any(leaf.perturbed for leaf in leaves)
    if trained and materialise is not dense:
        raise ValueError("a quantised weight can't be trained; train an adapter beside it")
    values = treedef.unflatten([leaf.value for leaf in leaves])
    y = _stored_linear(materialise, x.value, values)
    return y, (x.value if trained else None, values if x.perturbed else None, _like(x.value), _like(values))


def _backward(materialise, residuals, dy):
    x, stored, like_x, like_stored = residuals
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return None, None
    dx = dw = None
    if stored is not None:
        dx = input_product(dy, materialise(stored, dy.dtype), like_x.dtype)
    if x is not None:
        dw = weight_product(dy, x, like_stored.dtype)
    return dx, dw


def _is_primal(leaf) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _like(tree):
    """Types without data: zero-sized arrays, because residuals must be arrays."""
    return jax.tree.map(lambda leaf: jnp.zeros((0,), leaf.dtype), tree)


_stored_linear.defvjp(_forward, _backward, symbolic_zeros=True)


# --- the three products -------------------------------------------------------------------------------------------


def forward_product(x: Array, weight: Array, dtype: jnp.dtype) -> Array:
    """`[..., in] x [out, in] -> [..., out]` in `dtype`."""

    def plain(x, weight):
        return contract(x, weight, (x.ndim - 1,), (1,), dtype)

    def on_cpu(x, weight):
        y = cpu.product(_rows(x), weight, 1, precision_for(x.dtype))
        return y.astype(dtype).reshape(*x.shape[:-1], weight.shape[0])

    return cpu.choose(on_cpu, plain, x, weight)


def input_product(dy: Array, weight: Array, dtype: jnp.dtype) -> Array:
    """`[..., out] x [out, in] -> [..., in]` in `dtype`."""

    def plain(dy, weight):
        return contract(dy, weight, (dy.ndim - 1,), (0,), dtype)

    def on_cpu(dy, weight):
        dx = cpu.product(_rows(dy), weight, 0, precision_for(dy.dtype))
        return dx.astype(dtype).reshape(*dy.shape[:-1], weight.shape[1])

    return cpu.choose(on_cpu, plain, dy, weight)


def weight_product(dy: Array, x: Array, dtype: jnp.dtype) -> Array:
    """`[..., out] x [..., in] -> [out, in]` in `dtype`."""

    def plain(dy, x):
        batch = tuple(range(x.ndim - 1))
        return contract(dy, x, batch, batch, dtype)

    def on_cpu(dy, x):
        return cpu.product(cpu.row_major(_rows(dy).T), _rows(x), 0, precision_for(x.dtype)).astype(dtype)

    return cpu.choose(on_cpu, plain, dy, x)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def contract(a: Array, b: Array, a_axes: tuple[int, ...], b_axes: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """`lax.dot_general` without batch axes. The result is asked for in `dtype`, so that no wider one reaches memory;
    the sum inside is float32 anyway."""
    dims = ((a_axes, b_axes), ((), ()))
    precision = precision_for(a.dtype)
    return cpu.dot_general(a, b, dims, precision, dtype)


def precision_for(dtype: jnp.dtype) -> jax.lax.Precision:
    """Float32 means float32: without this a TPU rounds operands to bfloat16 and a GPU to TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
