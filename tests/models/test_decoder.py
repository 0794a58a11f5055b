"""What holds for every decoder, whatever its family."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax import tree
from sftjax.models import decoder, moe
from sftjax.models.config import Experts, LayerSpec, ModelConfig, Rope, layer_address, layer_plan
from sftjax.parallel import mesh as meshes
from sftjax.parallel import partition
from sftjax.peft import lora
from sftjax.peft.spec import AdapterSpec

ROPE = Rope(10_000.0, 16)
PLAIN = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    layers=(LayerSpec(rope=ROPE),) * 3,
    max_position=256,
    norm_eps=1e-5,
    tie_word_embeddings=True,
)
EXPERTS = Experts(4, 2, 64, True, shared_intermediate_size=32, aux_loss_weight=0.01)
MIXED = PLAIN.replace(
    layers=(LayerSpec(window=16, rope=ROPE, experts=EXPERTS), LayerSpec(experts=EXPERTS)) * 2,
    tie_word_embeddings=False,
    qk_norm="head",
    post_norm=True,
    attention_sinks=True,
    final_soft_cap=20.0,
)
CONFIGS = {"plain": PLAIN, "mixed": MIXED}
FLOAT32 = decoder.Runtime(compute_dtype="float32", remat="none")


def make(config, scale=5.0):
    """Larger matrices than at a real start, so that every part matters; norms as they are."""
    params = jax.jit(decoder.init_params, static_argnums=1)(jax.random.key(0), config)
    return tree.map_paths(lambda path, leaf: leaf if "norm" in path else leaf * scale, params)


def make_batch(rows=2, length=128, seed=0):
    random = np.random.default_rng(seed)
    half = length // 2 + 5
    segments = np.concatenate([np.full(half, 1), np.full(length - half - 8, 2), np.full(8, 3)])
    positions = np.concatenate([np.arange((segments == each).sum()) for each in (1, 2, 3)])
    weights = (segments < 3) & (random.random(length) < 0.7)
    tokens = random.integers(0, 96, (rows, length))
    one = dict(positions=positions, segment_ids=segments)
    batch = {key: np.tile(value[None].astype(np.int32), (rows, 1)) for key, value in one.items()}
    batch |= dict(tokens=tokens.astype(np.int32), targets=np.roll(tokens, -1, 1).astype(np.int32))
    batch["weights"] = np.tile(weights[None].astype(np.float32), (rows, 1))
    return jax.tree.map(jnp.asarray, batch)


def loss(config, runtime, variables, batch, rng=None):
    hidden, aux = decoder.hidden_states(
        config, runtime, variables, batch["tokens"], batch["positions"], batch["segment_ids"],
        dropout_rng=rng, weights=batch["weights"],
    )  # fmt: skip
    nll, _ = decoder.token_loss(config, runtime, variables, hidden, batch["targets"], batch["weights"])
    return nll + 100 * sum(aux.values())


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradient(config, runtime, params, batch):
    return jax.value_and_grad(lambda params: loss(config, runtime, {"params": params}, batch))(params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def noisy_loss(config, runtime, params, batch, rng):
    return loss(config, runtime, {"params": params}, batch, rng)


def assert_close(one, other, tolerance):
    for path, leaf in tree.flatten(one).items():
        theirs = np.asarray(tree.flatten(other)[path])
        assert np.abs(np.asarray(leaf) - theirs).max() <= tolerance * np.abs(theirs).max(), path


@pytest.mark.parametrize("name", CONFIGS)
def test_abstract_parameters_are_those_made(name):
    abstract = decoder.abstract_params(CONFIGS[name], jnp.bfloat16)
    assert jax.tree.map(lambda a, b: a.shape == b.shape, abstract, make(CONFIGS[name])) == jax.tree.map(
        lambda _: True, abstract
    )
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(abstract))


def test_counts_of_real_models():
    llama3 = PLAIN.replace(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8, head_dim=128,
        layers=(LayerSpec(rope=Rope(500_000.0, 128)),) * 32, tie_word_embeddings=False,
    )  # fmt: skip
    leaves = jax.tree.leaves(decoder.abstract_params(llama3))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 8_030_261_248


@pytest.mark.parametrize("name, remat", [("mixed", "full"), ("plain", "dots"), ("plain", "attention")])
def test_recomputation_and_unrolling_change_nothing(name, remat):
    config = CONFIGS[name]
    params, batch = make(config), make_batch()
    value, plain = gradient(config, FLOAT32, params, batch)
    again, recomputed = gradient(config, FLOAT32.replace(remat=remat, unroll=2), params, batch)
    assert np.isclose(value, again, rtol=1e-6)
    assert_close(recomputed, plain, 2e-6)


def on_mesh(shape, params, batch):
    mesh = meshes.make(shape)
    placed = jax.device_put(params, partition.shardings(params, mesh))
    return mesh, placed, jax.device_put(batch, jax.NamedSharding(mesh, partition.P(("data", "fsdp"))))


SPLIT_EXPERTS = {"fsdp": 2, "expert": 2, "context": 2}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, SPLIT_EXPERTS])
def test_a_mesh_changes_nothing(name, shape):
    config, batch = CONFIGS[name], make_batch(rows=8)
    params = make(config)
    value, plain = gradient(config, FLOAT32.replace(remat="full"), params, batch)
    mesh, placed, rows = on_mesh(shape, params, batch)
    again, sharded = gradient(config, FLOAT32.replace(remat="full", mesh=mesh), placed, rows)
    assert np.isclose(value, again, rtol=1e-6)
    assert_close(sharded, plain, 5e-6)


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"fsdp": 4, "expert": 2}])
def test_devices_share_the_experts_work(shape):
    """A mixture's tokens stay where they are: nobody computes another's, and only weights are gathered."""
    config = MIXED.replace(layers=MIXED.layers[:1])
    params, batch = make(config), make_batch(rows=8)
    alone = gradient.lower(config, FLOAT32, params, batch).compile()
    mesh, placed, rows = on_mesh(shape, params, batch)
    program = gradient.lower(config, FLOAT32.replace(mesh=mesh), placed, rows).compile()
    twice = mesh.shape["expert"]  # what isn't experts is done by each of these devices
    assert program.cost_analysis()["flops"] < 1.5 * twice * alone.cost_analysis()["flops"] / 8
    assert f"f32[{8 * 128 * 2},64]" not in program.as_text()  # all tokens, once for each choice


def test_bfloat16_stays_near_float32():
    params, batch = make(PLAIN, 1.0), make_batch()
    exact, _ = gradient(PLAIN, FLOAT32, params, batch)
    rough, gradients = gradient(PLAIN, FLOAT32.replace(compute_dtype="bfloat16"), params, batch)
    assert np.isclose(exact, rough, rtol=2e-3)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))


def test_causality_by_gradient():
    params, batch = make(PLAIN), make_batch(rows=1)
    embedded = params["embed_tokens"]["weight"][batch["tokens"][0]]

    def one_output(rows):  # each token gets a row of its own, so that gradients tell tokens apart
        variables = {"params": params | {"embed_tokens": {"weight": rows}}}
        config = PLAIN.replace(vocab_size=len(rows))
        tokens = jnp.arange(len(rows))[None]
        hidden, _ = decoder.hidden_states(config, FLOAT32, variables, tokens, batch["positions"], batch["segment_ids"])
        return hidden[0, 90].sum()  # in segment 2, which starts at 69

    reach = np.abs(jax.grad(one_output)(embedded)).sum(1) > 0
    np.testing.assert_array_equal(np.flatnonzero(reach), np.arange(69, 91))


def test_padding_has_no_part_in_the_auxiliary_loss():
    params, batch = make(MIXED), make_batch()

    def aux(batch):
        return decoder.hidden_states(
            MIXED, FLOAT32, {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"],
            weights=batch["weights"],
        )[1]["moe_loss"]  # fmt: skip

    other = batch | {"tokens": jnp.where(batch["segment_ids"] == 3, 7, batch["tokens"])}
    assert aux(batch) == aux(other)
    assert aux(batch) != aux(batch | {"weights": jnp.ones_like(batch["weights"])})


def test_balanced_routers_have_the_least_loss():
    even = {"choices": jnp.full(4, 5.0), "shares": jnp.full(4, 2.5), "tokens": jnp.array(10.0)}
    lopsided = even | {"choices": jnp.array([10.0, 10, 0, 0]), "shares": jnp.array([6.0, 4, 0, 0])}
    assert moe.load_balancing_loss(even) == pytest.approx(2.0)  # two choices a token
    assert moe.load_balancing_loss(lopsided) == pytest.approx(4.0)


@pytest.mark.parametrize("field", ["residual_dropout", "embedding_dropout", "attention_dropout", "neftune_alpha"])
def test_noise_comes_with_a_key_only_and_is_repeatable(field):
    params, batch = make(PLAIN), make_batch()
    noisy = FLOAT32.replace(**{field: 0.3}, remat="full")
    value = loss(PLAIN, FLOAT32, {"params": params}, batch)
    first, again, other = (noisy_loss(PLAIN, noisy, params, batch, jax.random.key(seed)) for seed in (0, 0, 1))
    assert loss(PLAIN, noisy, {"params": params}, batch) == value
    assert first == again and first != value and first != other


def test_dropout_of_experts_adapters_differs_between_devices_and_is_repeatable():
    config = MIXED.replace(layers=MIXED.layers[:1])
    params, batch = make(config), make_batch(rows=8)
    batch = jax.tree.map(lambda leaf: jnp.tile(leaf[:1], (8, 1)), batch)  # the same row on every device
    adapter = lora.init(jax.random.key(1), params, AdapterSpec(rank=4, target_modules=r".*experts.*"))
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    mesh, placed, rows = on_mesh({"fsdp": 4, "expert": 2}, params, batch)
    noisy = FLOAT32.replace(mesh=mesh, adapter_dropout=0.3)

    @jax.jit
    def hidden(params, adapter, batch, key):
        variables = {"params": params, "adapter": adapter}
        return decoder.hidden_states(
            config, noisy, variables, batch["tokens"], batch["positions"], batch["segment_ids"], dropout_rng=key,
            weights=batch["weights"],
        )[0]  # fmt: skip

    quiet, first, again, other = (hidden(placed, adapter, rows, key) for key in (None, *map(jax.random.key, (0, 0, 1))))
    assert np.allclose(quiet, quiet[:1], atol=1e-5)
    assert np.array_equal(first, again) and not np.allclose(first, other, atol=1e-3)
    assert not np.allclose(first[0], first[2], atol=1e-3)  # rows of two devices


def test_rows_that_pad_the_vocabulary_never_win():
    config = PLAIN.replace(valid_vocab=90)
    params, batch = make(config), make_batch()
    params["embed_tokens"]["weight"] = params["embed_tokens"]["weight"].at[90:].set(1e3)
    batch = batch | {key: batch[key] % 90 for key in ("tokens", "targets")}
    cut = {**params, "embed_tokens": {"weight": params["embed_tokens"]["weight"][:90]}}
    padded, smaller = (
        gradient(each, FLOAT32, leaves, batch)
        for each, leaves in ((config, params), (PLAIN.replace(vocab_size=90), cut))
    )
    assert padded[0] == pytest.approx(float(smaller[0]), rel=1e-6)
    assert not padded[1]["embed_tokens"]["weight"][90:].any()
    logits = decoder.logits(config, FLOAT32, {"params": params}, jnp.ones((1, 64)))
    assert np.isneginf(logits[:, 90:]).all() and np.isfinite(logits[:, :90]).all()


def test_layers_are_found_where_the_plan_puts_them():
    local, whole = LayerSpec(window=4), LayerSpec()
    layers = ((local,) * 5 + (whole,)) * 4 + (local,) * 2
    assert [(len(unit), repeats) for unit, repeats in layer_plan(layers)] == [(6, 4), (1, 2)]
    assert layer_address(layers, 11) == (0, 5, 1) and layer_address(layers, 25) == (1, 0, 1)


def test_the_order_of_layers_in_a_group_is_kept():
    """Swapping two layers' weights in the tree changes the result as swapping the layers does."""
    params, batch = make(MIXED), make_batch()
    logits = decoder.hidden_states(
        MIXED, FLOAT32, {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"]
    )[0]
    swapped = params | {"layers_0": jax.tree.map(lambda leaf: leaf[::-1], params["layers_0"])}
    other = decoder.hidden_states(
        MIXED, FLOAT32, {"params": swapped}, batch["tokens"], batch["positions"], batch["segment_ids"]
    )[0]
    assert np.abs(logits - other).max() > 0.1


def test_a_module_trained_beside_an_adapter_replaces_the_base():
    params, batch = make(PLAIN), make_batch()
    changed = jax.tree.map(lambda leaf: leaf, params)
    changed["norm"] = {"weight": params["norm"]["weight"] * 2}
    changed["embed_tokens"] = {"weight": params["embed_tokens"]["weight"] * 0.5}
    beside = {"params": params, "adapter": {name: changed[name] for name in ("norm", "embed_tokens")}}
    assert loss(PLAIN, FLOAT32, beside, batch) == loss(PLAIN, FLOAT32, {"params": changed}, batch)


def test_runtime_refuses_unknown_policies():
    with pytest.raises(ValueError, match="remat 'some'"):
        dataclasses.replace(FLOAT32, remat="some")
