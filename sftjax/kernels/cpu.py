"""What XLA's CPU backend wants to see, in one place.

It multiplies bfloat16 at the machine's speed only for row-major operands, a float32 result that is row-major too, and
the right operand contracted on either axis but the left one on its last. Everything else it widens to float32 first
(measured on two cores with AVX512-bf16: 860 against 330 GFLOP/s; torch reaches 960). Where layout assignment turns a
transpose into a column-major *result* of such a product, jax 0.10 even fails at run time ("BF16 x BF16 = F32"). So
layouts are pinned here.

The compiler can't partition a pinned layout (it gathers), so none of this is used with several devices.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

Array = jax.Array


def choose(on_cpu: Callable, otherwise: Callable, *args):
    """`on_cpu(*args)` where the program is lowered for a single CPU, else `otherwise(*args)`.

    Decided when the program is lowered, so a program compiled ahead of time for a TPU gets the TPU's form.
    """
    if jax.device_count() > 1:
        return otherwise(*args)
    return jax.lax.platform_dependent(*args, cpu=on_cpu, default=otherwise)


def row_major(x: Array) -> Array:
    """`x` in memory as its shape says; the barrier keeps the compiler from moving the copy."""
    return jax.lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))


def product(a: Array, b: Array, b_axis: int, precision=None) -> Array:
    """`a[m, k]` times `b` (`[n, k]` for `b_axis` 1, `[k, n]` for 0) as float32 `[m, n]`."""
    dims = (((1,), (b_axis,)), ((), ()))
    return row_major(dot_general(a, b, dims, precision, jnp.float32))


def dot_general(a: Array, b: Array, dims, precision, dtype) -> Array:
    """`lax.dot_general` with a result of `dtype`; float32 operands `in_float64`."""
    if a.dtype == jnp.float32:
        return in_float64(lambda a, b: jax.lax.dot_general(a, b, dims, precision), a, b).astype(dtype)
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=dtype)


def in_float64(function: Callable, *args: Array) -> Array:
    """`function(*args)` of float32 arrays, computed in float64 on a CPU; not to be differentiated.

    XLA:CPU adds up a whole axis in one chain, which loses more than the blocked sums of other libraries: on real text
    SmolLM2-135M's logits differed by up to 1.7e-4 from transformers', whose own rounding is 9e-5. With products and
    norms computed so, it is 1.1e-4 at most. Products take twice the time; who wants speed computes in
    bfloat16.
    """

    def exact(*args):
        with jax.enable_x64(True):
            return function(*(x.astype(jnp.float64) for x in args)).astype(jnp.float32)

    return jax.lax.platform_dependent(*args, cpu=exact, default=function)
