"""The run folder, its lock, stopping by signal, and the refusal to resume what has changed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from sftjax import lock as lock_lib
from sftjax import runs
from sftjax.errors import ConfigError, StorageError
from sftjax.runs import RunFolder, changes, check_resume, cut_lines, environment, redact


def spawn(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


# --- folder -----------------------------------------------------------------------------------------------------------


def test_open_makes_the_folder_and_writes_json_in_one_piece(tmp_path):
    with RunFolder.open(tmp_path / "a" / "b") as run:
        assert run.read_json("config.json") is None
        run.write_json("config.json", {"seed": 1})
        assert run.read_json("config.json") == {"seed": 1}
        assert sorted(os.listdir(run.path)) == ["config.json", "lock.json"]
    assert sorted(os.listdir(run.path)) == ["config.json"]


def test_a_file_in_the_way_is_refused_with_exit_code_74(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StorageError, match="can't be written") as error:
            RunFolder.open(path)
        assert error.value.exit_code == 74


def test_broken_json_names_the_file(tmp_path):
    with RunFolder.open(tmp_path) as run:
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(StorageError, match=r"config\.json"):
            run.read_json("config.json")


def test_a_torn_file_that_can_be_made_again_is_put_aside_but_not_by_a_dry_run(tmp_path, capsys):
    (tmp_path / "summary.json").write_text("{")
    assert RunFolder.open(tmp_path, dry_run=True).read_derived("summary.json") is None
    assert os.listdir(tmp_path) == ["summary.json"]
    with RunFolder.open(tmp_path) as run:
        assert run.read_derived("summary.json") is None
    assert os.listdir(tmp_path) == ["summary.json.damaged"]
    assert "summary.json: can't be read" in capsys.readouterr().out


def test_remote_folder_works_through_fsspec():
    with RunFolder.open("memory://bucket/run") as run:
        run.write_json("config.json", {"a": 1})
        assert run.read_json("config.json") == {"a": 1}
        with pytest.raises(StorageError, match="in use"):
            RunFolder.open("memory://bucket/run")


def test_cut_back_removes_later_steps_and_a_torn_line(tmp_path):
    # kept: 1 2 2(eval)    cut: 3, and the half-written 4
    lines = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.5},
        {"step": 2, "eval_loss": 1.4},
        {"step": 3, "loss": 1.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path = tmp_path / "metrics.jsonl"
    path.write_text(text + '{"step": 4, "lo')
    with RunFolder.open(tmp_path) as run:
        run.cut_back(2)
        assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:3]
        before = path.stat().st_ino
        run.cut_back(2)
        assert path.stat().st_ino == before  # nothing to do, nothing rewritten
        run.cut_back(None)
        assert path.read_text() == ""
    assert cut_lines(str(tmp_path / "none.jsonl"), 0) == 0


# --- lock -------------------------------------------------------------------------------------------------------------

HOLD = """
import sys, os, time
from sftjax.lock import FolderLock
lock = FolderLock(sys.argv[1])
if len(sys.argv) > 2 and os.fork() == 0:
    time.sleep(30)  # a forked worker that outlives its parent
print("held", flush=True)
sys.stdin.read()
time.sleep(30)
"""


def test_second_writer_is_refused_and_told_who_holds_it(tmp_path):
    holder = spawn(HOLD, tmp_path)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match=rf"process {holder.pid} on {socket.gethostname()}"):
            RunFolder.open(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    with RunFolder.open(tmp_path) as run:  # kill -9 leaves the file, not the lock
        assert str(holder.pid) in run.recovered


def test_second_opening_in_one_process_is_refused(tmp_path):
    with RunFolder.open(tmp_path), pytest.raises(StorageError, match="in use"):
        RunFolder.open(tmp_path)
    RunFolder.open(tmp_path).release()


def test_forked_worker_does_not_keep_the_lock(tmp_path):
    holder = spawn(HOLD, tmp_path, "fork")
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    RunFolder.open(tmp_path).release()


def test_lock_of_another_host_counts_while_its_heart_beats(tmp_path):
    path = tmp_path / "lock.json"
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "then"}))
    with pytest.raises(StorageError, match="elsewhere"):
        RunFolder.open(tmp_path)
    old = time.time() - 2 * lock_lib.STALE_S
    os.utime(path, (old, old))
    with RunFolder.open(tmp_path) as run:
        assert "elsewhere" in run.recovered


# --- signals ----------------------------------------------------------------------------------------------------------

PHASES = """
import hashlib, os, sys, time
from sftjax.errors import exit_with_message
from sftjax.stopping import StopRequested, StopSignal

phase = sys.argv[1]

def main():
    with StopSignal() as stop:
        if phase in ("set-up", "export"):
            with stop.nothing_to_lose(phase):
                print("ready", flush=True)
                time.sleep(30)
        if phase == "compile":  # a long call into C, during which no Python handler can run
            with stop.nothing_to_lose(phase):
                print("ready", flush=True)
                hashlib.pbkdf2_hmac("sha256", b"x", b"y", 200_000_000)
        if phase == "stuck":
            print("ready", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"x", b"y", 200_000_000)
        print("ready", flush=True)
        for step in range(1, 1000):
            time.sleep(0.02)
            if phase == "eval":
                for batch in range(1000):
                    time.sleep(0.02)
                    if stop.requested:
                        break
            if stop.reached(step):
                print("saved", step, flush=True)
                raise StopRequested(f"stopped after step {step}; saved")

exit_with_message(main)
"""


@pytest.mark.parametrize(
    "phase, number, saved",
    [
        ("set-up", signal.SIGTERM, False),
        ("compile", signal.SIGTERM, False),
        ("export", signal.SIGINT, False),
        ("train", signal.SIGTERM, True),
        ("train", signal.SIGINT, True),
        ("eval", signal.SIGTERM, True),
    ],
)
def test_signal_in_each_phase_leaves_with_75(phase, number, saved):
    process = spawn(PHASES, phase)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 75, err
    assert ("saved" in out) == saved
    assert "Traceback" not in err
    if not saved:
        assert f"while {phase}" in err and "same command" in err


def test_second_signal_leaves_at_once_even_from_native_code():
    process = spawn(PHASES, "stuck")
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert "saving" in process.stderr.readline() + process.stderr.readline()
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 75 and time.monotonic() - started < 5


# --- what may change --------------------------------------------------------------------------------------------------

CONFIG = {
    "seed": 0,
    "run_dir": "runs/a",
    "data": {"train": ["a.jsonl"], "workers": 0, "max_length": 128},
    "train": {"learning_rate": 1e-4, "optim": "adamw"},
    "peft": {"r": 8, "rank_pattern": {}},
    "log": {"tensorboard": True},
}
PRINTS = {"data": "d1", "template": "t1", "tokenizer": "k1", "weights": "w1"}


def edited(**fields):
    config = json.loads(json.dumps(CONFIG))
    for path, value in fields.items():
        *sections, name = path.split("__")
        node = config
        for section in sections:
            node = node[section]
        node[name] = value
    return config


def test_same_run_goes_on_silently():
    assert check_resume(CONFIG, edited(), PRINTS, PRINTS) == []


def test_harmless_changes_are_listed_and_pass():
    now = edited(run_dir="runs/b", data__workers=2, log__tensorboard=False)
    assert len(check_resume(CONFIG, now, PRINTS, PRINTS)) == 3


@pytest.mark.parametrize(
    "now, prints, name",
    [
        (edited(train__learning_rate=2e-4), PRINTS, "train"),
        (edited(data__train=["b.jsonl"]), PRINTS, "data"),
        (edited(seed=1), PRINTS, "data"),
        (CONFIG, {**PRINTS, "data": "d2"}, "data"),
        (CONFIG, {**PRINTS, "template": "t2"}, "template"),
        (CONFIG, {**PRINTS, "tokenizer": "k2"}, "tokenizer"),
        (CONFIG, {**PRINTS, "weights": "w2"}, "weights"),
    ],
)
def test_other_changes_need_their_name(now, prints, name):
    with pytest.raises(ConfigError, match=f"--allow={name}") as error:
        check_resume(CONFIG, now, PRINTS, prints)
    assert " -> " in str(error.value) and error.value.exit_code == 78
    assert check_resume(CONFIG, now, PRINTS, prints, allow=[name])


@pytest.mark.parametrize(
    "now", [edited(peft__r=16), edited(peft__rank_pattern={"q_proj": 4}), edited(train__optim="lion")]
)
def test_changes_of_the_state_cannot_be_allowed(now):
    with pytest.raises(ConfigError, match="can't be continued"):
        check_resume(CONFIG, now, PRINTS, PRINTS, allow=["peft", "train"])


def test_field_of_a_newer_version_is_no_change():
    assert changes(CONFIG, edited(train__brand_new=3)) == []


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_secrets_are_blanked_and_ordinary_tokens_are_not():
    secret = "hf_" + "a1B2" * 8
    config = {
        "hub_token": "anything",
        "api_key": "x",
        "note": f"use {secret} here",
        "url": "https://me:pw@host/x",
        "nested": [{"password": "p"}],
        "model": {"end_of_turn": "<|im_end|>", "pad_token": "<pad>", "num_tokens": 5, "tokenizer": "path"},
    }
    text = json.dumps(redact(config))
    assert "anything" not in text and secret not in text and "me:pw" not in text and '"p"' not in text
    assert redact(config)["model"] == config["model"]


def test_environment_has_versions_devices_and_fingerprints():
    found = environment(PRINTS)
    assert found["versions"]["jax"] and found["device_count"] >= 1 and found["fingerprints"] == PRINTS
    assert socket.gethostname() not in json.dumps(found)


def test_a_disk_without_room_is_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "state").write_bytes(b"x" * 1000)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    runs.check_space(str(tmp_path), 6000, "checkpoints")
    with pytest.raises(StorageError, match=r"make room, keep fewer checkpoints \(checkpoint.save_total_limit\)"):
        runs.check_space(str(tmp_path), 6001, "checkpoints")
