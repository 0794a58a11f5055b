"""The main program as a user runs it, on a tiny model: figures, interruption, resume, devices, export."""

import ast
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sftjax import loading
from sftjax.weights import hf
from tests import tiny_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    tiny_run.model(folder / "model")
    tiny_run.conversations(folder / "chats.jsonl")
    return folder


def command(place, name, **fields):
    return tiny_run.command(place / "model", place / "chats.jsonl", place / name, **fields)


@pytest.fixture(scope="module")
def unbroken(place):
    """A run nobody disturbed: 20 steps, saved and evaluated every 5."""
    done = tiny_run.run(command(place, "unbroken", **STEADY))
    (place / "unbroken.stderr").write_text(done.stderr)
    return place / "unbroken"


def test_each_phase_is_named_with_its_time(place, unbroken):
    said = (place / "unbroken.stderr").read_text()
    for phase in (
        *("opening the model", "opening the data", "looking through the data", "settling the step"),
        *("reading the weights", "evaluating the untrained model", "compiling, and the first step", "evaluating"),
        *("exporting", "reading the export back", "verifying the export", "writing the report"),
    ):
        assert re.search(rf"^{phase}: [\d.]+ s$", said, re.M), phase


STEADY = {"train__max_steps": 20, "eval__eval_steps": 5, "train__neftune_noise_alpha": 5.0, "data__packing": "best_fit"}


def weights(run: Path) -> dict[str, bytes]:
    files = sorted((run / "export").glob("*.safetensors"))
    return {file.name: file.read_bytes() for file in files}


def test_a_run_leaves_what_it_promises(unbroken):
    for name in ("config.json", "environment.json", "preflight.json", "metrics.jsonl", "timing.jsonl", "samples.jsonl"):
        assert (unbroken / name).exists(), name
    summary = json.loads((unbroken / "summary.json").read_text())
    assert summary["difference_95"][1] < 0 and summary["eval_loss_after"] < summary["eval_loss_before"]
    assert summary["verification"]["passed"] and summary["verification"]["max_difference"] < 1e-5
    lines = tiny_run.lines(unbroken / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 21))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 5, 10, 15, 20]
    assert {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "mean_token_accuracy"} <= lines[1].keys()
    assert "<svg" in (unbroken / "report.html").read_text()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "README.md"):
        assert (unbroken / "export" / name).exists(), name
    assert json.loads((unbroken / "export" / "tokenizer_config.json").read_text())["chat_template"]  # where it came
    assert hf.load_config(unbroken / "export").vocab_size


def assert_same_run(first: Path, second: Path):
    assert (first / "metrics.jsonl").read_text() == (second / "metrics.jsonl").read_text()
    assert weights(first) == weights(second)


def wait_for_step(run: Path, step: int, process: subprocess.Popen):
    checkpoint = run / "checkpoints" / str(step)
    while not checkpoint.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def test_killed_and_resumed_is_bit_for_bit_the_unbroken_run(place, unbroken):
    line = command(place, "killed", **STEADY)
    process = subprocess.Popen(line, cwd=tiny_run.ROOT, env=tiny_run.environment(), stderr=subprocess.PIPE, text=True)
    wait_for_step(place / "killed", 10, process)
    process.kill()
    process.communicate()
    resumed = tiny_run.run([*line[:3], f"--resume={place / 'killed'}"])
    assert "continuing from step 1" in resumed.stdout
    assert_same_run(unbroken, place / "killed")


def test_sigterm_saves_and_says_so(place, unbroken):
    line = command(place, "stopped", **STEADY)
    process = subprocess.Popen(line, cwd=tiny_run.ROOT, env=tiny_run.environment(), stderr=subprocess.PIPE, text=True)
    wait_for_step(place / "stopped", 5, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    tiny_run.run(line)
    assert_same_run(unbroken, place / "stopped")


def test_a_state_that_waited_on_the_host_is_saved_and_resumed(place, unbroken):
    line = command(place, "offloaded", **STEADY, train__offload_optimizer=True)
    process = subprocess.Popen(line, cwd=tiny_run.ROOT, env=tiny_run.environment(), stderr=subprocess.PIPE, text=True)
    wait_for_step(place / "offloaded", 10, process)
    process.kill()
    process.communicate()
    assert "continuing from step 1" in tiny_run.run(line).stdout
    assert_same_run(unbroken, place / "offloaded")


def test_in_float16_the_loss_falls_and_a_killed_run_goes_on_with_its_loss_scale(place):
    line = command(place, "half", **STEADY, model__compute_dtype="float16", checkpoint__save_steps=5)
    process = subprocess.Popen(line, cwd=tiny_run.ROOT, env=tiny_run.environment(), stderr=subprocess.PIPE, text=True)
    wait_for_step(place / "half", 10, process)
    process.kill()
    process.communicate()
    assert "continuing from step" in tiny_run.run(line).stdout
    steps = [one for one in tiny_run.lines(place / "half" / "metrics.jsonl") if "loss" in one]
    assert [one["step"] for one in steps] == list(range(1, 21)) and steps[-1]["loss"] < steps[0]["loss"] - 1
    assert {one["loss_scale"] for one in steps} == {2.0**15}


@pytest.mark.parametrize(
    ("packing", "reduction"),
    [("best_fit", "token"), ("none", "token"), ("padding_free", "token"), ("best_fit", "example")],
)
def test_with_learning_rate_zero_the_logged_loss_is_the_score(place, packing, reduction):
    name = f"score-{packing}-{reduction}"
    tiny_run.run(
        command(
            place,
            name,
            train__learning_rate=0.0,
            train__num_train_epochs=1.0,
            train__loss_reduction=reduction,
            data__packing=packing,
            data__max_length=256,
            data__eval_fraction=0.0,
            export__enabled=False,
        )
    )
    logged = [line for line in tiny_run.lines(place / name / "metrics.jsonl") if "loss" in line]
    weight = np.array([line["loss_weight"] for line in logged])
    train_loss = np.sum(weight * [line["loss"] for line in logged]) / weight.sum()
    out = place / f"{name}.jsonl"
    data, model = str(place / "chats.jsonl"), str(place / "model")
    tiny_run.run([tiny_run.sys.executable, "tools/score.py", "--model", model, "--data", data, "--out", str(out)])
    scored = tiny_run.lines(out)
    nll, trained = (np.array([row[key] for row in scored]) for key in ("nll", "num_trained_tokens"))
    assert trained.sum() == logged[-1]["num_trained_tokens"]
    if reduction == "token":
        assert weight.sum() == trained.sum()
        assert train_loss == pytest.approx(nll.sum() / trained.sum(), rel=1e-5)
    else:
        assert weight.sum() == pytest.approx(len(scored), rel=1e-6)
        assert train_loss == pytest.approx(np.mean(nll / trained), rel=1e-5)


def test_eight_devices_follow_one(place, unbroken):
    plain = {**STEADY, "train__neftune_noise_alpha": 0.0, "train__batch_size": 8, "eval__num_samples": 0}
    tiny_run.run(command(place, "one", **plain))
    curves = {}
    for name, mesh in {"one": {}, "fsdp": {}, "both": {"mesh__tensor": 2}}.items():
        if name != "one":
            tiny_run.run(command(place, name, **plain, **mesh), devices=8)
        curves[name] = [line["loss"] for line in tiny_run.lines(place / name / "metrics.jsonl") if "loss" in line]
    np.testing.assert_allclose(curves["fsdp"], curves["one"], rtol=1e-4)
    np.testing.assert_allclose(curves["both"], curves["one"], rtol=1e-4)


def test_a_dry_run_leaves_nothing_and_says_the_same_twice(place):
    before = sorted(place.rglob("*"))
    first, second = (tiny_run.run([*command(place, "dry"), "--dry_run"]) for _ in range(2))
    assert "trainable parameters" in first.stdout and "steps" in first.stdout
    assert first.stdout == second.stdout and sorted(place.rglob("*")) == before
    blocked = tiny_run.run([*command(place, "chats.jsonl/dry"), "--dry_run"], code=74)
    assert "can't be written" in blocked.stderr


def test_the_ledger_of_a_sampled_preflight_is_completed_while_training_runs(place):
    fields = {"data__preflight_rows": 20, "train__num_train_epochs": 2.0, "export__enabled": False}
    done = tiny_run.run(command(place, "sampled", **fields))
    assert "a sample of 18 of 54 rows" in " ".join(done.stdout.split())
    ledger = json.loads((place / "sampled" / "preflight.json").read_text())
    assert ledger["complete"] and ledger["rows_read"] == ledger["rows_in_epoch"] == 54
    assert not any("a sample of" in warning for warning in ledger["warnings"])
    # the number of steps stays what the sample made it, whatever is read when the run goes on
    (place / "sampled" / "summary.json").unlink()
    again = tiny_run.run([*command(place, "sampled", **{**fields, "data__preflight_rows": 7}), "--dry_run"])
    assert f"{ledger['steps']} steps" in again.stdout
    assert json.loads((place / "sampled" / "preflight.json").read_text()) == ledger


def test_mistakes_are_one_line_with_their_code(place):
    bad = place / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n' * 20)
    only_questions = tiny_run.run(tiny_run.command(place / "model", bad, place / "r1"), code=65)
    assert "no_assistant" in only_questions.stderr or "nothing is trained" in only_questions.stderr
    missing = tiny_run.run(tiny_run.command(place / "nowhere", bad, place / "r2"), code=78)
    assert "nowhere" in missing.stderr
    (place / "file").write_text("")
    blocked = tiny_run.run(command(place, "file/run"), code=74)
    assert "can't be written" in blocked.stderr
    (place / "taken" / "export").mkdir(parents=True)
    (place / "taken" / "export" / "thesis.tex").write_text("")
    taken = tiny_run.run(command(place, "taken"), code=78)
    assert "not an earlier export" in taken.stderr and not (place / "taken" / "metrics.jsonl").exists()
    for done in (only_questions, missing, blocked, taken):
        assert "Traceback" not in done.stderr


def test_changed_settings_are_refused_by_name(place, unbroken):
    import shutil

    shutil.copytree(unbroken, place / "changed")
    (place / "changed" / "summary.json").unlink()
    refused = tiny_run.run(command(place, "changed", **{**STEADY, "train__learning_rate": 1e-3}), code=78)
    assert "train.learning_rate" in refused.stderr and "--allow=" in refused.stderr


def test_a_finished_run_is_not_changed_and_new_takes_another_folder(place, unbroken):
    same = tiny_run.run(command(place, "unbroken", **STEADY))
    assert "this run is finished" in same.stdout
    changed = {**STEADY, "train__learning_rate": 1e-3, "export__merge": True, "train__batch_size": 2**20}
    refused = tiny_run.run(command(place, "unbroken", **changed), code=78)
    assert "train.learning_rate: 0.003 -> 0.001" in refused.stderr and "export.merge" in refused.stderr
    assert "--new" in refused.stderr and len(refused.stderr.strip().splitlines()) == 1
    ledger = place / "counted.json"
    other = [*command(place, "unbroken", **changed), "--new", "--dry_run", f"--preflight={ledger}"]
    said = tiny_run.run(other).stdout
    assert f"run folder: {place / 'unbroken'}-2" in said
    assert "warning: by rule this needs" in said and "--config.train.gradient_accumulation_steps=" in said
    assert json.loads(ledger.read_text())["steps"] and not (place / "unbroken-2").exists()


def test_a_lora_run_is_exported_as_peft_wants_it(place):
    tiny_run.run(command(place, "lora", peft__method="lora", peft__r=4, train__max_steps=6, train__learning_rate=1e-2))
    export = place / "lora" / "export"
    settings = json.loads((export / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["peft_type"] == "LORA"
    assert (export / "adapter_model.safetensors").exists()
    assert 'model.generation_config = GenerationConfig.from_pretrained("PATH")' in (export / "README.md").read_text()
    summary = json.loads((place / "lora" / "summary.json").read_text())
    assert summary["verification"]["passed"]
    answers = place / "answers.jsonl"
    (place / "prompts.txt").write_text("the red cat sees\n")
    tiny_run.run(
        [
            tiny_run.sys.executable,
            "tools/generate.py",
            *("--model", str(place / "model"), "--adapter", str(export), "--prompts", str(place / "prompts.txt")),
            *("--out", str(answers), "--greedy", "--max_new_tokens", "8"),
        ]
    )
    assert tiny_run.lines(answers)[0]["num_tokens"] > 0


@pytest.fixture(scope="module")
def snug(place):
    """A model with room for four more tokens."""
    return tiny_run.model(place / "snug", vocab_size=904)


@pytest.mark.parametrize("method", ["none", "lora"])
def test_six_new_tokens_are_learnt_saved_and_stopped_on(place, snug, method):
    fields = {"model__chat_template": "six", "peft__method": method, "train__max_steps": 4, "train__batch_size": 8}
    run = place / f"six-{method}"
    done = tiny_run.run(tiny_run.command(snug, place / "chats.jsonl", run, **fields))
    assert "vocabulary: 904 -> 906 for <SOT>, <EOT>, <SOU>, <EOU>, <SOA>, <EOA>" in done.stdout
    if method == "none":
        loaded = loading.load_model(str(run / "export"))
        after = loaded.variables["params"]["embed_tokens"]["weight"]
    else:
        loaded = loading.load_model(str(snug), adapter=str(run / "export"))
        after = loaded.variables["adapter"]["embed_tokens"]["weight"]
        convert = [tiny_run.sys.executable, "tools/convert.py", "--from", str(snug), "--to", str(place / "six-merged")]
        tiny_run.run([*convert, "--adapter", str(run / "export")])
        assert hf.load_config(place / "six-merged").vocab_size == 906
    assert loaded.config.vocab_size == 906
    # not in the base's settings: it travels with the export, an adapter's too
    end = json.loads((run / "export" / "generation_config.json").read_text())["eos_token_id"]
    assert np.atleast_1d(end)[0] == loaded.tokenizer.stop_ids[0] == loaded.tokenizer.encode("<EOA>")[0] == 905
    # four of the rows only filled up the table; all six began at the mean of the 900 others, and were trained
    before = np.asarray(hf.load_params(snug, hf.load_config(snug), np.float32)["embed_tokens"]["weight"])
    moved = np.abs(np.asarray(after)[900:] - np.mean(before[:900], axis=0))
    assert np.all(moved[:2].max(axis=1) < 0.05) and np.all(moved[2:].max(axis=1) > 0) and moved.max() < 0.05
    assert np.abs(before[900:] - np.mean(before[:900], axis=0)).max() > 0.1


OWN = (
    "{%- for m in messages -%}<|{{ m['role'] }}|>{{ m['content'] }}<|fin|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


@pytest.mark.parametrize("method", ["none", "lora"])
def test_a_template_of_ones_own_is_trained_with_the_tokens_that_the_refusal_proposes(place, snug, method):
    (place / "own.jinja").write_text(OWN)
    fields = {"model__chat_template": str(place / "own.jinja"), "peft__method": method}
    fields |= {"train__max_steps": 4, "train__batch_size": 8, "model__frozen_dtype": "float32"}
    run = place / f"own-{method}"
    command = tiny_run.command(snug, place / "chats.jsonl", run, **fields)
    told = tiny_run.run(command, code=78).stderr
    proposed = re.search(r"set model.add_tokens=(\(.*?\))", told)[1]
    command.append(f"--config.model.add_tokens={proposed}")
    done = tiny_run.run(command)
    names = ast.literal_eval(proposed)
    assert set(names) == {"<|system|>", "<|user|>", "<|assistant|>", "<|fin|>"}
    assert f"vocabulary: 904 -> 904 for {', '.join(names)}" in done.stdout
    # nobody of these conversations is the system
    assert "no sample holds <|system|>: new tokens, whose rows stay as they begin" in done.stdout.replace("\n", " ")
    saved = {} if method == "none" else {"adapter": str(run / "export")}
    loaded = loading.load_model(str(run / "export" if method == "none" else snug), **saved)
    end = loaded.tokenizer.encode("<|fin|>")
    assert end == [900 + names.index("<|fin|>")] and loaded.tokenizer.stop_ids[0] == end[0]
    rows = loaded.variables["adapter" if saved else "params"]["embed_tokens"]["weight"]
    before = np.asarray(hf.load_params(snug, hf.load_config(snug), np.float32)["embed_tokens"]["weight"])
    moved = np.abs(np.asarray(rows)[900:904] - np.mean(before[:900], axis=0)).max(axis=1)
    assert all((moved > 1e-5) == (np.array(names) != "<|system|>")) and moved.max() < 0.05
    refused = tiny_run.run([*command, "--config.model.add_tokens=('<|fin|>','<|user|>')"], code=78).stderr
    assert "model.add_tokens" in refused and "Traceback" not in refused


def test_a_base_model_without_a_template_trains_on_text_and_refuses_conversations(place, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(place / "model", base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = tmp_path / "texts.jsonl"
    rows = [" ".join(m["content"] for m in row["messages"]) for row in tiny_run.lines(place / "chats.jsonl")]
    texts.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    fields = {"train__max_steps": 2, "eval__num_samples": 1}
    tiny_run.run(tiny_run.command(base, texts, tmp_path / "run", **fields))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["verification"]["max_difference"] < 1e-3
    refused = tiny_run.run(tiny_run.command(base, place / "chats.jsonl", tmp_path / "no", **fields), code=78)
    assert "set model.chat_template" in refused.stderr and "Traceback" not in refused.stderr


def test_a_gguf_file_is_trained(place, tmp_path):
    file = tmp_path / "model.gguf"
    tool = [sys.executable, str(tiny_run.ROOT / "tools" / "convert.py"), "--from", str(place / "model")]
    tiny_run.run([*tool, "--to", str(file)])
    fields = {"train__max_steps": 2, "eval__num_samples": 0}
    tiny_run.run(tiny_run.command(file, place / "chats.jsonl", tmp_path / "run", **fields))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["verification"]["max_difference"] < 1e-3
