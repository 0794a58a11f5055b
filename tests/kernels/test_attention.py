"""Every attention kernel against the float32 formula, forward and gradient, over packed rows."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax.errors import ConfigError
from sftjax.kernels import attention as attention_module
from sftjax.kernels import chunked, cpu, cudnn, reference, splash
from sftjax.kernels.attention import Case, attention, choose, make_info
from sftjax.parallel import mesh as meshes

FLOAT32, BFLOAT16 = 2e-5, 2e-2  # of the largest entry


def case(length, heads, groups, width, segments, *, batch=2, dtype=jnp.float32, seed=0):
    """q, k, v, info; rows are cut at random into `segments` documents, positions restart in each."""
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.standard_normal((batch, length, n, width)), dtype) for n in (heads, groups, groups))
    ids, positions = np.zeros((2, batch, length), np.int32)
    for row in range(batch):
        cuts = [0, *sorted(rng.choice(np.arange(1, length), segments - 1, replace=False)), length]
        for number, (start, end) in enumerate(itertools.pairwise(cuts), start=1):
            ids[row, start:end], positions[row, start:end] = number, np.arange(end - start)
    return q, k, v, make_info(jnp.asarray(ids), jnp.asarray(positions), max_segments=segments)


def outputs(function, q, k, v, sinks=None):
    """Output and gradients of a function of q, k, v (and sinks) under a fixed direction."""
    args = (q, k, v) if sinks is None else (q, k, v, sinks)

    @jax.jit
    def run(*args):
        out, pull = jax.vjp(function, *args)
        direction = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return out, *pull(direction.astype(out.dtype))

    return run(*args)


def agree(kernel, q, k, v, info, *, sinks=None, tolerance=FLOAT32, **options):
    options = {"scale": q.shape[-1] ** -0.5} | options

    def call(function):
        def run(q, k, v, sinks=None):
            return function(q, k, v, info, **options, **({} if sinks is None else {"sinks": sinks}))

        return run

    got = outputs(call(kernel), q, k, v, sinks)
    want = outputs(call(reference.attention), *(x.astype(jnp.float32) for x in (q, k, v)), sinks)
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), got, want, strict=False):
        difference = np.max(np.abs(np.asarray(a, np.float32) - b)) / np.max(np.abs(b))
        assert difference <= tolerance, (name, difference)


@pytest.fixture(params=["plain", "cpu"])
def form(request, monkeypatch):
    """Both forms of the chunked kernel; tests have eight devices, where `choose` would always take the plain one."""
    pick = {"plain": lambda on_cpu, otherwise, *args: otherwise(*args), "cpu": lambda on_cpu, _, *args: on_cpu(*args)}
    monkeypatch.setattr(cpu, "choose", pick[request.param])


def test_reference_is_softmax_over_what_a_token_may_see():
    q, k, v, info = case(9, 2, 1, 4, 3, batch=1)
    q, k, v = (np.asarray(x[0], np.float64) for x in (q, k, v))
    ids, positions = np.asarray(info.segment_ids_q[0]), np.asarray(info.positions_q[0])
    given = (jnp.asarray(x[None], jnp.float32) for x in (q, k, v))
    got = reference.attention(*given, info, window=3, soft_cap=2.0, scale=0.5)[0]
    for token in range(9):
        seen = (ids == ids[token]) & (positions <= positions[token]) & (positions > positions[token] - 3)
        for head in range(2):
            scores = 2.0 * np.tanh(0.5 * k[seen, 0] @ q[token, head] / 2.0)
            want = np.exp(scores) @ v[seen, 0] / np.exp(scores).sum()
            np.testing.assert_allclose(got[token, head], want, rtol=1e-5, atol=1e-6)


# Every pair of values of two columns appears at least once.
GRID = [
    # segments, (heads, groups), options, (length, width)
    (1, (4, 4), {}, (96, 16)),
    (1, (4, 2), {"window": 5}, (67, 8)),
    (1, (3, 1), {"window": 33, "soft_cap": 3.0}, (96, 16)),
    (3, (4, 4), {"window": 5}, (96, 16)),
    (3, (4, 2), {"window": 33, "soft_cap": 3.0}, (67, 8)),
    (3, (3, 1), {}, (67, 8)),
    (7, (4, 4), {"window": 33, "soft_cap": 3.0}, (67, 8)),
    (7, (4, 2), {}, (96, 16)),
    (7, (3, 1), {"window": 5}, (96, 16)),
]


@pytest.mark.parametrize("segments, heads, options, shape", GRID)
def test_chunked(form, segments, heads, options, shape):
    agree(functools.partial(chunked.attention, block=32), *case(shape[0], *heads, shape[1], segments), **options)


@pytest.mark.parametrize("width", [64, 256])
def test_chunked_head_widths_and_default_block(form, width):
    agree(chunked.attention, *case(300, 2, 1, width, 4), window=200)


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"soft_cap": 5.0}])
def test_chunked_bfloat16(form, options):
    arrays = case(96, 4, 2, 32, 3, dtype=jnp.bfloat16)
    agree(functools.partial(chunked.attention, block=32), *arrays, tolerance=BFLOAT16, **options)


def test_chunked_sinks(form):
    agree(functools.partial(chunked.attention, block=16), *case(50, 4, 2, 8, 3), sinks=jnp.array([-1.0, 0.0, 1.0, 3.0]))


def test_chunked_without_the_packers_order(form):
    """Keys in any order and of any number: position and segment decide, nothing else."""
    q, k, v, info = case(48, 4, 2, 8, 3)
    order = np.random.default_rng(1).permutation(48)
    shuffled = make_info(
        info.segment_ids_q, info.positions_q, info.segment_ids_kv[:, order], info.positions_kv[:, order]
    )
    agree(functools.partial(chunked.attention, block=16), q, k[:, order], v[:, order], shuffled, window=9)
    straight = attention(q, k, v, info, scale=0.3)
    np.testing.assert_allclose(attention(q, k[:, order], v[:, order], shuffled, scale=0.3), straight, atol=1e-5)


@pytest.mark.parametrize("function", [reference.attention, chunked.attention])
def test_a_query_that_sees_nothing_gets_zeros_and_no_nan(form, function):
    q, k, v, info = case(16, 2, 1, 8, 2)
    blind = make_info(info.segment_ids_q.at[:, 4:7].set(99), info.positions_q, info.segment_ids_kv, info.positions_kv)
    out, *gradients = outputs(lambda q, k, v: function(q, k, v, blind, scale=0.3), q, k, v)
    assert jnp.all(out[:, 4:7] == 0)
    assert all(jnp.all(jnp.isfinite(g)) for g in gradients)
    assert jnp.all(gradients[0][:, 4:7] == 0)


def test_packed_equals_alone(form):
    """Editing document 1 leaves document 2's outputs, and the gradient through them, untouched."""
    q, k, v, info = case(40, 2, 1, 8, 3, batch=1)
    first = info.segment_ids_q[0] == 1

    def rest(k, v):
        out = attention(q, k, v, info, scale=0.3)[0]
        return jnp.where(first[:, None, None], 0, out)

    edited = jnp.where(first[None, :, None, None], 100.0, k)
    np.testing.assert_array_equal(rest(k, v), rest(edited, v))
    assert not jnp.any(jax.grad(lambda v: jnp.sum(rest(k, v)))(v)[0, first])


def test_nothing_after_a_token_reaches_it(form):
    q, k, v, info = case(40, 2, 1, 8, 1, batch=1)
    gradient = jax.grad(lambda v: jnp.sum(attention(q, k, v, info, scale=0.3)[0, 17]))(v)
    assert not jnp.any(gradient[0, 18:]) and jnp.all(jnp.any(gradient[0, :18], axis=(1, 2)))


@pytest.mark.parametrize(
    "segments, options, width", [(1, {}, 128), (4, {"window": 100}, 64), (3, {"soft_cap": 4.0}, 256)]
)
def test_splash_interpreted(segments, options, width):
    kernel = functools.partial(splash.attention, interpret=True)
    agree(kernel, *case(256, 4, 2, width, segments), **options)


def test_splash_interpreted_sinks():
    kernel = functools.partial(splash.attention, interpret=True)
    agree(kernel, *case(128, 4, 2, 64, 2, batch=1), sinks=jnp.array([-1.0, 0.0, 1.0, 3.0]))


@pytest.mark.parametrize("segments, options", [(4, {}), (3, {"window": 100, "soft_cap": 4.0})])
def test_tokamax_splash_interpreted(segments, options):
    pytest.importorskip("tokamax", reason="the extra `kernels` isn't installed")
    with jax.numpy_rank_promotion("allow"):  # theirs isn't as strict
        agree(functools.partial(splash.tokamax_attention, interpret=True), *case(384, 4, 2, 64, segments), **options)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_splash_lowers_for_a_tpu(width):
    q, k, v, info = case(512, 4, 2, width, 3, dtype=jnp.bfloat16)
    function = jax.jit(jax.grad(lambda q: jnp.sum(splash.attention(q, k, v, info, scale=0.1).astype(jnp.float32))))
    text = function.trace(q).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text


MESHES = [{"fsdp": 2, "tensor": 2, "context": 2}, {"data": 2, "tensor": 4}, {"fsdp": 8}, {"tensor": 8}]


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("options", [{}, {"window": 20, "soft_cap": 5.0}])
def test_sharded_equals_whole(shape, options):
    arrays = case(64, 8, 2, 16, 3, batch=8)
    agree(functools.partial(attention, mesh=meshes.make(shape)), *arrays, **options)


def test_sharded_sinks():
    mesh = meshes.make({"fsdp": 2, "tensor": 4})
    agree(functools.partial(attention, mesh=mesh), *case(32, 8, 4, 8, 2), sinks=jnp.linspace(-1, 2, 8))


def test_sharded_rows_need_no_communication():
    mesh = meshes.make({"fsdp": 4, "tensor": 2})
    q, k, v, info = case(64, 4, 2, 16, 3, batch=4)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", None, "tensor", None))
    q, k, v = (jax.device_put(x, place) for x in (q, k, v))
    run = jax.jit(jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, info, scale=0.3, mesh=mesh) ** 2), (0, 1, 2)))
    text = run.lower(q, k, v).compile().as_text()
    assert not [word for word in ("all-gather", "all-to-all", "collective-permute") if word in text]


def test_dropout_keeps_the_mean_and_drops_the_share():
    q, k, v, info = case(64, 2, 2, 8, 1, batch=1)
    v = jnp.ones_like(v)
    run = jax.vmap(lambda key: attention(q, k, v, info, scale=0.3, dropout=(0.25, key)))
    outs = run(jax.random.split(jax.random.key(0), 200))
    np.testing.assert_allclose(jnp.mean(outs[:, :, 20:]), 1.0, atol=0.02)
    assert abs(float(jnp.mean(outs[:, 0, 0] == 0)) - 0.25) < 0.1  # token 0 sees one key


def test_remat_can_save_the_output():
    q, k, v, info = case(64, 2, 1, 8, 2)
    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")

    def loss(q, policy):
        return jnp.sum(jax.checkpoint(lambda q: attention(q, k, v, info, scale=0.3) * 2, policy=policy)(q) ** 2)

    def products(policy):
        return str(jax.make_jaxpr(jax.grad(lambda q: loss(q, policy)))(q)).count("= dot_general")

    assert products(policy) < products(jax.checkpoint_policies.nothing_saveable)


# --- dispatch -----------------------------------------------------------------------------------------------------

PLAIN = Case(platform="tpu", heads=(8, 2), head_dim=64, length=512, dtype="bfloat16", in_order=True, max_segments=8)


def changed(**fields):
    import dataclasses

    return dataclasses.replace(PLAIN, **fields)


def test_order_of_choice(monkeypatch):
    monkeypatch.setattr(splash, "tokamax_version", lambda: None)
    choose.cache_clear()
    assert choose(PLAIN) == "splash"
    assert choose(changed(length=500)) == "chunked"
    assert choose(changed(in_order=False)) == "chunked"
    assert choose(changed(dropout=True)) == "reference"
    assert choose(changed(platform="cpu")) == "chunked"
    assert choose(changed(platform="gpu")) == "chunked"  # no GPU here to test cuDNN on
    choose.cache_clear()
    monkeypatch.setattr(splash, "tokamax_version", lambda: (0, 0, 17))
    assert choose(PLAIN) == "tokamax_splash"
    choose.cache_clear()
    monkeypatch.setattr(splash, "tokamax_version", lambda: (0, 0, 12))
    assert choose(PLAIN) == "splash"
    choose.cache_clear()


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("flash", {}, "doesn't exist"),
        ("splash", {"platform": "cpu"}, "TPU"),
        ("splash", {"length": 500}, "500"),
        ("chunked", {"dropout": True}, "dropout"),
        ("cudnn_packed", {}, "GPU"),
    ],
)
def test_an_explicit_choice_that_cannot_is_an_error(name, fields, message):
    with pytest.raises(ConfigError, match=message):
        choose(changed(**fields), name)


def test_the_winner_is_logged_once(caplog):
    attention_module._announce.cache_clear()
    choose.cache_clear()
    with caplog.at_level("INFO", logger="sftjax.kernels.attention"):
        for length in (128, 256):
            choose(changed(platform="cpu", length=length))
    assert [record.getMessage() for record in caplog.records] == ["attention: chunked"]


# --- cuDNN: what can be checked without a GPU ----------------------------------------------------------------------


def test_segment_table():
    ids = jnp.array([[1, 1, 1, 2, 2, 3], [5, 5, 5, 5, 5, 5]])
    lengths, offsets, fits = cudnn.segment_table(ids, 4)
    np.testing.assert_array_equal(lengths, [[3, 2, 1, -1], [6, -1, -1, -1]])
    np.testing.assert_array_equal(offsets, [[0, 3, 5, -1, -1], [0, -1, -1, -1, -1]])
    assert fits.tolist() == [True, True]
    assert cudnn.segment_table(ids, 3)[2].tolist() == [True, True]
    assert cudnn.segment_table(ids, 2)[2].tolist() == [False, True]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("windowed", [False, True])
def test_the_self_test_passes_a_right_kernel_and_catches_a_wrong_one(grouped, windowed):
    def ignores_segments(q, k, v, info, **options):
        one = make_info(jnp.ones_like(info.segment_ids_q), jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2]))
        return chunked.attention(q, k, v, one, **options)

    def inside_a_trace(function):
        found = {}

        def traced(x):
            with jax.ensure_compile_time_eval():
                found.update(cudnn.compare(function, 64, grouped, windowed, "bfloat16"))
            return x

        jax.jit(jax.checkpoint(traced))(1.0)
        return found

    assert all(value <= cudnn.TOLERANCE for value in inside_a_trace(chunked.attention).values())
    assert any(value > cudnn.TOLERANCE for value in inside_a_trace(ignores_segments).values())


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("function", [cudnn.packed_attention, cudnn.mask_attention])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_cudnn(function, grouped, windowed, width):
    differences = cudnn.compare(function, width, grouped, windowed, "bfloat16")
    assert all(value <= BFLOAT16 for value in differences.values()), differences
