"""One step: exact accounting over micro-batches, packing and devices, and nothing applied that isn't finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax import costs, optim, program, step, tree
from sftjax.data import packing, pipeline
from sftjax.data.mixture import Ingredient, Mixture
from sftjax.data.types import Sample
from sftjax.kernels import nf4
from sftjax.models import decoder
from sftjax.models.config import LayerSpec, ModelConfig, Rope
from sftjax.parallel import mesh as meshes
from sftjax.peft import lora
from sftjax.peft.spec import AdapterSpec

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    layers=(LayerSpec(rope=Rope(10000.0, 16)),) * 2,
    max_position=512,
    norm_eps=1e-5,
    tie_word_embeddings=True,
)
RUNTIME = decoder.Runtime(compute_dtype="float32", remat="full")
LENGTH = 128


def samples(count=8, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        size = int(rng.integers(8, 60))
        weights = (rng.random(size) < 0.6).astype(np.float32) * rng.choice([0.5, 1.0, 2.0])
        weights[-1] = 1.0
        made.append(Sample(rng.integers(0, 96, size).astype(np.int32), weights, index=number))
    return made


def batch_of(rows, accumulation):
    """Rows of samples to `[A, B, L]`: each inner list is one packed row."""
    elements = [[packing.Element(sample) for sample in row] for row in rows]
    arrays = packing.assemble(elements, len(rows), (LENGTH,), pad_id=0)
    del arrays["source_ids"]
    return {key: value.reshape(accumulation, len(rows) // accumulation, LENGTH) for key, value in arrays.items()}


@functools.cache
def params():
    return {"params": decoder.init_params(jax.random.key(1), CONFIG, jnp.float32)}


@functools.cache
def compiled():
    return jax.jit(functools.partial(step.loss_and_gradients, config=CONFIG, runtime=RUNTIME))


def gradients(batch):
    trainable, frozen = tree.partition(params(), "params/.*")
    sums, grads = compiled()(trainable, frozen, batch, None)
    return float(sums["nll"] / sums["weight"]), tree.flatten(jax.tree.map(np.asarray, grads)), sums


def assert_same(first, second, tolerance=1e-6):
    assert first[0] == pytest.approx(second[0], rel=tolerance)
    for path, value in first[1].items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(second[1][path], value, rtol=0, atol=tolerance * scale, err_msg=path)


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_equals_the_big_batch(accumulation):
    rows = [[sample] for sample in samples()]
    assert_same(gradients(batch_of(rows, 1)), gradients(batch_of(rows, accumulation)))


def test_packed_equals_alone():
    made = samples()
    alone = batch_of([[sample] for sample in made], 1)
    packed = batch_of([made[0:2], made[2:4], made[4:6], made[6:8]], 2)
    assert_same(gradients(alone), gradients(packed))


class Made(list):
    """Samples as a source of data."""

    name = "made"

    def location(self, index):
        return f"made:{index}"


def encode(sample, index=0, source=0):
    return [sample]


def first_step(made, strategy, **options):
    """The first batch of the real pipeline, and what stands behind it."""
    mixture = Mixture([Ingredient(Made(made), encode)], shuffle=False)
    with pipeline.build(mixture, length=LENGTH, packing_strategy=strategy, prefetch=0, **options) as items:
        item = next(items)
        assert next(items, None) is None
    return {name: item.batch[name] for name in program.BATCH_ARRAYS}, item.info


def test_packed_padding_free_and_unpacked_rows_of_the_pipeline_agree():
    made = samples(8)
    unpacked, info = first_step(made, "none", batch_size=8)
    reference = gradients(unpacked)
    layouts = {
        "packed": dict(strategy="best_fit", batch_size=2, accumulation=2, packing_bins=4),
        "flat": dict(strategy="padding_free", batch_size=8, static_lengths=4),
        "flat_by_device": dict(strategy="padding_free", batch_size=4, flat_rows=2, accumulation=2),
        "flat_by_tokens": dict(strategy="padding_free", batch_size=4, fill="tokens", max_segments=9),
    }
    shapes = {}
    for name, options in layouts.items():
        batch, found = first_step(made, **options)
        shapes[name] = batch["tokens"].shape
        assert (found.real_tokens, found.trained_tokens) == (info.real_tokens, info.trained_tokens), name
        assert_same(reference, gradients(batch))
    assert shapes["flat"][:2] == (1, 1) and shapes["flat_by_device"][:2] == (2, 2)
    assert shapes["flat"][2] < 8 * LENGTH  # padded to a static size, not to the capacity


def test_by_example_every_sample_counts_alike_packed_and_unpacked():
    made = samples(6)
    alone = [gradients(batch_of([[sample]], 1)) for sample in made]
    mean_loss = np.mean([loss for loss, _, _ in alone])
    mean_gradient = {path: np.mean([grads[path] for _, grads, _ in alone], axis=0) for path in alone[0][1]}
    for options in (dict(strategy="none", batch_size=6), dict(strategy="best_fit", batch_size=2, accumulation=2)):
        batch, _ = first_step(made, reduction="example", **options)
        found = gradients(batch)
        assert_same((mean_loss, mean_gradient), found)
        assert float(found[2]["weight"]) == pytest.approx(6, rel=1e-6)
        assert int(found[2]["trained"]) == sum(int(np.sum(sample.weights[1:] > 0)) for sample in made)


def test_micro_batches_without_a_trained_token_change_nothing():
    made = samples(2)
    silent = Sample(made[0].tokens, np.zeros_like(made[0].weights))
    full = gradients(batch_of([[made[0]], [made[1]]], 1))
    with_silent = gradients(batch_of([[made[0]], [made[1]], [silent], [silent]], 2))
    assert_same(full, with_silent)


def build(
    mesh_shape,
    spec=None,
    devices=1,
    learning_rate=1e-2,
    dtype=jnp.float32,
    remat="full",
    kind=None,
    ratio=1.0,
    compute="float32",
    **options,
):
    """A program on some devices, its state and frozen leaves. `kind` of quantised base, `ratio` of LoRA+; `options` of
    `program.build`."""
    spec = spec or AdapterSpec(method="full")
    mesh = meshes.make(
        {"data": 1, "fsdp": 1, "tensor": 1, "context": 1, "expert": 1, **mesh_shape}, jax.devices()[:devices]
    )
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), params())
    if kind:
        variables = quantised(variables["params"], kind)
    if spec.method != "full":
        quant = variables.get("quant")
        variables["adapter"] = lora.init(jax.random.key(2), variables["params"], spec, quant=quant)
    optimizer, _ = optim.make_optimizer(
        learning_rate=learning_rate, total_steps=100, schedule="constant", weight_decay=0.1, loraplus_lr_ratio=ratio
    )
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    built = program.build(
        CONFIG,
        RUNTIME.replace(
            mesh=mesh, remat=remat, compute_dtype=compute, bottleneck_activation=spec.bottleneck_activation
        ),
        mesh,
        abstract,
        optimizer,
        trainable_regex=lora.trainable_regex(spec),
        max_segments=4,
        seed=0,
        **options,
    )
    copies = jax.tree.map(jnp.array, variables)
    return built, *built.init_state(copies)


def quantised(weights, kind):
    kept, quant = {}, {}
    for path, leaf in tree.flatten(weights).items():
        module = path.rpartition("/")[0]
        if nf4.is_projection(module):
            quant |= {f"{module}/{name}": part for name, part in nf4.quantise(leaf, kind).items()}
        else:
            kept[path] = leaf
    return {"params": tree.unflatten(kept), "quant": tree.unflatten(quant)}


def losses(built, state, frozen, count=4, accumulation=2, packed=False):
    made = samples(8)
    rows = [made[i : i + 2] for i in range(0, 8, 2)] if packed else [[sample] for sample in made]
    batch = batch_of(rows, accumulation)
    size = len(rows) // accumulation
    values = []
    for _ in range(count):
        state, figures = built.train_step(state, frozen, built.put(batch, range(size), size))
        values.append(float(figures["nll"] / figures["weight"]))
    return values, state


VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"method": "dora"},
    "pissa": {"init": "pissa"},
    "lora_plus": {},
    "houlsby": {"method": "houlsby", "bottleneck_size": 16, "bottleneck_activation": "silu"},
    "pfeiffer": {"method": "pfeiffer", "bottleneck_size": 16},
    "nf4": {"method": "dora"},
    "int8": {},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("lora_plus", "nf4") else pytest.mark.nightly) for name in VARIANTS]
)
def test_packing_recomputation_and_devices_don_t_change_the_curve_of_any_variant(name):
    spec = AdapterSpec(**{"rank": 4, "alpha": 8, **VARIANTS[name]})
    options = {"kind": name if name in ("nf4", "int8") else None, "ratio": 16.0 if name == "lora_plus" else 1.0}
    plain, _ = losses(*build({}, spec, **options), 3)
    other, _ = losses(*build({"fsdp": 4, "tensor": 2}, spec, 8, remat="none", **options), 3, 1, packed=True)
    np.testing.assert_allclose(other, plain, rtol=1e-5)
    assert plain[-1] < plain[0] - 1e-4


@pytest.mark.parametrize(("mesh_shape", "devices"), [({}, 1), ({"fsdp": 4, "tensor": 2}, 8)])
def test_a_state_that_waits_on_the_host_changes_nothing(mesh_shape, devices):
    plain, state = losses(*build(mesh_shape, devices=devices))
    built, *start = build(mesh_shape, devices=devices, offload_optimizer=True)
    found, waiting = losses(built, *start)
    np.testing.assert_array_equal(found, plain)
    for here, there in zip(*map(jax.tree.leaves, (state.opt_state, waiting.opt_state)), strict=True):
        assert there.sharding.memory_kind == ("pinned_host" if there.ndim else here.sharding.memory_kind)
        assert there.sharding.spec == here.sharding.spec
        np.testing.assert_array_equal(there, here)
    memory = costs.memory(built, "tpu", rows=8, length=LENGTH, accumulation=1)
    held = costs.memory(build(mesh_shape, devices=devices)[0], "tpu", rows=8, length=LENGTH, accumulation=1)
    assert memory.optimizer + memory.offloaded == held.optimizer and memory.optimizer < 100 and memory.peak < held.peak


@pytest.mark.parametrize("spec", [AdapterSpec(method="full"), AdapterSpec(method="lora", rank=4, alpha=8)])
@pytest.mark.parametrize("mesh_shape", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2, "data": 2}])
def test_devices_don_t_change_the_curve(mesh_shape, spec):
    devices = int(np.prod(list(mesh_shape.values())))
    alone, _ = losses(*build({}, spec))
    spread, _ = losses(*build(mesh_shape, spec, devices))
    np.testing.assert_allclose(spread, alone, rtol=1e-5)
    assert alone[-1] < alone[0] - (0.05 if spec.method == "full" else 1e-3)


def test_a_step_that_is_not_finite_is_not_applied():
    built, state, frozen = build({})
    before = jax.tree.map(np.asarray, (state.trainable, state.opt_state))
    batch = batch_of([[sample] for sample in samples(4)], 1)
    batch["weights"][0, 0, 5] = np.inf
    state, figures = built.train_step(state, frozen, built.put(batch, range(4), 4))
    assert not figures["finite"] and int(state.nonfinite) == 1 and int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, before, (state.trainable, state.opt_state))
    _, after = losses(built, state, frozen, 1)
    assert int(after.nonfinite) == 0 and int(after.step) == 2


@pytest.mark.parametrize("spec", [AdapterSpec(method="full"), AdapterSpec(method="lora", rank=4, alpha=8)])
def test_float16_follows_float32(spec):
    plain, _ = losses(*build({}, spec), 6)
    scaled, state = losses(*build({}, spec, compute="float16"), 6)
    np.testing.assert_allclose(scaled, plain, rtol=2e-3)
    assert float(state.loss_scale["scale"]) == step.FIRST_LOSS_SCALE and int(state.loss_scale["sound"]) == 6


def test_small_gradients_survive_float16_by_the_scale():
    """Where the loss is small (a long batch's mean, seen by one token), float16 rounds its gradient to nothing."""
    batch = batch_of([[sample] for sample in samples()], 1)
    trainable, frozen = tree.partition(params(), "params/.*")

    def of(dtype, scale):
        runtime = RUNTIME.replace(compute_dtype=dtype)
        function = jax.jit(functools.partial(step.loss_and_gradients, config=CONFIG, runtime=runtime))
        return tree.flatten(function(trainable, frozen, batch, None, loss_scale=jnp.float32(scale))[1])

    exact = of("float32", 1.0)
    # a loss 2**14 times smaller, and the same with the scale that makes up for it
    lost, kept = of("float16", 2.0**-14), of("float16", 2.0**-14 * step.FIRST_LOSS_SCALE)
    for path in (name for name in exact if "mlp" in name):
        size = np.linalg.norm(exact[path])
        assert np.linalg.norm(kept[path] - exact[path]) < 0.02 * size
        assert np.linalg.norm(lost[path] - exact[path]) > 0.2 * size


def test_an_overflow_halves_the_loss_scale_and_nothing_else():
    built, state, frozen = build({}, compute="float16")
    state = state.replace(loss_scale={**state.loss_scale, "scale": jnp.float32(2.0**40)})
    before = jax.tree.map(np.asarray, (state.trainable, state.opt_state))
    batch = batch_of([[sample] for sample in samples(4)], 1)
    state, figures = built.train_step(state, frozen, built.put(batch, range(4), 4))
    assert figures["overflow"] and not figures["finite"] and float(figures["loss_scale"]) == 2.0**40
    assert float(state.loss_scale["scale"]) == 2.0**39 and int(state.nonfinite) == 0 and int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, before, (state.trainable, state.opt_state))
    for _ in range(40):
        state, figures = built.train_step(state, frozen, built.put(batch, range(4), 4))
    assert figures["finite"] and not figures["overflow"] and int(state.loss_scale["sound"]) > 10


def test_a_loss_that_is_not_finite_is_no_fault_of_the_loss_scale():
    built, state, frozen = build({}, compute="float16")
    batch = batch_of([[sample] for sample in samples(4)], 1)
    batch["weights"][0, 0, 5] = np.inf
    state, figures = built.train_step(state, frozen, built.put(batch, range(4), 4))
    assert not figures["overflow"] and int(state.nonfinite) == 1
    assert float(state.loss_scale["scale"]) == step.FIRST_LOSS_SCALE


def test_the_loss_scale_doubles_after_many_sound_steps():
    built, state, frozen = build({}, compute="float16")
    state = state.replace(loss_scale={**state.loss_scale, "sound": jnp.int32(step.LOSS_SCALE_STEPS - 1)})
    _, state = losses(built, state, frozen, 2)
    assert float(state.loss_scale["scale"]) == 2 * step.FIRST_LOSS_SCALE and int(state.loss_scale["sound"]) == 1


def test_learning_rate_zero_changes_no_parameter():
    built, state, frozen = build({}, learning_rate=0.0)
    before = jax.tree.map(np.asarray, state.trainable)
    values, state = losses(built, state, frozen, 3)
    assert len(set(values)) == 1
    jax.tree.map(np.testing.assert_array_equal, before, state.trainable)


def test_bfloat16_parameters_move_by_less_than_their_spacing_on_average_and_again_alike():
    updates, moved = {}, {}
    for dtype in (jnp.float32, jnp.bfloat16):
        built, state, frozen = build({}, learning_rate=2e-6, dtype=dtype)
        before = tree.flatten(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.trainable))
        _, state = losses(built, state, frozen, 2)
        half_way = jax.tree.map(jnp.array, state)
        _, state = losses(built, state, frozen, 2)
        after = tree.flatten(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.trainable))
        updates[dtype] = np.concatenate([(after[path] - before[path]).ravel() for path in before])
        moved[dtype] = np.mean(updates[dtype] != 0)
    # nearest rounding would lose every one of these updates: the spacing of numbers is ten times as large
    assert moved[jnp.float32] > 0.9 and 0.005 < moved[jnp.bfloat16] < 0.5
    exact = updates[jnp.float32]
    slope = np.sum(exact * updates[jnp.bfloat16]) / np.sum(exact * exact)
    assert slope == pytest.approx(1, abs=0.1)
    _, again = losses(built, half_way, frozen, 2)
    jax.tree.map(np.testing.assert_array_equal, again.trainable, state.trainable)


def test_frozen_weights_get_no_gradient_and_the_adapter_is_all_that_is_kept():
    spec = AdapterSpec(method="lora", rank=4, alpha=8)
    built, state, frozen = build({}, spec)
    assert all(path.startswith("adapter/") for path in tree.flatten(state.trainable))
    before = jax.tree.map(np.asarray, frozen)
    _, _ = losses(built, state, frozen, 2)
    jax.tree.map(np.testing.assert_array_equal, before, frozen)
    count = built.count()
    # 2 layers x rank 4 x (in + out) of the seven projections
    per_layer = 4 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 128))
    assert count["trainable"] == count["adapter"] == 2 * per_layer


def test_eval_sums_stand_by_segment():
    made = samples(6)
    built, state, frozen = build({})
    packed = batch_of([made[0:2], made[2:4], made[4:6], made[0:1]], 1)
    sums = jax.tree.map(np.asarray, built.eval_step(state.trainable, frozen, built.put(packed, range(4), 4)))
    for number, sample in enumerate(made):
        alone = batch_of([[sample]], 1)
        expected = built.eval_step(state.trainable, frozen, built.put(alone, range(1), 1))
        row, segment = divmod(number, 2)
        assert sums["nll"][row, segment] == pytest.approx(float(expected["nll"][0, 0]), rel=1e-5)
        assert sums["weight"][row, segment] == sample.weights[1:].sum()
    assert sums["nll"][:, 2:].sum() == 0
