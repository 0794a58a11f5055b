"""The table of shardings: every leaf is covered, Megatron's cuts, optimizer state beside its parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sftjax import tree
from sftjax.parallel import mesh as meshes
from sftjax.parallel import partition

F, T, E = "fsdp", "tensor", "expert"
BLOCK = "params/layers_0/0"


@pytest.fixture(scope="module")
def mesh():
    return meshes.make({"fsdp": 2, "tensor": 2, "expert": 2})


@pytest.mark.parametrize(
    "path, shape, spec",
    [
        ("params/embed_tokens/weight", (64, 16), (T, F)),
        ("params/lm_head/weight", (64, 16), (T, F)),
        ("embed_tokens/weight", (63, 16), (None, F)),  # an odd vocabulary stays whole
        (f"{BLOCK}/self_attn/q_proj/weight", (4, 16, 8), (None, T, F)),
        (f"{BLOCK}/self_attn/q_proj/bias", (4, 16), (None, T)),
        (f"{BLOCK}/self_attn/o_proj/weight", (4, 8, 16), (None, F, T)),
        (f"{BLOCK}/self_attn/o_proj/bias", (4, 8), (None, None)),
        (f"{BLOCK}/self_attn/q_norm/weight", (4, 8), (None, None)),
        (f"{BLOCK}/self_attn/sinks", (4, 8), (None, T)),
        (f"{BLOCK}/mlp/down_proj/weight", (4, 8, 32), (None, F, T)),
        (f"{BLOCK}/pre_attention_norm/weight", (4, 8), (None, None)),
        (f"{BLOCK}/post_mlp_norm/weight", (4, 8), (None, None)),
        ("params/norm/weight", (8,), (None,)),
        (f"{BLOCK}/mlp/router/weight", (4, 6, 8), (None, None, F)),
        (f"{BLOCK}/mlp/experts/gate_proj/weight", (4, 6, 32, 8), (None, E, T, F)),
        (f"{BLOCK}/mlp/experts/down_proj/weight", (4, 6, 8, 32), (None, E, F, T)),
        (f"{BLOCK}/mlp/experts/down_proj/bias", (4, 6, 8), (None, E, None)),
        (f"{BLOCK}/mlp/shared_expert/up_proj/weight", (4, 32, 8), (None, T, F)),
        (f"{BLOCK}/mlp/shared_expert_gate/weight", (4, 1, 8), (None, None, F)),
        ("adapter/layers_0/0/self_attn/q_proj/lora_A", (4, 2, 8), (None, None, F)),
        ("adapter/layers_0/0/self_attn/q_proj/lora_B", (4, 16, 2), (None, T, None)),
        ("adapter/layers_0/0/mlp/down_proj/lora_A", (4, 2, 32), (None, None, T)),
        ("adapter/layers_0/0/mlp/down_proj/lora_B", (4, 8, 2), (None, F, None)),
        ("adapter/layers_0/0/mlp/down_proj/scale", (4,), (None,)),
        ("adapter/layers_0/0/mlp/up_proj/magnitude", (4, 32), (None, T)),
        ("adapter/layers_0/0/mlp/experts/up_proj/lora_A", (4, 6, 2, 8), (None, E, None, F)),
        ("adapter/layers_0/0/mlp/experts/up_proj/lora_B", (4, 6, 32, 2), (None, E, T, None)),
        ("adapter/layers_0/0/adapter_attn/down/weight", (4, 2, 8), (None, None, F)),
        ("adapter/layers_0/0/adapter_mlp/up/bias", (4, 8), (None, None)),
        ("adapter/lm_head/weight", (64, 16), (T, F)),
        ("quant/layers_0/0/mlp/up_proj/codes", (4, 128, 64), (None, T, F)),
        ("quant/layers_0/0/mlp/up_proj/absmax", (4, 128, 2), (None, T, F)),
        ("quant/layers_0/0/mlp/up_proj/absmax_scale", (4, 1), (None, None)),
        ("quant/layers_0/0/mlp/up_proj/absmax_offset", (4,), (None,)),
        ("quant/layers_0/0/mlp/up_proj/scale", (4, 128), (None, None)),
    ],
)
def test_the_table(mesh, path, shape, spec):
    assert partition.param_spec(path, shape, mesh) == P(*spec)


def test_fsdp_takes_the_larger_axis_where_tensor_cuts_nothing():
    mesh = meshes.make({"fsdp": 8})
    assert partition.param_spec(f"{BLOCK}/mlp/up_proj/weight", (4, 32, 8), mesh) == P(None, "fsdp", None)
    assert partition.param_spec(f"{BLOCK}/mlp/down_proj/weight", (4, 8, 32), mesh) == P(None, None, "fsdp")
    assert partition.param_spec(f"{BLOCK}/mlp/down_proj/weight", (4, 8, 33), mesh) == P(None, "fsdp", None)


def test_gathered_undoes_fsdp_only(mesh):
    assert partition.gathered_spec(f"{BLOCK}/self_attn/q_proj/weight", (16, 8), mesh) == P("tensor", None)


def test_an_uncovered_path_raises(mesh):
    with pytest.raises(KeyError, match="layers_0/0/mystery"):
        partition.param_spec(f"{BLOCK}/mystery", (4, 8), mesh)


def test_optimizer_state_lies_as_its_parameters(mesh):
    params = {"adapter": {"layers_0": {"0": {"self_attn": {"q_proj": {"lora_B": jnp.zeros((4, 16, 2))}}}}}}
    params["params"] = {"lm_head": {"weight": jnp.zeros((64, 16))}}
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    made = partition.state_shardings(state, params, mesh)
    for moments in (made[0].mu, made[0].nu):
        flat = partition.by_path(moments)
        assert flat["params/lm_head/weight"] == P("tensor", "fsdp")
        assert flat["adapter/layers_0/0/self_attn/q_proj/lora_B"] == P(None, "tensor", None)
    assert made[0].count.spec == P()


def test_factored_moments_are_cut_where_they_can_be(mesh):
    params = {"lm_head": {"weight": jnp.zeros((64, 16))}}
    state = {"row": {"lm_head": {"weight": jnp.zeros((3, 64))}}, "odd": {"lm_head": {"weight": jnp.zeros((3, 7))}}}
    made = tree.flatten(partition.state_shardings(state, params, mesh))
    assert made["row/lm_head/weight"].spec == P(None, "fsdp")
    assert made["odd/lm_head/weight"].spec == P()


def test_a_sharded_block_equals_the_whole_one(mesh):
    rng = np.random.default_rng(0)
    params = {"mlp": {name: {"weight": jnp.asarray(rng.standard_normal(shape), jnp.float32)} for name, shape in
                      {"up_proj": (32, 8), "down_proj": (8, 32)}.items()}}  # fmt: skip
    x = jnp.asarray(rng.standard_normal((4, 6, 8)), jnp.float32)

    def loss(params, x):
        inner = jnp.tanh(x @ params["mlp"]["up_proj"]["weight"].T)
        return jnp.sum((inner @ params["mlp"]["down_proj"]["weight"].T) ** 2)

    shardings = partition.shardings({"layers_0": {"0": params}}, mesh)["layers_0"]["0"]
    placed = jax.device_put(params, shardings)
    x_placed = jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))
    got = jax.jit(jax.grad(loss), out_shardings=shardings)(placed, x_placed)
    want = jax.grad(loss)(params, x)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4), got, want)


def test_batches_and_constraints(mesh):
    assert partition.batch_sharding(mesh).spec == P(None, ("data", "fsdp"), None)
    assert partition.batch_sharding(meshes.make({"context": 8})).spec == P(None, ("data", "fsdp"), "context")
    assert partition.batch_shards(mesh) == 2
    assert partition.fit(P(("data", "fsdp"), "tensor"), (4, 3), mesh) == P(("data", "fsdp"), None)
    x = jnp.ones((3, 4))
    assert partition.constrain(x, P("tensor"), None) is x
    np.testing.assert_array_equal(jax.jit(lambda x: partition.constrain(x, P("fsdp", "tensor"), mesh))(x), x)
