"""8-bit and bfloat16 moments: how small, how near to float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax import optim, optim8bit, tree
from sftjax.checkpoint import Checkpointer
from sftjax.kernels import blockwise


def params_like_smollm2(repeat=2):
    """SmolLM2-135M's shapes, two of thirty layers and a sixteenth of the vocabulary."""
    shapes = {
        "embed_tokens/weight": (3072, 576),
        "layers_0/0/self_attn/q_proj/weight": (repeat, 576, 576),
        "layers_0/0/self_attn/k_proj/weight": (repeat, 192, 576),
        "layers_0/0/mlp/down_proj/weight": (repeat, 576, 1536),
        "layers_0/0/pre_attention_norm/weight": (repeat, 576),
    }
    return tree.unflatten(
        {f"params/{path}": jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    )


def test_at_most_two_point_two_bytes_a_parameter():
    params = params_like_smollm2()
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    for name, limit in (("adamw_8bit", 2.2), ("adamw_bf16", 4.01), ("adamw", 8.01)):
        optimizer, _ = optim.make_optimizer(name=name, learning_rate=1e-3, total_steps=4)
        assert optim8bit.state_bytes(jax.eval_shape(optimizer.init, params)) / count < limit


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_bf16"])
def test_the_state_is_saved_and_restored(name, tmp_path):
    params = {"params": {"norm": {"weight": jnp.ones(64)}, "embed_tokens": {"weight": jnp.ones((128, 64))}}}
    optimizer, _ = optim.make_optimizer(name=name, learning_rate=1e-3, total_steps=4)
    gradients = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, position={}, metrics={})
        checkpointer.wait()
        restored = checkpointer.restore(jax.eval_shape(lambda: state))
    jax.tree.map(np.testing.assert_array_equal, restored.state, state)


@pytest.mark.parametrize("signed", [True, False])
def test_quantised_moments_are_near(signed):
    """Seven decades: a number a ten-thousandth of the block's largest still has a tenth's precision."""
    magnitude = 10.0 ** jax.random.uniform(jax.random.key(0), (64, 512), minval=-4.0, maxval=0.0)
    sign = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, magnitude.shape), 1.0, -1.0) if signed else 1.0
    x = (magnitude * sign).at[:, ::256].set(1.0)
    codes, scales = blockwise.quantise(x, 256, signed=signed)
    assert codes.dtype == jnp.uint8 and codes.shape == x.shape and scales.shape == (64, 2)
    back = blockwise.dequantise(codes, scales, signed=signed)
    assert float(jnp.max(jnp.abs(back - x) / jnp.abs(x))) < (0.4 if signed else 0.2)
    assert float(jnp.mean(jnp.abs(back - x) / jnp.abs(x))) < (0.05 if signed else 0.025)
    zeros = blockwise.dequantise(*blockwise.quantise(jnp.zeros((2, 256)), 256, signed=signed), signed=signed)
    assert np.all(np.asarray(zeros) == 0)


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_bf16"])
def test_small_moments_reach_the_same_loss(name):
    """A regression whose gradients differ ten thousandfold within a block: near the loss of float32 moments."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = jnp.logspace(-2, 0, 96)[None]
    inputs = jax.random.normal(keys[0], (512, 96)) * sizes
    truth = jax.random.normal(keys[1], (96, 64))
    targets = inputs @ truth + 0.1 * jax.random.normal(keys[2], (512, 64))

    def loss_of(params):
        return jnp.mean((inputs @ params["params"]["weight"].T - targets) ** 2)

    def train(name):
        optimizer, _ = optim.make_optimizer(
            name=name, learning_rate=3e-2, total_steps=150, warmup_steps=5, max_grad_norm=0
        )
        params = {"params": {"weight": jnp.zeros((64, 96))}}
        state = optimizer.init(params)

        @jax.jit
        def step(params, state):
            loss, gradients = jax.value_and_grad(loss_of)(params)
            updates, state = optimizer.update(gradients, state, params)
            return optim.apply_updates(params, updates), state, loss

        for _ in range(150):
            params, state, loss = step(params, state)
        return float(loss)

    start = float(loss_of({"params": {"weight": jnp.zeros((64, 96))}}))
    want, got = train("adamw"), train(name)
    assert want < 0.05 * start
    assert abs(got - want) < (0.08 if name == "adamw_8bit" else 0.01) * want


def test_bf16_moments_are_the_same_on_every_run():
    params = {"params": {"weight": jnp.ones((64, 128))}}
    gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(3), p.shape), params)
    optimizer, _ = optim.make_optimizer(
        name="adamw_bf16", learning_rate=1e-2, total_steps=4, schedule="constant", seed=7
    )
    states = []
    for _ in range(2):
        state = optimizer.init(params)
        for _ in range(2):
            _, state = jax.jit(optimizer.update)(gradients, state, params)
        states.append(state)
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(one, other)
