"""Sweeps: which runs a line means, that they are trained once each, and the page that compares them."""

import json
import re
import shutil
import subprocess

import pytest

from sftjax import config as config_lib
from sftjax import sweep
from sftjax.errors import ConfigError, DataError, Diverged
from sftjax.stopping import StopRequested
from tests import tiny_run
from tests.test_report import Page, make_run


def settings(tmp_path, **fields):
    config = config_lib.defaults()
    config.model.path, config.data.train, config.run_dir = "model", ("chats.jsonl",), str(tmp_path / "sweep")
    config.update_from_flattened_dict(fields)
    return config


def test_a_line_means_every_combination():
    config = config_lib.defaults()
    grid = sweep.parse("train.learning_rate=1e-5|2e-5; peft.r=8|16", config)
    assert [tuple(run.values()) for run in grid] == [(1e-5, 8), (1e-5, 16), (2e-5, 8), (2e-5, 16)]
    assert sweep.names(grid)[0] == "learning_rate=1e-05,r=8"
    typed = sweep.parse(
        "data.shuffle=false;train.max_steps=7;peft.target_modules='q_proj','v_proj'|'all-linear'", config
    )
    assert [list(run.values()) for run in typed] == [[False, 7, ("q_proj", "v_proj")], [False, 7, ("all-linear",)]]
    assert sweep.names(typed)[0] == "shuffle=False,max_steps=7,target_modules=q_proj_v_proj"
    same_leaf = sweep.parse("train.batch_size=1|2;eval.batch_size=4", config)
    assert sweep.names(same_leaf)[1] == "train.batch_size=2,eval.batch_size=4"
    files = sweep.parse("model.path=/a/b|/a_b", config)
    assert len(set(sweep.names(files))) == 2 and not any("/" in name for name in sweep.names(files))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train.learning_rat=1e-5", "did you mean 'train.learning_rate'"),
        ("train.max_steps=1.5", "type"),
        ("data.shuffle=maybe", "type"),
        ("train.max_steps=1|1", "there twice"),
        ("train.max_steps=1;train.max_steps=2", "given twice"),
        ("run_dir=a|b", "folder of its own"),
        ("train.max_steps", "FIELD=VALUE"),
        (";", "empty"),
    ],
)
def test_what_cannot_be_is_one_clear_line(line, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        sweep.parse(line, config_lib.defaults())


@pytest.fixture
def trained(monkeypatch):
    """Stands for training: leaves a finished run, or raises what `trained.raises` says for a value of max_steps."""

    class Trained(list):
        raises: dict = {}  # noqa: RUF012

    calls = Trained()

    def run(config, *, allow=(), dry_run=False):
        calls.append(config.train.max_steps)
        folder = sweep.runs.RunFolder.open(config.run_dir)
        folder.write_json("config.json", json.loads(config_lib.to_json(config)))
        folder.release()
        if error := calls.raises.get(config.train.max_steps):
            raise error
        folder.write_json(
            "summary.json", {"steps": 1, "eval_loss_before": 3.0, "eval_loss_after": config.train.max_steps}
        )

    monkeypatch.setattr(sweep.train, "run", run)
    monkeypatch.setattr(sweep.config_lib, "check", lambda config, num_devices: None)
    return calls


def test_a_failed_run_is_noted_and_the_others_go_on(tmp_path, trained):
    trained.raises = {2: Diverged("not finite"), 3: DataError("row 7")}
    config = settings(tmp_path)
    assert sweep.run(config, "train.max_steps=5|2|3|4") == Diverged.exit_code
    summary = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [run["status"] for run in summary["runs"]] == ["done", "diverged", "failed", "done"]
    assert summary["best"] == "max_steps=4" and summary["runs"][1]["error"] == "not finite"
    # what diverged would diverge again, and is only tried once its folder is gone; what failed is tried again
    trained.raises = {}
    trained.clear()
    assert sweep.run(config, "train.max_steps=5|2|3|4") == Diverged.exit_code
    assert 2 not in trained and 3 in trained
    shutil.rmtree(tmp_path / "sweep" / "max_steps=2")
    assert sweep.run(config, "train.max_steps=5|2|3|4") == 0
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["best"] == "max_steps=2"


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path, trained):
    sweep.run(settings(tmp_path), "train.max_steps=1|2")
    broken = {"steps": 1, "eval_loss_before": 3.0, "eval_loss_after": float("nan"), "difference_95": [float("nan")] * 2}
    results = [{"name": f"max_steps={steps}", "settings": {"train.max_steps": steps}} for steps in (1, 2)]
    (tmp_path / "sweep" / "max_steps=1" / "summary.json").write_text(json.dumps(broken))
    sweep.write(str(tmp_path / "sweep"), results)
    text = (tmp_path / "sweep" / "sweep.json").read_text()
    assert json.loads(text)["best"] == "max_steps=2" and "NaN" not in text


def test_a_stopped_sweep_ends_and_goes_on(tmp_path, trained):
    trained.raises = {2: StopRequested("saved")}
    with pytest.raises(StopRequested):
        sweep.run(settings(tmp_path), "train.max_steps=1|2|3")
    assert trained == [1, 2]
    runs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
    assert [run["status"] for run in runs] == ["done", "waiting", "waiting"]
    trained.raises = {}
    assert sweep.run(settings(tmp_path), "train.max_steps=1|2|3") == 0


def test_a_finished_run_with_other_settings_is_not_taken_for_this_one(tmp_path, trained):
    sweep.run(settings(tmp_path), "train.max_steps=1|2")
    with pytest.raises(ConfigError, match=r"train\.learning_rate: 2e-05 -> 0\.5"):
        sweep.run(settings(tmp_path, **{"train.learning_rate": 0.5}), "train.max_steps=1|2")


def test_nothing_is_trained_if_one_of_the_runs_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.max_length=100"):
        sweep.run(settings(tmp_path), "data.max_length=128|100")
    assert not (tmp_path / "sweep").exists()


def test_the_page_compares_them_offline(tmp_path):
    results = []
    for index in range(10):
        name = f"learning_rate={index}"
        folder = make_run(tmp_path / "sweep" / name)
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps({**summary, "eval_loss_after": 2 + index / 10}))
        (folder / "doctor.json").write_text(
            json.dumps({"findings": [{"rule": "some_rule", "evidence": "", "remedy": ""}]})
        )
        results.append({"name": name, "settings": {"train.learning_rate": float(index)}})
    results.append(
        {"name": "broken", "settings": {"train.learning_rate": 1e9}, "status": "diverged", "error": "<b>NaN"}
    )
    sweep.write(str(tmp_path / "sweep"), results)
    text = (tmp_path / "sweep" / "sweep.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 4 and page.tags.count("tr") == 12
    assert "learning_rate%3D3/report.html" in page.links and all("://" not in link for link in page.links)
    assert "some rule" in text and "&lt;b&gt;NaN" in text and "3 runs with the highest losses are left out" in text
    assert re.findall(r'class="best"', text) == ['class="best"']
    if browser := shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome"):
        shot = tmp_path / "page.png"
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--screenshot={shot}",
            "--window-size=1280,1100",
        ]
        command += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'sweep' / 'sweep.html'}"]
        subprocess.run(command, capture_output=True, timeout=90)
        assert shot.stat().st_size > 20_000


def test_a_sweep_of_the_main_program(tmp_path):
    tiny_run.model(tmp_path / "model")
    tiny_run.conversations(tmp_path / "chats.jsonl")
    # too few steps for five bad ones in a row: it is the held-out loss that gives the diverged run away
    fields = {"train__max_steps": 6, "eval__num_samples": 0, "export__enabled": False, "log__tensorboard": False}
    line = tiny_run.command(tmp_path / "model", tmp_path / "chats.jsonl", tmp_path / "sweep", **fields)
    line.append("--sweep=train.learning_rate=1e-4|1e30|3e-3")
    done = tiny_run.run(line, code=76)
    assert "lowest held-out loss: learning_rate=0.003" in done.stdout and "learning_rate=1e+30 failed" in done.stdout
    summary = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [run["status"] for run in summary["runs"]] == ["done", "diverged", "done"]
    figures = summary["runs"][2]["figures"]
    run = json.loads((tmp_path / "sweep" / "learning_rate=0.003" / "summary.json").read_text())
    assert figures["eval_loss"] == run["eval_loss_after"] < figures["eval_loss_before"]
    written = (tmp_path / "sweep" / "learning_rate=0.003" / "metrics.jsonl").read_bytes()
    again = tiny_run.run(line, code=76)
    assert again.stdout.count("this run is finished") == 2 and "it diverged before" in again.stdout
    assert (tmp_path / "sweep" / "learning_rate=0.003" / "metrics.jsonl").read_bytes() == written
    assert "--sweep goes with --config" in tiny_run.run([*line[:3], "--resume=x", "--sweep=a=1"], code=78).stderr
