"""Checkpoints: what is saved comes back bit for bit, on any mesh, or its damage is noticed."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sftjax import checkpoint as checkpoint_lib
from sftjax.checkpoint import Checkpointer, restore_params
from sftjax.digest import digest, leaf_digest
from sftjax.errors import ConfigError, StorageError


class State(flax.struct.PyTreeNode):
    step: jax.Array
    trainable: dict
    opt_state: object
    rng: jax.Array


def make_state(seed=0, devices=1, rows=16):
    """A small state, its arrays split over the first `devices` devices, and its abstract form."""
    rng = np.random.default_rng(seed)
    params = {
        "params": {
            "mlp": {"weight": jnp.asarray(rng.normal(size=(2, rows, 8)), jnp.float32)},
            "norm": {"weight": jnp.asarray(rng.normal(size=(8,)), jnp.bfloat16)},
        }
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = State(jnp.int32(seed), params, optimizer.init(params), jax.random.key(seed))
    mesh = Mesh(np.array(jax.devices()[:devices]), ("fsdp",))

    def sharding(leaf):
        spec = PartitionSpec(None, "fsdp") if leaf.ndim == 3 else PartitionSpec()
        return NamedSharding(mesh, spec)

    state = jax.tree.map(lambda leaf: jax.device_put(leaf, sharding(leaf)), state)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), state)
    return state, abstract


def values(state):
    return {path: np.asarray(checkpoint_lib._stored(leaf)) for path, leaf in checkpoint_lib._paths(state)[0]}


def assert_same(first, second):
    first, second = values(first), values(second)
    assert first.keys() == second.keys()
    for path in first:
        assert first[path].dtype == second[path].dtype, path
        assert first[path].shape == second[path].shape and first[path].tobytes() == second[path].tobytes(), path


def saved(directory, steps, rows=16, **options):
    with Checkpointer(directory, **options) as checkpointer:
        for step in steps:
            checkpointer.save(
                step, make_state(step, rows=rows)[0], {"next": step}, {"note": step}, {"eval_loss": 1.0 / step}
            )
    return directory


def needs_devices(count):
    if len(jax.devices()) < count:
        pytest.skip(f"needs {count} devices (XLA_FLAGS=--xla_force_host_platform_device_count={count})")


# --- saving and restoring ---------------------------------------------------------------------------------------------


def test_nothing_saved_gives_none(tmp_path):
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.restore(make_state()[1]) is None
        assert checkpointer.latest_step() is None and checkpointer.best_step() is None


def test_state_comes_back_bit_for_bit_with_its_classes(tmp_path):
    state, abstract = make_state(3)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(3, state, {"source": [1, 2], "cursor": {"0": 5}}, {"epoch": 0.5})
        assert not checkpointer.save(3, state, {}, {})  # it is there already
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(abstract)
    assert (restored.step, restored.position, restored.meta) == (
        3,
        {"source": [1, 2], "cursor": {"0": 5}},
        {"epoch": 0.5},
    )
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert_same(restored.state, state)
    assert jax.random.normal(restored.state.rng, ()) == jax.random.normal(state.rng, ())


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    state, abstract = make_state(1)
    expected = values(state)
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        state.trainable["params"] = update(state.trainable["params"])
        jax.block_until_ready(state.trainable)
        restored = values(checkpointer.restore(abstract).state)
    for path in expected:
        np.testing.assert_array_equal(expected[path], restored[path])


@pytest.mark.parametrize("before, after", [(8, 2), (2, 8), (8, 1), (1, 4)])
def test_restores_onto_another_number_of_devices(tmp_path, before, after):
    needs_devices(8)
    state, _ = make_state(5, before)
    _, abstract = make_state(5, after)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, state, {})
        restored = checkpointer.restore(abstract).state
    assert_same(restored, state)
    assert len(restored.trainable["params"]["mlp"]["weight"].sharding.device_set) == after


def test_latest_and_best_are_kept_and_recorded(tmp_path):
    losses = {1: 3.0, 2: 0.5, 3: 2.0, 4: float("nan"), 5: 2.5, 6: None}
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step, loss in losses.items():
            checkpointer.save(step, make_state(step)[0], {}, {}, None if loss is None else {"eval_loss": loss})
        checkpointer.wait()
        assert checkpointer.all_steps() == [2, 5, 6]
        assert (checkpointer.best_step(), checkpointer.latest_step()) == (2, 6)
        assert checkpointer.restore(make_state()[1], step=checkpointer.best_step()).step == 2
    assert sorted(os.listdir(tmp_path)) == ["2", "5", "6", "BEST", "LATEST"]
    assert (tmp_path / "BEST").read_text() == "2\n" and (tmp_path / "LATEST").read_text() == "6\n"
    with Checkpointer(tmp_path, keep=2) as again:  # as at the end of a run, and of one that went on
        assert again.best_step() == 2


def test_greater_can_be_better(tmp_path):
    with Checkpointer(tmp_path, keep=1, metric="eval_accuracy", greater_is_better=True) as checkpointer:
        for step, accuracy in ((1, 0.2), (2, 0.9), (3, 0.4)):
            checkpointer.save(step, make_state(step)[0], {}, {}, {"eval_accuracy": accuracy})
        checkpointer.wait()
        assert checkpointer.all_steps() == [2, 3] and checkpointer.best_step() == 2


def test_another_model_is_a_configuration_error_that_names_the_leaves(tmp_path):
    saved(tmp_path, [1])
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ConfigError, match=r"mlp/weight is float32\[2,16,8\] there and float32\[2,32,8\] here"):
            checkpointer.restore(make_state(rows=32)[1])
        with pytest.raises(ConfigError, match="isn't in the checkpoint"):
            checkpointer.restore({"other": jax.ShapeDtypeStruct((1,), jnp.float32)})
        assert checkpointer.all_steps() == [1]  # it is sound, and stays


def test_asking_for_a_missing_step_lists_those_there(tmp_path):
    saved(tmp_path, [1, 2])
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(StorageError, match=r"no checkpoint 7; there are \[1, 2\]"),
    ):
        checkpointer.restore(make_state()[1], step=7)


def test_parameters_alone(tmp_path):
    saved(tmp_path, [1, 2])
    step, params, meta = restore_params(tmp_path)
    assert step == 2 and meta == {"note": 2}
    assert_same(params, make_state(2)[0].trainable)
    assert restore_params(tmp_path, step=1)[0] == 1
    branch = restore_params(tmp_path, prefix="trainable/params/mlp")[1]
    assert list(branch) == ["weight"]
    abstract = make_state(2)[1].trainable
    assert_same(restore_params(tmp_path, abstract=abstract)[1], make_state(2)[0].trainable)
    with pytest.raises(StorageError, match="holds no 'adapter'"):
        restore_params(tmp_path, prefix="adapter")
    with pytest.raises(StorageError, match="no sound checkpoint"):
        restore_params(tmp_path / "nowhere")


# --- digest -----------------------------------------------------------------------------------------------------------


def test_digest_is_the_same_on_any_number_of_devices():
    needs_devices(8)
    digests = []
    for devices in (1, 2, 4, 8):
        state, _ = make_state(7, devices)
        digests.append(digest({path: checkpoint_lib._stored(leaf) for path, leaf in checkpoint_lib._paths(state)[0]}))
    assert all(found == digests[0] for found in digests)


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int8", "uint8", "int32", "bool", "uint32", "int4"]
)
def test_digest_sees_every_bit_and_every_exchange(dtype):
    rng = np.random.default_rng(0)
    array = np.asarray(jnp.asarray(rng.integers(0, 2, (6, 5))).astype(dtype))
    variants = [array]
    if dtype not in ("bool", "int4"):
        raw = array.view(np.uint8).reshape(-1)
        for bit in range(0, raw.size * 8, 3):
            flipped = raw.copy()
            flipped[bit // 8] ^= 1 << (bit % 8)
            variants.append(flipped.view(array.dtype).reshape(array.shape))
    exchanged = array.copy()
    exchanged[[0, 1]] = exchanged[[1, 0]]
    assert (exchanged != array).any()
    variants.append(exchanged)
    digests = np.asarray(jax.jit(jax.vmap(leaf_digest))(jnp.asarray(np.stack(variants))))
    assert len({tuple(one) for one in digests}) == len(variants)


# --- damage -----------------------------------------------------------------------------------------------------------


def files_of(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def flip_bit(path, rng):
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(raw))


def outcome(directory, abstract, good):
    """ "same" if step 2 came back whole, "noticed" if its damage was and step 1 came back whole."""
    with Checkpointer(directory) as checkpointer:
        restored = checkpointer.restore(abstract)
    assert_same(restored.state, good[restored.step])
    assert restored.position == {"next": restored.step} and restored.meta == {"note": restored.step}
    return {2: "same", 1: "noticed"}[restored.step]


def test_no_flipped_bit_goes_unnoticed(tmp_path, caplog):
    rng, rows = random.Random(0), 512  # small arrays would be stored inside the index, which has checksums
    saved(tmp_path / "sound", [1, 2], rows)
    good, abstract = {step: make_state(step, rows=rows)[0] for step in (1, 2)}, make_state(rows=rows)[1]
    arrays = [path for path in files_of(tmp_path / "sound" / "2" / "state") if path.parent.name == "d"]
    largest = max(arrays, key=lambda path: path.stat().st_size)
    tally = {"same": 0, "noticed": 0}
    for trial in range(24):  # half of them in the array data, where Orbax by itself notices none
        shutil.copytree(tmp_path / "sound", tmp_path / str(trial))
        victim = largest if trial % 2 else rng.choice(files_of(tmp_path / "sound" / "2"))
        flip_bit(tmp_path / str(trial) / victim.relative_to(tmp_path / "sound"), rng)
        found = outcome(tmp_path / str(trial), abstract, good)
        tally[found] += 1
        shutil.rmtree(tmp_path / str(trial))
    assert caplog.text.count("the digest of") >= 9
    assert tally["noticed"] >= 12  # a flip in a time stamp changes nothing, and needn't be


@pytest.mark.parametrize("how", ["truncate", "empty", "delete"])
def test_damaged_files_fall_back_to_the_checkpoint_before(tmp_path, how):
    saved(tmp_path / "sound", [1, 2])
    good, abstract = {step: make_state(step)[0] for step in (1, 2)}, make_state()[1]
    noticed = 0
    for victim in files_of(tmp_path / "sound" / "2")[:: 1 if how == "delete" else 2]:
        shutil.copytree(tmp_path / "sound", tmp_path / "run")
        path = tmp_path / "run" / victim.relative_to(tmp_path / "sound")
        if how == "delete":
            path.unlink()
        else:
            path.write_bytes(b"" if how == "empty" else path.read_bytes()[: path.stat().st_size // 2])
        noticed += outcome(tmp_path / "run", abstract, good) == "noticed"
        shutil.rmtree(tmp_path / "run")
    assert noticed >= 3


def damage(directory, step):
    for path in files_of(directory / str(step) / "state"):
        if path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:-1] + b"\x00\x01")


def test_falls_back_to_the_third_says_so_and_never_starts_from_zero(tmp_path, caplog):
    saved(tmp_path, [1, 2, 3], keep=3)
    abstract = make_state()[1]
    damage(tmp_path, 3), damage(tmp_path, 2)
    with Checkpointer(tmp_path, keep=3) as checkpointer, caplog.at_level(logging.WARNING):
        assert checkpointer.restore(abstract).step == 1
        assert "checkpoint 3 is damaged" in caplog.text and "checkpoint 2 is damaged" in caplog.text
        assert checkpointer.all_steps() == [1]
        assert checkpointer.save(2, make_state(2)[0], {})  # the number is free again
        checkpointer.wait()
    assert sorted(os.listdir(tmp_path / "damaged")) == ["2", "3"]
    damage(tmp_path, 1), damage(tmp_path, 2)
    for _ in range(2):  # nor does asking again
        with Checkpointer(tmp_path) as checkpointer, pytest.raises(StorageError, match="every checkpoint is damaged"):
            checkpointer.restore(abstract)
    assert sorted(os.listdir(tmp_path / "damaged")) == ["1", "2", "2-1", "3"]


def test_damage_of_a_step_asked_for_is_an_error(tmp_path):
    saved(tmp_path, [1, 2])
    damage(tmp_path, 2)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(StorageError, match="2 is damaged"):
        checkpointer.restore(make_state()[1], step=2)
    assert restore_params(tmp_path)[0] == 1


# --- storage ----------------------------------------------------------------------------------------------------------


def test_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't keep checkpoints here"):
        Checkpointer(tmp_path / "file" / "checkpoints")


def test_no_room_is_said_before_writing(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10, 9, 1)
    monkeypatch.setattr(checkpoint_lib.shutil, "disk_usage", lambda _: usage)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(StorageError, match="make room"):
        checkpointer.save(1, make_state()[0], {})


WORKER = """
import resource, sys
import jax
jax.config.update("jax_platforms", "cpu")
sys.path.insert(0, sys.argv[1])
from test_checkpoint import make_state
from sftjax.checkpoint import Checkpointer
from sftjax.errors import StorageError

checkpointer = Checkpointer(sys.argv[2], keep=2)
abstract = make_state()[1]
restored = checkpointer.restore(abstract)
step = restored.step if restored else 0
if sys.argv[3] == "full":
    checkpointer.save(1, make_state(1)[0], {"next": 1}, {"note": 1})
    checkpointer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, 256))
    try:
        checkpointer.save(2, make_state(2)[0], {"next": 2}, {"note": 2})
        checkpointer.wait()
    except StorageError as error:
        print(error)
        sys.exit(74)
    sys.exit(0)
print("ready", step, flush=True)
while True:
    step += 1
    checkpointer.save(step, make_state(step)[0], {"next": step}, {"note": step})
    print("began", step, flush=True)  # the one before is committed
"""


def worker(directory, mode):
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(directory), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_full_disk_leaves_what_was_there(tmp_path):
    process = worker(tmp_path, "full")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 74, out
    assert "could not be written" in out
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(make_state()[1])
        assert_same(restored.state, make_state(restored.step)[0])
        assert restored.step == 1
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name]


def test_kill_9_during_saves_loses_no_committed_step(tmp_path):
    rng, abstract, committed = random.Random(1), make_state()[1], 0
    for _ in range(5):
        process = worker(tmp_path, "save")
        line = process.stdout.readline()
        assert line == f"ready {int(line.split()[1])}\n" and int(line.split()[1]) >= committed
        for _ in range(rng.randrange(3, 8)):
            committed = max(committed, int(process.stdout.readline().split()[1]) - 1)
        time.sleep(rng.uniform(0, 0.08))  # somewhere in a save, or in the deletion of an old one
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].splitlines()
        committed = max([committed, *(int(text.split()[1]) - 1 for text in rest if len(text.split()) == 2)])
        with Checkpointer(tmp_path, keep=2) as checkpointer:
            assert checkpointer.latest_step() >= committed
            for step in checkpointer.all_steps():  # nothing half-deleted is listed
                restored = checkpointer.restore(abstract, step=step)
                assert restored.position == {"next": step}
                assert_same(restored.state, make_state(step)[0])
        assert not (tmp_path / "damaged").exists()
