"""Every way of tuning through the whole decoder: packed or not, recomputed or not, one device or eight."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax import tree
from sftjax.kernels import nf4
from sftjax.models import decoder
from sftjax.models.config import LayerSpec, ModelConfig, Rope
from sftjax.parallel import mesh as mesh_lib
from sftjax.parallel import partition
from sftjax.peft import lora
from sftjax.peft.spec import AdapterSpec

CONFIG = ModelConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    layers=(LayerSpec(rope=Rope(theta=10_000.0, dim=32)),) * 3,
    max_position=256,
    norm_eps=1e-6,
    tie_word_embeddings=True,
)
VARIANTS = {
    "full": (dict(method="none"), None),
    "lora": (dict(rank=4, rank_pattern={"layers.1.mlp.up_proj": 2}), None),
    "rslora": (dict(rank=4, use_rslora=True), None),
    "dora": (dict(rank=4, use_dora=True), None),
    "pissa": (dict(rank=4, init="pissa"), None),
    "saved": (dict(rank=4, modules_to_save=("embed_tokens",)), None),
    "houlsby": (dict(method="houlsby", bottleneck_size=16), None),
    "pfeiffer": (dict(method="pfeiffer", bottleneck_size=16), None),
    "qlora": (dict(rank=4), "nf4"),
    "qdora": (dict(rank=4, use_dora=True), "nf4"),
    "lora_int8": (dict(rank=4), "int8"),
}


def build(variant):
    """({"trainable", "frozen"} variables, spec) with an adapter that isn't at its start."""
    settings, kind = VARIANTS[variant]
    spec = AdapterSpec(**settings)
    params = decoder.init_params(jax.random.key(0), CONFIG)
    params = jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim == 3 else leaf, params)
    variables = {"params": params}
    if kind:
        variables = quantised(params, kind)
    adapter = lora.init(jax.random.key(1), variables["params"], spec, quant=variables.get("quant"))
    trainable, frozen = tree.partition(
        variables | ({"adapter": adapter} if adapter else {}), lora.trainable_regex(spec)
    )
    moved = tree.map_paths(
        lambda path, leaf: (
            leaf
            + 0.02 * jnp.sign(leaf + 0.5) * (not path.endswith(("lora_A", "lora_B")))
            + 0.1 * jnp.sin(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape) * path.endswith("lora_B")
        ),
        trainable,
    )
    return moved, frozen


def quantised(params, kind):
    transform = nf4.make_transform(kind, nf4.is_projection)
    kept, quant = {}, {}
    for path, leaf in tree.flatten(params).items():
        module = path.rpartition("/")[0]
        if nf4.is_projection(module):
            layers = [transform(path, layer) for layer in leaf]
            quant |= {f"{module}/{name}": jnp.stack([layer[name] for layer in layers]) for name in layers[0]}
        else:
            kept[path] = leaf
    return {"params": tree.unflatten(kept), "quant": tree.unflatten(quant)}


def batch(packed: bool):
    """Three documents of 40, 50 and 38 tokens: in one row of 128, or one in each of three padded rows."""
    lengths = (40, 50, 38)
    documents = [np.random.default_rng(i).integers(1, 128, n) for i, n in enumerate(lengths)]
    rows = [documents] if packed else [[document] for document in documents]
    arrays = {name: np.zeros((len(rows), 128), np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    weights = np.zeros((len(rows), 128), np.float32)
    for r, row in enumerate(rows):
        at = 0
        for s, document in enumerate(row):
            part = slice(at, at + len(document))
            arrays["tokens"][r, part], arrays["targets"][r, part] = document, np.roll(document, -1)
            arrays["positions"][r, part], arrays["segment_ids"][r, part] = np.arange(len(document)), s + 1
            weights[r, at : at + len(document) - 1] = 1
            at += len(document)
        arrays["positions"][r, at:], arrays["segment_ids"][r, at:] = np.arange(128 - at), len(row) + 1
    return {name: jnp.asarray(value) for name, value in arrays.items()} | {"weights": jnp.asarray(weights)}


def loss_and_gradients(trainable, frozen, data, runtime):
    def loss(trainable):
        variables = tree.merge(trainable, frozen)
        hidden, _ = decoder.hidden_states(
            CONFIG, runtime, variables, data["tokens"], data["positions"], data["segment_ids"], weights=data["weights"]
        )
        total, _ = decoder.token_loss(CONFIG, runtime, variables, hidden, data["targets"], data["weights"])
        return total / data["weights"].sum()

    return jax.jit(jax.value_and_grad(loss))(trainable)


def assert_near(got, want, tolerance):
    (loss, gradients), (want_loss, want_gradients) = got, want
    np.testing.assert_allclose(loss, want_loss, rtol=tolerance)
    for path, leaf in tree.flatten(want_gradients).items():
        scale = float(jnp.abs(leaf).max()) + 1e-8
        np.testing.assert_allclose(tree.flatten(gradients)[path], leaf, atol=10 * tolerance * scale, err_msg=path)


# each compiles four programs: the most different three by default
BY_DEFAULT = ("lora", "pissa", "qdora")


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.nightly) for name in VARIANTS]
)
def test_same_loss_and_gradients_packed_recomputed_and_sharded(variant):
    runtime = decoder.Runtime(compute_dtype="float32", remat="none")
    trainable, frozen = build(variant)
    want = loss_and_gradients(trainable, frozen, batch(packed=False), runtime)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(want[1]))
    for path, leaf in tree.flatten(want[1]).items():  # a smaller rank's padding
        if VARIANTS[variant][0].get("rank_pattern") and "up_proj/lora_B" in path:
            assert np.all(np.asarray(leaf[1, :, 2:]) == 0)
    assert_near(loss_and_gradients(trainable, frozen, batch(packed=True), runtime), want, 1e-5)
    recomputed = runtime.replace(remat="full")
    assert_near(loss_and_gradients(trainable, frozen, batch(packed=False), recomputed), want, 1e-5)

    mesh = mesh_lib.make({"data": 1, "fsdp": 4, "tensor": 2})
    put = lambda t: jax.device_put(t, partition.shardings(t, mesh))  # noqa: E731
    data = batch(packed=False)
    data = {name: jnp.concatenate([value, jnp.zeros_like(value[:1])]) for name, value in data.items()}
    data["segment_ids"] = data["segment_ids"].at[-1].set(1)
    sharded = loss_and_gradients(put(trainable), put(frozen), data, runtime.replace(mesh=mesh))
    assert_near(sharded, want, 2e-5)


def test_nothing_is_replicated_that_need_not_be():
    """A is cut as the base's input, B as its output, codes as the weight."""
    mesh = mesh_lib.make({"data": 1, "fsdp": 4, "tensor": 2})
    trainable, frozen = build("qlora")
    specs = partition.by_path(partition.shardings(tree.merge(trainable, frozen), mesh))
    at = "layers_0/0/mlp/up_proj"
    assert "fsdp" in specs[f"adapter/{at}/lora_A"] and "tensor" in specs[f"adapter/{at}/lora_B"]
    assert {"fsdp", "tensor"} <= set(specs[f"quant/{at}/codes"])
    pissa = build("pissa")[1]
    specs = partition.by_path(partition.shardings(pissa, mesh))
    assert "fsdp" in specs[f"adapter/{at}/initial_lora_A"] and "tensor" in specs[f"adapter/{at}/initial_lora_B"]


def test_codes_cross_the_wire_not_weights():
    """FSDP gathers u8 codes and dequantises behind them: no float as large as a projection is gathered."""
    mesh = mesh_lib.make({"data": 1, "fsdp": 8, "tensor": 1})
    trainable, frozen = build("qlora")
    put = lambda t: jax.device_put(t, partition.shardings(t, mesh))  # noqa: E731
    data = jax.tree.map(lambda value: jnp.concatenate([value] * 8), batch(packed=True))
    runtime = decoder.Runtime(compute_dtype="bfloat16", remat="full", mesh=mesh)

    def loss(trainable, frozen):
        variables = tree.merge(trainable, frozen)
        inputs = (data["tokens"], data["positions"], data["segment_ids"])
        return decoder.hidden_states(CONFIG, runtime, variables, *inputs)[0].astype(jnp.float32).sum()

    program = jax.jit(jax.grad(loss)).lower(put(trainable), put(frozen)).compile().as_text()
    gathers = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]* all-gather\(", program)
    sizes = {
        dtype: [math.prod(map(int, shape.split(","))) for d, shape in gathers if d == dtype] for dtype, _ in gathers
    }
    smallest = min(leaf.size // 3 for path, leaf in tree.flatten(frozen).items() if path.endswith("proj/codes"))
    assert max(sizes["u8"]) >= smallest
    floats = [size for dtype in ("f32", "bf16") for size in sizes.get(dtype, [])]
    assert sorted(floats)[-1:] <= [CONFIG.vocab_size * CONFIG.hidden_size]  # the embedding
    assert len([size for size in floats if size >= 2 * smallest]) <= 1


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_logits_are_those_of_the_dequantised_model(kind):
    params = decoder.init_params(jax.random.key(0), CONFIG)
    variables = quantised(params, kind)
    plain = tree.flatten(variables["params"])
    for path, leaf in tree.flatten(params).items():
        if path not in plain:
            plain[path] = nf4.dequantise(nf4.quantise(leaf, kind))
    data, runtime = batch(packed=True), decoder.Runtime(compute_dtype="float32", remat="none")
    hidden = [
        decoder.hidden_states(CONFIG, runtime, v, data["tokens"], data["positions"], data["segment_ids"])[0]
        for v in (variables, {"params": tree.unflatten(plain)})
    ]
    np.testing.assert_allclose(hidden[0], hidden[1], rtol=1e-4, atol=1e-4)
