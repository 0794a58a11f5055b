"""Optimizers and schedules, against torch's own numbers (tests/golden/make_optim.py) and plain reasoning."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sftjax import optim, optim8bit, tree
from sftjax.errors import ConfigError

GOLDEN = np.load(Path(__file__).parent / "golden" / "optim.npz")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("cosine", dict(warmup_steps=3)),
        ("cosine", dict(warmup_ratio=0.11)),  # rounded up
        ("cosine_no_warmup", dict()),
        ("linear", dict(warmup_steps=3)),
        ("constant", dict(warmup_steps=3)),
        ("wsd", dict(warmup_steps=3, decay_ratio=0.25, min_lr_ratio=0.1)),
    ],
)
def test_schedules_are_transformers_own(name, settings):
    want = GOLDEN[f"schedule/{name}"]
    schedule = optim.make_schedule(name.removesuffix("_no_warmup"), 2e-3, 20, **settings)
    got = np.array([schedule(step) for step in range(24)])
    if name.startswith("cosine"):  # transformers' cosine rises again after the last step
        got, want = got[:21], want[:21]
    if name == "wsd":  # transformers warms up from min_lr_ratio
        got, want = got[3:], want[3:]
    if name == "constant":
        assert got[0] == 0
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["adamw", "adamw_torch", "paged_adamw_32bit"])
def test_adamw_is_torchs(name):
    """Clipping, moments, decoupled decay on the matrix alone, warm-up and cosine: seven steps."""
    params = {"layers_9": {"weight": jnp.asarray(GOLDEN["weight/start"]), "bias": jnp.asarray(GOLDEN["bias/start"])}}
    optimizer, _ = optim.make_optimizer(
        name=name, learning_rate=1e-2, total_steps=7, warmup_steps=2, weight_decay=0.1, max_grad_norm=1.0
    )
    state = optimizer.init(params)
    for step in range(7):
        gradients = {"layers_9": {key: jnp.asarray(GOLDEN[f"{key}/gradients"][step]) for key in ("weight", "bias")}}
        updates, state = jax.jit(optimizer.update)(gradients, state, params)
        params = optim.apply_updates(params, updates)
        for key in ("weight", "bias"):
            np.testing.assert_allclose(params["layers_9"][key], GOLDEN[f"{key}/after"][step], rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize(
    ("path", "decays"),
    [
        ("params/embed_tokens/weight", True),
        ("params/layers_0/0/self_attn/q_proj/weight", True),
        ("params/layers_0/0/self_attn/q_proj/bias", False),
        ("params/layers_0/0/self_attn/q_norm/weight", False),
        ("params/layers_0/0/pre_attention_norm/weight", False),
        ("params/norm/weight", False),
        ("params/lm_head/weight", True),
        ("adapter/layers_0/0/mlp/up_proj/lora_A", True),
        ("adapter/layers_0/0/mlp/up_proj/magnitude", True),
        ("adapter/layers_0/0/adapter_mlp/down/bias", False),
    ],
)
def test_what_decays(path, decays):
    import re

    assert bool(re.fullmatch(optim.DECAY_REGEX, path)) == decays


def test_loraplus_moves_b_faster():
    params = {"adapter": {"layers_0": {"lora_A": jnp.ones((2, 4, 8)), "lora_B": jnp.ones((2, 8, 4))}}}
    gradients = jax.tree.map(jnp.ones_like, params)
    settings = dict(learning_rate=1e-2, total_steps=4, schedule="constant", max_grad_norm=0, weight_decay=0.5)
    moved = []
    for ratio in (1.0, 16.0):
        optimizer, _ = optim.make_optimizer(loraplus_lr_ratio=ratio, **settings)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        moved.append(updates["adapter"]["layers_0"])
    np.testing.assert_allclose(moved[1]["lora_A"], moved[0]["lora_A"])
    np.testing.assert_allclose(moved[1]["lora_B"], 16 * moved[0]["lora_B"], rtol=1e-6)


def stacked_params():
    key = jax.random.key(0)
    return {
        "params": {
            "embed_tokens": {"weight": jax.random.normal(key, (128, 256))},
            "layers_0": {
                "0": {
                    "self_attn": {"q_proj": {"weight": jax.random.normal(key, (3, 256, 128))}},
                    "mlp": {"experts": {"up_proj": {"weight": jax.random.normal(key, (3, 2, 128, 192))}}},
                    "pre_attention_norm": {"weight": jnp.ones((3, 256))},
                }
            },
        }
    }


@pytest.mark.parametrize("name", sorted(set(optim.OPTIMIZERS.values())))
def test_every_optimizer_runs_and_keeps_its_state_in_shape(name):
    params = stacked_params()
    optimizer, _ = optim.make_optimizer(name=name, learning_rate=1e-2, total_steps=8, warmup_steps=0, weight_decay=0.01)
    state = jax.jit(optimizer.init)(params)
    gradients = jax.tree.map(lambda p: 0.1 * p, params)
    update = jax.jit(optimizer.update)
    updates, new_state = update(gradients, state, params)
    updates, newer = update(gradients, new_state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), newer)
    assert tree.flatten(updates).keys() == tree.flatten(params).keys()
    after = optim.apply_updates(params, updates)
    before_norm, after_norm = (float(optax.tree.norm(t["params"]["embed_tokens"])) for t in (params, after))
    assert after_norm < before_norm and all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize("name", ["adafactor", "muon", "adamw_8bit"])
def test_a_stacked_layer_is_treated_as_it_would_be_alone(name):
    params = stacked_params()
    gradients = jax.tree.map(lambda p: jnp.sin(3 * p), params)
    optimizer, _ = optim.make_optimizer(name=name, learning_rate=1e-2, total_steps=8, max_grad_norm=0)
    together, _ = optimizer.update(gradients, optimizer.init(params), params)

    def one(t, layer):
        flat = tree.flatten(t)
        return tree.unflatten({p: leaf[layer : layer + 1] if "layers_" in p else leaf for p, leaf in flat.items()})

    for layer in range(3):
        alone, _ = optimizer.update(one(gradients, layer), optimizer.init(one(params, layer)), one(params, layer))
        for path, leaf in tree.flatten(one(together, layer)).items():
            np.testing.assert_allclose(leaf, tree.flatten(alone)[path], rtol=1e-4, atol=1e-6, err_msg=path)


def test_padding_of_smaller_ranks_stays_zero():
    """Rows whose gradient is zero don't move under any optimizer."""
    params = {"adapter": {"layers_0": {"q_proj": {"lora_A": jnp.ones((2, 8, 256)).at[1, 5:].set(0)}}}}
    gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape) * (p != 0), params)
    for name in sorted(set(optim.OPTIMIZERS.values())):
        optimizer, _ = optim.make_optimizer(
            name=name, learning_rate=0.1, total_steps=8, schedule="constant", weight_decay=0.1
        )
        state, moved = optimizer.init(params), params
        for _ in range(3):
            updates, state = optimizer.update(gradients, state, moved)
            moved = optim.apply_updates(moved, updates)
        assert np.all(np.asarray(moved["adapter"]["layers_0"]["q_proj"]["lora_A"][1, 5:]) == 0), name


def test_clipping_is_torchs():
    clip = optim.clip_by_global_norm(1.0)
    large, small = {"a": jnp.full((4,), 3.0)}, {"a": jnp.full((4,), 0.3)}
    np.testing.assert_allclose(clip.update(large, clip.init(large))[0]["a"], 3 / (6 + 1e-6))
    np.testing.assert_allclose(clip.update(small, clip.init(small))[0]["a"], 0.3)


def test_unknown_names_and_impossible_warm_up():
    with pytest.raises(ConfigError, match="adamw_8bit"):
        optim.make_optimizer(name="adam", learning_rate=1.0, total_steps=1)
    with pytest.raises(ConfigError, match="wsd"):
        optim.make_schedule("polynomial", 1.0, 10)
    with pytest.raises(ConfigError, match="more than the run"):
        optim.make_schedule("cosine", 1.0, 10, warmup_steps=11)


def test_bfloat16_parameters_rounded_stochastically_move_by_the_mean():
    params = {"w": jnp.full((200_000,), 1.0, jnp.bfloat16)}
    updates = {"w": jnp.full((200_000,), 1e-4)}  # far below half a unit in the last place, 2 ** -8
    assert np.all(np.asarray(optim.apply_updates(params, updates)["w"]) == 1)
    moved = optim.apply_updates(params, updates, rounding_rng=jax.random.key(0))["w"]
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.mean(np.asarray(moved, np.float64)), 1 + 1e-4, rtol=1e-5)


def test_rounding_leaves_representable_numbers_and_infinities():
    x = jnp.array([0.0, 1.0, -2.5, jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(optim8bit.round_stochastically(jax.random.key(0), x).astype(jnp.float32), x)
