"""Adapters of the embedding and the head: LoRA, DoRA, biases and single rows, tied and untied."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax import tree
from sftjax.errors import ConfigError
from sftjax.models import decoder
from sftjax.models.config import LayerSpec, ModelConfig, Rope
from sftjax.peft import lora, merge
from sftjax.peft.spec import AdapterSpec
from sftjax.weights import vocab

TIED = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    layers=(LayerSpec(rope=Rope(theta=10_000.0, dim=16)),),
    max_position=64,
    norm_eps=1e-6,
    tie_word_embeddings=True,
    embedding_scale=3.0,
)
UNTIED = TIED.replace(tie_word_embeddings=False)
RUNTIME = decoder.Runtime(compute_dtype="float32", remat="none")
TOKENS = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
POSITIONS = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (2, 16))


@functools.cache
def base(config):
    return jax.tree.map(lambda leaf: leaf * 5, decoder.init_params(jax.random.key(0), config))


def moved(adapter):
    """Every leaf away from where it starts, but the constants."""
    flat = tree.flatten(adapter)
    return tree.unflatten(
        {
            path: leaf
            if path.endswith(lora.CONSTANTS)
            else leaf + 0.1 * jax.random.normal(jax.random.key(number), leaf.shape)
            for number, (path, leaf) in enumerate(flat.items())
        }
    )


def run(config, variables):
    hidden, _ = decoder.hidden_states(config, RUNTIME, variables, TOKENS, POSITIONS, jnp.ones_like(TOKENS))
    return hidden, decoder.logits(config, RUNTIME, variables, hidden)


def loss(config, spec, params, trainable, frozen, dropout=None):
    variables = {"params": params, **tree.merge(trainable, frozen)}
    hidden, _ = run(config, variables)
    return decoder.token_loss(config, RUNTIME, variables, hidden, TOKENS, jnp.ones(TOKENS.shape))[0]


CASES = {
    "embedding": (UNTIED, dict(target_modules=("embed_tokens",))),
    "head": (UNTIED, dict(target_modules=("lm_head",), use_rslora=True)),
    "dora": (UNTIED, dict(target_modules=("embed_tokens", "lm_head"), use_dora=True)),
    "head_pissa": (UNTIED, dict(target_modules=("lm_head",), init="pissa")),
    "head_orthogonal": (UNTIED, dict(target_modules=("lm_head",), init="orthogonal")),
    "rows": (TIED, dict(target_modules=("q_proj",), trainable_token_indices=(3, 5, 63))),
    "rows_apart": (UNTIED, dict(trainable_token_indices={"embed_tokens": (3,), "lm_head": (9, 1)})),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_they_start_as_nothing_train_and_merge(case):
    config, settings = CASES[case]
    spec, params = AdapterSpec(rank=4, alpha=8, **settings), base(config)
    adapter = lora.init(jax.random.key(1), params, spec)
    alone = run(config, {"params": params})[1]
    np.testing.assert_allclose(run(config, {"params": params, "adapter": adapter})[1], alone, atol=2e-5)
    adapter = moved(adapter)
    beside = run(config, {"params": params, "adapter": adapter})[1]
    assert float(jnp.abs(beside - alone).max()) > 0.05
    np.testing.assert_allclose(run(config, {"params": merge.merge(params, adapter)})[1], beside, atol=1e-4)
    trainable, frozen = tree.partition({"adapter": adapter}, lora.trainable_regex(spec))
    assert not {path.rpartition("/")[2] for path in tree.flatten(trainable)} & set(lora.CONSTANTS)
    gradients = jax.grad(functools.partial(loss, config, spec, params))(trainable, frozen)
    # the loss that never forms logits has the gradient of the logits'
    want = jax.grad(
        lambda t: (
            -jnp.sum(
                jnp.take_along_axis(
                    jax.nn.log_softmax(run(config, {"params": params, **tree.merge(t, frozen)})[1]),
                    TOKENS[..., None],
                    -1,
                )
            )
        )
    )(trainable)
    for path, leaf in tree.flatten(want).items():
        got = tree.flatten(gradients)[path]
        np.testing.assert_allclose(got, leaf, rtol=1e-3, atol=1e-4, err_msg=path)
        assert float(jnp.abs(leaf).max()) > 0, path


def test_only_the_rows_that_were_chosen_change():
    spec = AdapterSpec(target_modules=("q_proj",), trainable_token_indices=(3, 5))
    params = base(TIED)
    merged = merge.merge(params, moved(lora.init(jax.random.key(1), params, spec)))
    changed = np.any(np.asarray(merged["embed_tokens"]["weight"] != params["embed_tokens"]["weight"]), axis=1)
    assert np.flatnonzero(changed).tolist() == [3, 5]


def test_on_a_tied_model_the_embeddings_lora_changes_what_is_looked_up_only():
    spec, params = AdapterSpec(rank=4, target_modules=("embed_tokens",)), base(TIED)
    adapter = moved(lora.init(jax.random.key(1), params, spec))
    untied = vocab.untie(params)
    merged = merge.merge(untied, adapter)
    np.testing.assert_array_equal(merged["lm_head"]["weight"], params["embed_tokens"]["weight"])
    beside = run(TIED, {"params": params, "adapter": adapter})[1]
    np.testing.assert_allclose(run(UNTIED, {"params": merged})[1], beside, atol=1e-4)  # logits of 10, in float32
    with pytest.raises(ConfigError, match="one weight"):
        merge.merge(params, adapter)


def test_dropout_of_the_heads_adapter_has_the_expectation_of_none():
    spec, params = AdapterSpec(rank=4, target_modules=("lm_head",)), base(UNTIED)
    adapter = moved(lora.init(jax.random.key(1), params, spec))["lm_head"]
    hidden, weight = jax.random.normal(jax.random.key(2), (4, 32)), params["lm_head"]["weight"]

    def product(key):
        features, columns = lora.extend(hidden, weight, adapter, dropout_rate=0.5, dropout_rng=key)
        return features @ columns.T

    plain = product(None)
    dropped = jax.vmap(product)(jax.random.split(jax.random.key(3), 3000))
    assert float(jnp.abs(dropped[0] - plain).max()) > 0.1
    np.testing.assert_allclose(dropped.mean(0), plain, atol=0.15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(trainable_token_indices=(64,)), "64 rows, and row 64"),
        (dict(trainable_token_indices=(3, 3)), "twice"),
        (dict(trainable_token_indices={"q_proj": (1,)}), "no tokens"),
        (dict(trainable_token_indices=(1,), modules_to_save=("embed_tokens",)), "trains all of"),
        (dict(trainable_token_indices={"lm_head": (1,)}), "tied"),
        (dict(target_modules=("embed_tokens",), lora_bias=True), "lora_bias"),
        (dict(target_modules=("embed_tokens",), init="pissa"), "on the embedding"),
        (dict(lora_bias=True, use_dora=True), "lora_bias"),
        (dict(init="orthogonal", rank=3), "even"),
        (dict(target_modules=("norm",)), "modules_to_save"),
    ],
)
def test_what_peft_has_not_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        lora.init(jax.random.key(0), base(TIED), AdapterSpec(**{"rank": 4, "target_modules": ("q_proj",)} | settings))
