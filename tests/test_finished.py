"""Which folder a run goes into, and what of a finished run may differ."""

import json
import os
import shutil

import pytest

from sftjax import config as config_lib
from sftjax import finished, paths, runs
from sftjax.errors import ConfigError


def settings(**fields):
    config = config_lib.defaults()
    config.update_from_flattened_dict({"model.path": "model", "data.train": ("chats.jsonl",)})
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in fields.items()})
    return json.loads(config_lib.to_json(config))


DEFAULTS = json.loads(config_lib.to_json(config_lib.defaults()))


def write_run(path, done=True, **fields):
    with runs.RunFolder.open(path) as folder:
        folder.write_json("config.json", settings(**fields))
        folder.write_json("environment.json", {"working_folder": os.getcwd(), "fingerprints": {"data": "a"}})
        if done:
            folder.write_json(finished.SUMMARY, {"steps": 1})
    return runs.RunFolder.open(path, dry_run=True)


def test_a_finished_run_is_what_was_asked_for_or_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_run("runs/one")
    finished.check(folder, settings(run_dir="./runs/one"), DEFAULTS, {"data": "a"})
    for change in ({"seed": 1}, {"export__merge": True}, {"data__train": ("other.jsonl",)}, {"mesh__data": 2}):
        with pytest.raises(ConfigError, match=next(iter(change)).replace("__", r"\.")) as refusal:
            finished.check(folder, settings(**change), DEFAULTS)
        assert "--new" in str(refusal.value)
    with pytest.raises(ConfigError, match="the data"):
        finished.check(folder, settings(), DEFAULTS, {"data": "b"})


def test_a_field_that_came_since_had_its_default(tmp_path):
    folder = write_run(tmp_path / "old")
    saved = folder.read_json("config.json")
    del saved["train"]["max_grad_norm"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(saved))
    finished.check(folder, settings(), DEFAULTS)
    with pytest.raises(ConfigError, match=r"train\.max_grad_norm"):
        finished.check(folder, settings(train__max_grad_norm=7.0), DEFAULTS)


def test_the_same_files_spelled_otherwise_are_no_change(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = write_run("runs/one")
    monkeypatch.chdir(tmp_path / "elsewhere")
    finished.check(folder, settings(model__path="../model", data__train=("../chats.jsonl",)), DEFAULTS)
    finished.check(folder, settings(model__path=str(tmp_path / "model"), data__train=("../chats.jsonl",)), DEFAULTS)
    with pytest.raises(ConfigError, match=r"data\.train"):
        finished.check(folder, settings(model__path="../model", data__train=("../other.jsonl",)), DEFAULTS)


def test_new_takes_the_first_folder_that_is_free_or_goes_on_with_these_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert finished.next_folder("runs/one", settings()) == "runs/one"
    assert not (tmp_path / "runs").exists()
    write_run("runs/one")
    assert finished.next_folder("runs/one/", settings()) == "runs/one-2"
    write_run("runs/one-2", done=False, seed=5)  # interrupted
    assert finished.next_folder("runs/one", settings(seed=5)) == "runs/one-2"
    assert finished.next_folder("runs/one", settings()) == "runs/one-3"
    (tmp_path / "runs" / "one-3").write_text("a file of somebody's")
    (tmp_path / "runs" / "one-4").mkdir()
    assert finished.next_folder("runs/one", settings()) == "runs/one-4"
    (tmp_path / "runs" / "one-4" / "thesis.tex").touch()
    assert finished.next_folder("runs/one", settings()) == "runs/one-5"


def test_a_run_s_files_are_found_from_anywhere_even_when_all_has_been_moved(tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "model").mkdir(parents=True)
    monkeypatch.chdir(project)
    (project / "chats.jsonl").touch()
    write_run("runs/one", run_dir="runs/one", data__train=({"path": "*.jsonl"}, "gone.jsonl"))
    shutil.move(project, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    config = config_lib.of_run("moved/runs/one")
    assert config.model.path == str(tmp_path / "moved" / "model")
    assert config.data.train[0]["path"] == str(tmp_path / "moved" / "*.jsonl") and config.data.train[1] == "gone.jsonl"
    with pytest.raises(ConfigError, match="not a run's folder"):
        config_lib.of_run("moved/model")
    (tmp_path / "moved" / "model" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ConfigError, match="not the configuration of a run"):
        config_lib.of_run("moved/model")


def test_a_tilde_behind_a_flag_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert paths.with_home(["tool", "--config.model.path=~/m"]) == ["tool", "--config.model.path=/home/me/m"]
    others = ["--out", "~/kept", "--note=a~/b", "--x=~"]
    assert paths.with_home(others) == others
