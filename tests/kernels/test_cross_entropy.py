"""The fused loss against float64 formulas, and sharded against whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax.kernels import cpu
from sftjax.kernels.cross_entropy import cross_entropy
from sftjax.parallel import mesh as meshes

B, L, D, V = 4, 14, 16, 40


def case(seed=0, dtype=jnp.float32, vocab=V):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.standard_normal((B, L, D)), dtype)
    weight = jnp.asarray(rng.standard_normal((vocab, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (B, L)), jnp.int32)
    weights = jnp.asarray(rng.choice([0.0, 0.5, 1.0, 2.0], (B, L)), jnp.float32)
    return hidden, weight, targets, weights


def formula(hidden, weight, targets, weights, *, logit_scale=1.0, soft_cap=None, valid_vocab=None):
    """Loss, nll, hits and gradients, in float64 by hand."""
    x, w = np.asarray(hidden, np.float64), np.asarray(weight, np.float64)
    raw = x @ w.T * logit_scale
    logits = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
    logits = logits[..., :valid_vocab]
    top = logits.max(-1, keepdims=True)
    log_norm = np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top
    hit = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)
    nll = (log_norm - hit)[..., 0]
    d = np.exp(logits - log_norm)
    np.put_along_axis(
        d, np.asarray(targets)[..., None], np.take_along_axis(d, np.asarray(targets)[..., None], -1) - 1, -1
    )
    d = np.concatenate([d, np.zeros((*d.shape[:-1], w.shape[0] - d.shape[-1]))], -1)
    d = d * np.asarray(weights)[..., None] * logit_scale
    if soft_cap is not None:
        d = d * (1 - np.tanh(raw / soft_cap) ** 2)
    total = (np.asarray(weights) * nll).sum()
    return total, nll, hit[..., 0] >= top[..., 0], d @ w, np.einsum("blv,bld->vd", d, x)


OPTIONS = [
    {},
    {"logit_scale": 0.0625},
    {"soft_cap": 3.0},
    {"soft_cap": 30.0, "logit_scale": 0.5, "valid_vocab": 37},
    {"valid_vocab": 33},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk", [None, 8, 13, 56])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_equals_the_formula(options, chunk, on_cpu, monkeypatch):
    monkeypatch.setattr(cpu, "choose", lambda fast, plain, *args: (fast if on_cpu else plain)(*args))
    hidden, weight, targets, weights = case()
    targets = targets % options.get("valid_vocab", V)
    (total, nll, correct), pull = jax.vjp(
        lambda h, w: cross_entropy(h, w, targets, weights, chunk=chunk, **options), hidden, weight
    )
    zeros = (jnp.zeros_like(nll), np.zeros(correct.shape, jax.dtypes.float0))
    dh, dw = pull((jnp.float32(2.0), *zeros))
    want = formula(hidden, weight, targets, weights, **options)
    np.testing.assert_allclose(total, want[0], rtol=1e-5)
    np.testing.assert_allclose(nll, want[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(correct, want[2])
    np.testing.assert_allclose(dh, 2 * want[3], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(dw, 2 * want[4], rtol=1e-4, atol=2e-5)


def test_bfloat16_hidden_states():
    hidden, weight, targets, weights = case(dtype=jnp.bfloat16)
    weight = weight.astype(jnp.bfloat16).astype(jnp.float32)

    def loss(h, w):
        return cross_entropy(h, w, targets, weights)[0]

    total, (dh, dw) = jax.value_and_grad(loss, (0, 1))(hidden, weight)
    want = formula(hidden, weight, targets, weights)
    assert dh.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    for got, reference in ((total, want[0]), (dh, want[3]), (dw, want[4])):
        difference = np.max(np.abs(np.asarray(got, np.float64) - reference))
        assert difference <= 2e-2 * np.max(np.abs(reference))


def test_skipping_unweighted_tokens_changes_only_what_it_says():
    hidden, weight, targets, weights = case()

    def run(skip):
        def loss(h, w):
            total, *each = cross_entropy(h, w, targets, weights, chunk=8, skip_unweighted=skip)
            return total, each

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, weight)

    (whole, (nll, correct)), gradients = run(False)
    (total, (nll_some, correct_some)), gradients_some = run(True)
    np.testing.assert_allclose(total, whole, rtol=1e-6)
    np.testing.assert_allclose(nll_some, jnp.where(weights == 0, 0, nll), rtol=1e-6)
    np.testing.assert_array_equal(correct_some, correct & (weights != 0))
    for some, every in zip(gradients_some, gradients, strict=True):
        np.testing.assert_allclose(some, every, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("skip", [False, True])
def test_all_weights_zero_is_zero_and_finite(skip):
    hidden, weight, targets, weights = case()

    def loss(h, w):  # and every target is a padding row, whose loss is infinite
        return cross_entropy(h, w, targets % 5 + 35, 0 * weights, skip_unweighted=skip, valid_vocab=33)[0]

    total, gradients = jax.value_and_grad(loss, (0, 1))(hidden, weight)
    assert total == 0 and all(not jnp.any(g) for g in gradients)


def test_a_frozen_head_costs_no_gradient():
    hidden, weight, targets, weights = case()

    def loss(h, w):
        return cross_entropy(h, w, targets, weights)[0]

    def count(function):
        return jax.jit(function).lower(hidden, weight).compile().as_text().count(" dot(")

    assert count(jax.grad(loss, (0, 1))) == 3 and count(jax.grad(loss, 0)) == 2 and count(loss) == 1


def test_logits_never_exist_whole():
    tokens, vocab = 256, 512
    shapes = [(tokens, D), (vocab, D)]
    text = (
        jax.jit(
            jax.grad(lambda h, w: cross_entropy(h, w, jnp.zeros(tokens, int), jnp.ones(tokens), chunk=32)[0], (0, 1))
        )
        .lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
        .compile()
        .as_text()
    )
    assert f"[{tokens},{vocab}]" not in text and f"[{vocab},{tokens}]" not in text


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 4, "context": 2}])
@pytest.mark.parametrize("options", [{}, {"soft_cap": 3.0, "valid_vocab": 37}, {"skip_unweighted": True, "chunk": 4}])
def test_sharded_equals_whole(shape, options):
    mesh = meshes.make(shape)
    hidden, weight, targets, weights = case()
    targets = targets % 37

    def run(mesh):
        def loss(h, w):
            return cross_entropy(h, w, targets, weights, mesh=mesh, **options)

        value = jax.jit(loss)(hidden, weight)
        return *value, *jax.jit(jax.grad(lambda h, w: loss(h, w)[0], (0, 1)))(hidden, weight)

    for got, want in zip(run(mesh), run(None), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_sharded_vocabulary_is_not_gathered():
    mesh = meshes.make({"tensor": 8})
    hidden, weight, targets, weights = case()
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor", None))

    def loss(h, w):
        return cross_entropy(h, w, targets, weights, mesh=mesh)[0]

    text = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, jax.device_put(weight, place)).compile().as_text()
    assert "all-gather" not in text
