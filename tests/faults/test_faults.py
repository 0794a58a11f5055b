"""Faults at named moments, one after the other: what was saved is never lost, and the same command ends the run."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.faults.harness import Place, copy, differences, leftovers, outcome


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("faults"))
    yield place
    place.close()


@pytest.fixture(scope="module")
def unbroken(place):
    """A run nobody disturbed."""
    run = place.folder / "unbroken"
    ended = place.run(run)
    assert ended.code == 0, ended.text
    assert not leftovers(run)
    return outcome(run)


@pytest.fixture(scope="module")
def stopped(place, unbroken):
    """A run that was killed behind its second checkpoint (step 3 of 6)."""
    run = place.folder / "stopped"
    assert place.run(run, fault={"at": "sftjax.step", "match": "5", "do": "SIGKILL"}).code == -9
    return run


def assert_ends_like(place, run, unbroken, **options):
    ended = place.run(run, **options)
    assert ended.code == 0, ended.text
    assert differences(outcome(run), unbroken) == [] and leftovers(run) == []
    return ended


@pytest.mark.parametrize("name", ["export/README.md", "doctor.json", "report.html", "summary.json"])
def test_killed_at_the_end_it_is_completed_by_the_same_command(place, unbroken, name):
    run = place.folder / f"end-{name.replace('/', '-')}"
    if not (place.folder / "trained").exists():  # every step done; only the end is left
        ended = place.run(
            place.folder / "trained", fault={"at": "sftjax.file renaming", "match": "adapter_model", "do": "exit"}
        )
        assert ended.code == 99, ended.text
    shutil.copytree(place.folder / "trained", run)
    ended = place.run(run, fault={"at": "sftjax.file renaming", "match": f"/{name}", "do": "SIGKILL"})
    assert ended.code == -9 and not (run / "summary.json").exists()
    assert_ends_like(place, run, unbroken)


@pytest.mark.parametrize("name", ["report.html", "export/README.md", "verification.json"])
def test_a_finished_run_that_lost_a_part_makes_it_again(place, unbroken, name):
    run = copy(place.folder / "unbroken", f"lost-{name.replace('/', '-')}")
    (run / name).write_text("")
    ended = assert_ends_like(place, run, unbroken)
    assert name in ended.text and (run / name).stat().st_size


def test_a_frozen_base_that_was_changed_anywhere_is_refused(place, stopped):
    model = place.folder / "changed-model"
    shutil.copytree(place.folder / "model", model)
    weights = load_file(model / "model.safetensors")
    changed = {name: value.copy() for name, value in weights.items()}
    name = next(name for name in changed if "down_proj" in name)
    changed[name][-1, -1] += 1
    save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
    ended = place.run(copy(stopped, "other-base"), model=model)
    assert ended.code == 78 and "--allow=weights" in ended.error + ended.text
    assert "Traceback" not in ended.text


@pytest.mark.parametrize("name", ["config.json", "environment.json", "preflight.json"])
def test_a_deleted_file_turns_no_check_off(place, stopped, name):
    run = copy(stopped, f"without-{name}")
    (run / name).unlink()
    ended = place.run(run, train__learning_rate=1e-5)
    assert ended.code == 78 and "train.learning_rate" in ended.text and "Traceback" not in ended.text


def test_deleted_checkpoints_are_no_quiet_restart(place, stopped):
    run = copy(stopped, "without-checkpoints")
    shutil.rmtree(run / "checkpoints")
    ended = place.run(run)
    assert ended.code == 74 and "committed.json" in ended.error


def test_a_deleted_log_is_noticed(place, stopped):
    run = copy(stopped, "without-log")
    (run / "metrics.jsonl").unlink()
    ended = place.run(run)
    assert ended.code == 78 and "--allow=logs" in ended.error and "metrics.jsonl" in ended.error


@pytest.mark.parametrize("name", ["evaluation-0.npz", "config.json", "environment.json", "preflight.json"])
def test_files_that_can_be_made_again_are(place, stopped, unbroken, name):
    run = copy(stopped, f"truncated-{name}")
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: len(content) // 2])
    assert_ends_like(place, run, unbroken)


@pytest.mark.parametrize("number", ["SIGHUP", "SIGTERM", "SIGINT"])
def test_a_signal_saves_the_step_and_says_so(place, unbroken, number):
    run = place.folder / number
    ended = place.run(run, fault={"at": "sftjax.step", "match": "4", "do": number})
    assert ended.code == 75 and "stopped after step 4" in ended.text
    assert_ends_like(place, run, unbroken)


@pytest.mark.parametrize("fault", ["enospc", "eio"])
def test_a_disk_that_fails_is_one_line(place, stopped, unbroken, fault):
    run = copy(stopped, f"disk-{fault}")
    ended = place.run(run, fault={"at": "sftjax.file renaming", "match": "evaluation-6.npz", "do": fault})
    assert ended.code == 74 and "evaluation-6.npz: can't be written" in ended.error and "Traceback" not in ended.text
    assert_ends_like(place, run, unbroken)


def test_what_is_sealed_is_what_is_meant(place, stopped):
    newest = max(
        (path for path in (stopped / "checkpoints").iterdir() if path.name.isdigit()), key=lambda p: int(p.name)
    )
    meta = json.loads((newest / "meta" / "metadata").read_text())
    assert meta["identity"]["settings"]["train"]["max_steps"] == 6
    assert set(meta["identity"]["fingerprints"]) == {"data", "template", "tokenizer", "weights", "base"}
    assert meta["lines"]["metrics.jsonl"] == int(newest.name) + 1 + (int(newest.name) >= 3)
    assert np.char.isalnum(meta["identity"]["fingerprints"]["base"])
