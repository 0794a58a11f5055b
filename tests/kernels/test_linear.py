"""The linear seam: values, gradients, and what must not be computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax.kernels import cpu, linear

RNG = np.random.default_rng(0)


def array(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.standard_normal(shape), dtype)


@pytest.fixture(params=["plain", "cpu"])
def form(request, monkeypatch):
    """Both forms of the products; tests have eight devices, where `choose` would always take the plain one."""
    pick = {"plain": lambda on_cpu, otherwise, *args: otherwise(*args), "cpu": lambda on_cpu, _, *args: on_cpu(*args)}
    monkeypatch.setattr(cpu, "choose", pick[request.param])
    return request.param


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 5)])
def test_equals_the_formula_forward_and_backward(form, shape):
    x, w, b = array(*shape, 8), array(6, 8), array(6)

    def ours(x, w, b):
        return jnp.sum(jnp.sin(linear.linear(x, w, b.reshape((1,) * len(shape) + (6,)))))

    def formula(x, w, b):
        return jnp.sum(jnp.sin(x @ w.T + b.reshape((1,) * len(shape) + (6,))))

    for got, want in zip(jax.grad(ours, (0, 1, 2))(x, w, b), jax.grad(formula, (0, 1, 2))(x, w, b), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_bfloat16_products_and_gradients_in_the_weights_own_type(form):
    x, w = array(4, 64, 32, dtype=jnp.bfloat16), array(48, 32)
    y, pull = jax.vjp(linear.linear, x, w)
    dy = array(4, 64, 48, dtype=jnp.bfloat16)
    dx, dw = pull(dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    x64, w64, dy64 = (np.asarray(a, np.float64) for a in (x, w.astype(jnp.bfloat16), dy))
    for got, want in ((y, x64 @ w64.T), (dx, dy64 @ w64), (dw, np.einsum("abo,abi->oi", dy64, x64))):
        difference = np.max(np.abs(np.asarray(got, np.float64) - want))
        assert difference <= 1e-2 * np.max(np.abs(want))


def products(function, *args):
    """How many matrix products the compiled function holds."""
    return jax.jit(function).lower(*args).compile().as_text().count(" dot(")


def test_a_frozen_weight_costs_no_gradient(form):
    x, w = array(5, 8), array(6, 8)

    def loss(x, w):
        return jnp.sum(jnp.sin(linear.linear(x, w)))

    both = products(jax.grad(loss, (0, 1)), x, w)
    assert products(jax.grad(loss, 0), x, w) == both - 1
    assert products(jax.grad(loss, 1), x, w) == both - 1


def test_inside_scan_with_remat(form):
    x, stack = array(5, 8), array(3, 8, 8)

    def ours(x, stack):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(linear.linear(x, w)), None), prevent_cse=False)
        return jnp.sum(jax.lax.scan(body, x, stack)[0])

    def formula(x, stack):
        for w in stack:
            x = jnp.tanh(x @ w.T)
        return jnp.sum(x)

    for got, want in zip(jax.grad(ours, (0, 1))(x, stack), jax.grad(formula, (0, 1))(x, stack), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_frozen_weights_stay_free_inside_scan_with_remat(form):
    x, stack = array(5, 8), array(3, 8, 8)

    def loss(x, stack):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(linear.linear(x, w)), None), prevent_cse=False)
        return jnp.sum(jax.lax.scan(body, x, stack)[0])

    assert products(jax.grad(loss, 0), x, stack) < products(jax.grad(loss, (0, 1)), x, stack)


def test_under_vmap_of_weights_and_inputs(form):
    x, w = array(3, 5, 8), array(3, 6, 8)

    def ours(x, w):
        return jnp.sum(jnp.sin(linear.linear(x, w)))

    got = jax.vmap(jax.grad(ours, (0, 1)))(x, w)
    want = jax.vmap(jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w.T)), (0, 1)))(x, w)
    for g, r in zip(got, want, strict=True):
        np.testing.assert_allclose(g, r, rtol=1e-5, atol=1e-5)


def halved(stored, dtype):
    return (stored["codes"].astype(dtype) * stored["scale"].astype(dtype)[:, None]).astype(dtype)


def test_a_stored_form_is_the_only_residual():
    x = array(5, 8)
    stored = {"codes": jnp.asarray(RNG.integers(-7, 7, (6, 8)), jnp.int8), "scale": array(6)}
    y, pull = jax.vjp(lambda x: linear.stored_linear(halved, x, stored), x)
    np.testing.assert_allclose(y, x @ halved(stored, x.dtype).T, rtol=1e-5)
    (dx,) = pull(jnp.ones_like(y))
    np.testing.assert_allclose(dx, jnp.ones((5, 6)) @ halved(stored, x.dtype), rtol=1e-5, atol=1e-5)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size == 48]
    assert [leaf.dtype for leaf in kept] == [jnp.int8]


def test_training_a_stored_form_is_refused():
    stored = {"codes": jnp.ones((6, 8), jnp.int8), "scale": jnp.ones(6)}
    with pytest.raises(ValueError, match="adapter"):
        jax.grad(lambda scale: jnp.sum(linear.stored_linear(halved, jnp.ones((2, 8)), stored | {"scale": scale})))(
            stored["scale"]
        )
