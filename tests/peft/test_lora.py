"""LoRA, DoRA, PiSSA by themselves: which modules, what they compute, what is trained."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax import tree
from sftjax.errors import ConfigError
from sftjax.kernels import nf4
from sftjax.kernels.linear import linear
from sftjax.peft import adapters, lora, merge
from sftjax.peft.spec import AdapterSpec, find_names, find_targets


def make_params():
    """Two runs: layers 0-3 as two positions repeated twice, layer 4 alone; one layer has experts."""
    keys = iter(jax.random.split(jax.random.key(0), 100))

    def normal(*shape):
        return jax.random.normal(next(keys), shape) * shape[-1] ** -0.5

    def block(repeat, experts=False):
        mlp = {"up_proj": {"weight": normal(repeat, 128, 64)}, "down_proj": {"weight": normal(repeat, 64, 128)}}
        if experts:
            mlp = {
                "router": {"weight": normal(repeat, 4, 64)},
                "experts": {"up_proj": {"weight": normal(repeat, 4, 32, 64)}},
            }
        return {
            "pre_attention_norm": {"weight": jnp.ones((repeat, 64))},
            "self_attn": {"q_proj": {"weight": normal(repeat, 96, 64), "bias": normal(repeat, 96)}},
            "mlp": mlp,
        }

    return {
        "embed_tokens": {"weight": normal(48, 64)},
        "layers_0": {"0": block(2), "1": block(2)},
        "layers_1": {"0": block(1, experts=True)},
        "norm": {"weight": jnp.ones(64)},
        "lm_head": {"weight": normal(48, 64)},
    }


PARAMS = make_params()


def targets(**settings):
    return find_targets(PARAMS, AdapterSpec(**settings))


def test_names_are_those_of_the_checkpoint():
    """Positions alternate within a run: layers_0/1 holds layers 1 and 3; layers_1 starts behind the first run."""
    names = find_names(PARAMS)
    assert names["layers_0/1/self_attn/q_proj"] == (
        "model.layers.1.self_attn.q_proj",
        "model.layers.3.self_attn.q_proj",
    )
    assert names["layers_1/0/mlp/experts/up_proj"] == ("model.layers.4.mlp.experts.up_proj",)
    assert names["embed_tokens"] == ("model.embed_tokens",) and names["lm_head"] == ("lm_head",)


def test_all_linear_leaves_out_head_embedding_and_router():
    assert {path.rpartition("/")[2] for path in targets()} == {"q_proj", "up_proj", "down_proj"}
    assert "layers_1/0/mlp/experts/up_proj" in targets()


@pytest.mark.parametrize(
    ("wanted", "layers"),
    [
        ("q_proj", [0, 1, 2, 3, 4]),
        (("q_proj",), [0, 1, 2, 3, 4]),
        ("q_proj, o_proj", [0, 1, 2, 3, 4]),
        (r".*\.(0|3)\.self_attn\.q_proj", [0, 3]),
        (("layers.2.self_attn.q_proj", "model.layers.4.self_attn.q_proj"), [2, 4]),
    ],
)
def test_targets_by_name_list_and_regex(wanted, layers):
    found = targets(target_modules=wanted)
    chosen = [
        int(name.split(".")[2])
        for target in found.values()
        for name, rank in zip(target.names, target.ranks, strict=True)
        if rank
    ]
    assert sorted(chosen) == layers


def test_patterns_give_ranks_and_scales_layer_by_layer():
    found = targets(
        target_modules="q_proj",
        rank=8,
        alpha=16,
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={r"layers\.[34]\..*": 4},
    )
    assert found["layers_0/0/self_attn/q_proj"].ranks == (8, 8)
    assert found["layers_0/1/self_attn/q_proj"].ranks == (2, 8)
    assert found["layers_0/1/self_attn/q_proj"].scales == (8.0, 0.5)
    rs = targets(target_modules="q_proj", rank=16, alpha=16, use_rslora=True)
    assert rs["layers_0/0/self_attn/q_proj"].scales == (4.0, 4.0)


def test_what_matches_nothing_or_is_no_projection_is_refused():
    with pytest.raises(
        ConfigError, match="matches no module; this model has down_proj, embed_tokens, lm_head, q_proj, router, up_proj"
    ):
        targets(target_modules="query")
    with pytest.raises(ConfigError, match="modules_to_save"):
        targets(target_modules=("norm",))
    with pytest.raises(ConfigError, match="no module 'head'"):
        lora.init(jax.random.key(0), PARAMS, AdapterSpec(modules_to_save=("head",)))
    tied = {name: branch for name, branch in PARAMS.items() if name != "lm_head"}
    with pytest.raises(ConfigError, match="tied to embed_tokens"):
        lora.init(jax.random.key(0), tied, AdapterSpec(modules_to_save=("lm_head",)))
    with pytest.raises(ConfigError, match="experts"):
        lora.init(jax.random.key(0), PARAMS, AdapterSpec(use_dora=True))


def test_init_is_torchs_kaiming_and_zero_padded():
    spec = AdapterSpec(rank=8, rank_pattern={"layers.1.mlp.down_proj": 3})
    adapter = tree.flatten(lora.init(jax.random.key(0), PARAMS, spec))
    low_A = np.asarray(adapter["layers_0/1/mlp/down_proj/lora_A"])
    assert low_A.shape == (2, 8, 128) and adapter["layers_0/1/mlp/down_proj/lora_B"].shape == (2, 64, 8)
    assert adapter["layers_1/0/mlp/experts/up_proj/lora_A"].shape == (1, 4, 8, 64)
    assert np.abs(low_A).max() <= 128**-0.5 and np.std(low_A[1, :3]) == pytest.approx((3 * 128) ** -0.5, rel=0.1)
    assert np.all(low_A[0, 3:] == 0) and not np.any(low_A[1] == 0)
    assert all(np.all(leaf == 0) for path, leaf in adapter.items() if path.endswith("lora_B"))
    again = tree.flatten(lora.init(jax.random.key(0), PARAMS, spec.replace(target_modules=("down_proj",))))
    np.testing.assert_array_equal(again["layers_0/1/mlp/down_proj/lora_A"], low_A)  # by path, not by order


def test_abstract_init_needs_no_memory():
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    for settings in (dict(), dict(use_dora=True, target_modules="q_proj"), dict(init="pissa"), dict(method="houlsby")):
        spec = AdapterSpec(**settings)
        shapes = jax.eval_shape(lambda p, spec=spec: lora.init(jax.random.key(0), p, spec), abstract)
        real = lora.init(jax.random.key(0), PARAMS, spec)
        assert jax.tree.map(lambda s: s.shape, shapes) == jax.tree.map(lambda a: a.shape, real)


def test_llama3_8b_trainable_count():
    """r 16 on all linear layers of Llama-3-8B: 41,943,040, as PEFT counts."""

    def weight(*shape):
        return {"weight": jax.ShapeDtypeStruct((32, *shape), jnp.bfloat16)}

    attention = {"q_proj": weight(4096, 4096), "k_proj": weight(1024, 4096)}
    attention |= {"v_proj": weight(1024, 4096), "o_proj": weight(4096, 4096)}
    mlp = {"gate_proj": weight(14336, 4096), "up_proj": weight(14336, 4096), "down_proj": weight(4096, 14336)}
    params = {"layers_0": {"0": {"self_attn": attention, "mlp": mlp}}}
    assert lora.count_parameters(params, AdapterSpec(rank=16)) == 41_943_040


def leaves_for(key, outputs, inputs, rank, **extra):
    low_A, low_B = (jax.random.normal(k, s) for k, s in zip(jax.random.split(key), [(rank, inputs), (outputs, rank)]))  # noqa: B905
    return {"lora_A": low_A, "lora_B": low_B, "scale": jnp.float32(0.5), **extra}


def test_apply_is_the_merged_weight():
    weight = jax.random.normal(jax.random.key(0), (24, 16))
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))
    initial = leaves_for(jax.random.key(3), 24, 16, 4)
    magnitude = dict(magnitude=1 + jax.random.uniform(jax.random.key(4), (24,)))
    pissa = dict(initial_lora_A=initial["lora_A"], initial_lora_B=initial["lora_B"])
    for extra in ({}, magnitude, pissa, magnitude | pissa):
        adapter = leaves_for(jax.random.key(2), 24, 16, 4, **extra)
        got = lora.apply(x, linear(x, weight), adapter, base_weight=lambda: weight)
        np.testing.assert_allclose(got, linear(x, merge.merge_one(weight, adapter)), rtol=1e-4, atol=1e-4)


def test_doras_norm_is_a_constant_to_the_gradient():
    """dy/dA = m / |W + sBA| * s * Bᵀ dy xᵀ, without a term through the norm; the factored norm is the plain one."""
    weight = jax.random.normal(jax.random.key(0), (24, 16))
    x = jax.random.normal(jax.random.key(1), (7, 16))
    adapter = leaves_for(jax.random.key(2), 24, 16, 4, magnitude=jnp.full(24, 2.0))
    norm = jnp.linalg.norm(weight + lora.delta_weight(adapter), axis=-1)
    np.testing.assert_allclose(lora.weight_norm(weight, adapter), norm, rtol=1e-5)

    def total(low_A):
        return lora.apply(x, linear(x, weight), adapter | {"lora_A": low_A}, base_weight=lambda: weight).sum()

    dy = jnp.broadcast_to((2.0 / norm)[None], (7, 24))
    want = 0.5 * adapter["lora_B"].T @ dy.T @ x
    np.testing.assert_allclose(jax.grad(total)(adapter["lora_A"]), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8"])
def test_pissa_starts_at_the_base_and_holds_its_principal_part(init):
    spec = AdapterSpec(rank=4, alpha=8, init=init, target_modules=("q_proj",))
    adapter = lora.init(jax.random.key(0), PARAMS, spec)
    leaves = jax.tree.map(lambda leaf: leaf[1], adapter["layers_0"]["1"]["self_attn"]["q_proj"])
    weight = PARAMS["layers_0"]["1"]["self_attn"]["q_proj"]["weight"][1]
    x = jax.random.normal(jax.random.key(1), (3, 64))
    np.testing.assert_allclose(lora.apply(x, linear(x, weight), leaves), linear(x, weight), rtol=1e-5, atol=1e-5)
    principal = leaves["scale"] * leaves["lora_B"] @ leaves["lora_A"]
    values = jnp.linalg.svd(weight, compute_uv=False)
    rest = jnp.linalg.norm(weight - principal)
    assert rest == pytest.approx(float(jnp.sqrt(jnp.sum(values[4:] ** 2))), rel=1e-4 if init == "pissa" else 2e-2)


def test_dropout_reaches_the_adapter_only_and_keeps_the_mean():
    adapter = leaves_for(jax.random.key(2), 8, 64, 4)
    x, base = jnp.ones((1, 64)), jnp.zeros((1, 8))
    keys = jax.random.split(jax.random.key(0), 4000)
    dropped = jax.vmap(lambda key: lora.apply(x, base, adapter, dropout_rate=0.5, dropout_rng=key))(keys)
    want = lora.apply(x, base, adapter)
    np.testing.assert_allclose(dropped.mean(0), want, atol=0.1 * float(jnp.abs(want).max()) + 0.3)
    np.testing.assert_array_equal(lora.apply(x, base, adapter, dropout_rate=0.5), want)  # no key: no dropout


def test_frozen_weight_gets_no_gradient_and_padding_none():
    """The backward pass holds no product of the weight's shape; columns of padding have gradient 0."""
    weight = jax.random.normal(jax.random.key(0), (96, 64))
    adapter = leaves_for(jax.random.key(2), 96, 64, 4)
    adapter["lora_A"], adapter["lora_B"] = adapter["lora_A"].at[2:].set(0), adapter["lora_B"].at[:, 2:].set(0)
    x = jax.random.normal(jax.random.key(1), (7, 64))

    def loss(trained):
        return (lora.apply(x, linear(x, weight), adapter | trained) ** 2).sum()

    trained = {name: adapter[name] for name in ("lora_A", "lora_B")}
    made = [
        tuple(variable.aval.shape)
        for equation in jax.make_jaxpr(jax.grad(loss))(trained).jaxpr.eqns
        for variable in equation.outvars
    ]
    assert (96, 64) not in made
    gradients = jax.grad(loss)(trained)
    assert np.all(np.asarray(gradients["lora_A"][2:]) == 0) and np.all(np.asarray(gradients["lora_B"][:, 2:]) == 0)
    assert np.any(np.asarray(gradients["lora_A"][:2]) != 0)


@pytest.mark.parametrize(
    ("settings", "trained", "frozen"),
    [
        (dict(method="none"), ["params/norm/weight"], []),
        (
            dict(),
            ["adapter/layers_0/0/mlp/up_proj/lora_A"],
            ["adapter/layers_0/0/mlp/up_proj/scale", "params/norm/weight"],
        ),
        (dict(init="pissa"), [], ["adapter/layers_0/0/mlp/up_proj/initial_lora_A"]),
        (dict(bias="all"), ["adapter/layers_0/0/self_attn/q_proj/bias"], ["params/layers_0/0/self_attn/q_proj/bias"]),
        (dict(modules_to_save=("lm_head", "norm")), ["adapter/lm_head/weight"], ["params/lm_head/weight"]),
        (dict(also_train="params/.*norm/weight"), ["params/norm/weight"], ["params/embed_tokens/weight"]),
        (dict(method="pfeiffer"), ["adapter/layers_0/0/adapter_mlp/down/weight"], ["params/norm/weight"]),
    ],
)
def test_what_is_trained(settings, trained, frozen):
    spec = AdapterSpec(**settings)
    regex = lora.trainable_regex(spec)
    everything = tree.flatten({"params": PARAMS, "adapter": lora.init(jax.random.key(0), PARAMS, spec)})
    for path in trained:
        assert path in everything and re.fullmatch(regex, path), path
    for path in frozen:
        assert path in everything and not re.fullmatch(regex, path), path


def test_quantised_base_has_the_same_modules():
    weight = PARAMS["layers_0"]["0"]["mlp"]["up_proj"]["weight"]
    for kind in ("nf4", "int8"):
        quant = {"layers_0": {"0": {"mlp": {"up_proj": nf4.quantise(weight, kind)}}}}
        kept, _ = tree.partition(PARAMS, r"(?!layers_0/0/mlp/up_proj).*")
        spec = AdapterSpec(target_modules=("up_proj", "q_proj"), use_dora=True, exclude_modules=r".*experts.*")
        adapter = lora.init(jax.random.key(0), kept, spec, quant=quant)
        magnitude = adapter["layers_0"]["0"]["mlp"]["up_proj"]["magnitude"]
        norm = jnp.linalg.norm(nf4.dequantise(quant["layers_0"]["0"]["mlp"]["up_proj"]), axis=-1)
        np.testing.assert_allclose(magnitude, norm, rtol=1e-6)
        assert adapter["layers_0"]["0"]["mlp"]["up_proj"]["lora_A"].shape == (2, 8, 64)
        merged = merge.merge(kept, adapter, quant=quant, dtype=jnp.float32)
        assert tree.flatten(merged).keys() == tree.flatten(PARAMS).keys()


def test_merge_rounds_once():
    weight = jax.random.normal(jax.random.key(0), (1, 96, 64)).astype(jnp.bfloat16)
    params = {"layers_0": {"0": {"self_attn": {"q_proj": {"weight": weight}}}}}
    adapter = lora.init(jax.random.key(0), params, AdapterSpec())
    leaves = adapter["layers_0"]["0"]["self_attn"]["q_proj"]
    leaves["lora_B"] = 1e-2 * jax.random.normal(jax.random.key(1), leaves["lora_B"].shape)
    merged = merge.merge(params, adapter)["layers_0"]["0"]["self_attn"]["q_proj"]["weight"]
    assert merged.dtype == jnp.bfloat16
    want = (weight.astype(jnp.float32) + lora.delta_weight(leaves)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(merged.astype(jnp.float32), want.astype(jnp.float32))
    bottleneck = lora.init(jax.random.key(0), PARAMS, AdapterSpec(method="houlsby"))
    with pytest.raises(ConfigError, match="can't be merged"):
        merge.merge(PARAMS, bottleneck)


def test_combined_adapters_add_their_changes():
    spec = AdapterSpec(rank=4, alpha=8)
    made = []
    for seed in (0, 1):
        flat = tree.flatten(lora.init(jax.random.key(seed), PARAMS, spec))
        for path, leaf in flat.items():
            if path.endswith("lora_B"):
                flat[path] = jax.random.normal(jax.random.key(seed + 7), leaf.shape)
        made.append(tree.unflatten(flat))
    together, rank = merge.combine(made, [0.25, 0.5])
    assert rank == 8
    whole = tree.flatten(merge.merge(PARAMS, together))
    parts = [tree.flatten(merge.merge(PARAMS, adapter)) for adapter in made]
    for path, base in tree.flatten(PARAMS).items():
        want = base + 0.25 * (parts[0][path] - base) + 0.5 * (parts[1][path] - base)
        np.testing.assert_allclose(whole[path], want, rtol=1e-4, atol=1e-4, err_msg=path)
    assert merge.combined_spec([spec, spec], rank).scale_of("x") == 1
    dora = lora.init(jax.random.key(0), PARAMS, AdapterSpec(use_dora=True, target_modules="q_proj"))
    with pytest.raises(ConfigError, match="plain LoRA"):
        merge.combine([dora, dora], [1, 1])


@pytest.mark.parametrize(
    ("method", "places"), [("houlsby", {"adapter_attn", "adapter_mlp"}), ("pfeiffer", {"adapter_mlp"})]
)
def test_bottlenecks_start_as_the_identity(method, places):
    adapter = lora.init(jax.random.key(0), PARAMS, AdapterSpec(method=method, bottleneck_size=8))
    assert set(adapter["layers_0"]["1"]) == places
    leaves = jax.tree.map(lambda leaf: leaf[0], adapter["layers_0"]["1"]["adapter_mlp"])
    assert leaves["down"]["weight"].shape == (8, 64) and leaves["up"]["bias"].shape == (64,)
    h = jax.random.normal(jax.random.key(1), (2, 3, 64))
    np.testing.assert_array_equal(adapters.apply(h, leaves), h)
    changed = jax.tree.map(lambda leaf: leaf + 0.1, leaves)
    inner = jnp.tanh(h @ changed["down"]["weight"].T + changed["down"]["bias"][None, None])
    want = h + inner @ changed["up"]["weight"].T + changed["up"]["bias"][None, None]
    np.testing.assert_allclose(adapters.apply(h, changed, "tanh"), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(adapters.apply(h, {}), h)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(method="prefix"), "lora"),
        (dict(rank=0), "at least 1"),
        (dict(dropout=1.0), "dropout"),
        (dict(init="olora"), "pissa"),
        (dict(bias="some"), "lora_only"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdapterSpec(**settings)
