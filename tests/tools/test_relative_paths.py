"""Every tool that takes a path, given relative ones in another folder than the run's command was given in."""

import json
import os
import subprocess
import sys

import pytest

from tests import tiny_run

# Runs command lines one after the other in one process, as if each were alone: jax starts and compiles once.
DRIVER = """
import json, runpy, sys
root, *_ = sys.argv[1:]
codes = []
for tool, *arguments in json.loads(sys.stdin.read()):
    sys.argv = [f"{root}/tools/{tool}.py", *arguments]
    print("$", *sys.argv, file=sys.stderr, flush=True)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        codes.append(None)
    except SystemExit as end:
        codes.append(end.code)
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a model, data, a finished run of an adapter, and a folder to work in beside them."""
    folder = tmp_path_factory.mktemp("project")
    tiny_run.model(folder / "model")
    tiny_run.conversations(folder / "chats.jsonl", 30)
    fields = {"peft__method": "lora", "peft__r": 4, "train__max_steps": 2, "eval__num_samples": 1}
    line = tiny_run.command("model", "chats.jsonl", "runs/one", **fields)
    line[3] = f"--config={tiny_run.ROOT}/configs/smollm2_135m.py"
    done = subprocess.run(line, cwd=folder, env=tiny_run.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder / "desk").mkdir()
    return folder


def test_the_tools_take_relative_paths_from_any_folder(project):
    (project / "desk" / "questions.txt").write_text("the red cat?\n")
    (project / "desk" / "rows.jsonl").write_text('{"prompt": "the red cat?", "expected": "yes"}\n')
    run, model, adapter = "../runs/one", ["--model", "../model"], ["--adapter", "../runs/one/export"]
    data, few = ["--data", "../chats.jsonl"], ["--max_new_tokens", "4"]
    lines = [
        ["convert", "--from", run, "--to", "made/newest"],
        ["convert", "--from", f"{run}/checkpoints/2", "--to", "made/of_a_step"],
        ["convert", "--from", "../model", *adapter, "--to", "made/merged"],
        ["convert", "--from", "made/merged", "--to", "made/merged.gguf"],
        ["generate", *model, *adapter, "--prompts", "questions.txt", "--out", "made/answers.jsonl", *few],
        ["score", *model, *adapter, *data, "--out", "made/scores.jsonl"],
        ["evaluate", "--run", run, "--data", "rows.jsonl", "--scorer", "exact", "--out", "made/evaluated.jsonl", *few],
        ["preview", *model, *data, "--out", "made/pages/page.html", "--limit", "2"],
        ["doctor", run],
        ["synthesize", "distill", *model, "--input", "rows.jsonl", "--output", "made/synthetic", *few],
        ["plan", "--config=../config.py", "--topology=cpu", f"--preflight={run}/preflight.json"],
    ]
    (project / "config.py").write_text((tiny_run.ROOT / "configs" / "smollm2_135m.py").read_text())
    lines[-1] += ["--out=made/p/plan.json", "--config.model.path=../model", "--config.data.max_length=128"]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tiny_run.ROOT)],
        input=json.dumps(lines),
        cwd=project / "desk",
        env=tiny_run.environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0] * len(lines), f"{codes}\n{done.stderr}"
    for name in ("newest", "of_a_step", "merged"):
        assert (project / "desk" / "made" / name / "model.safetensors").is_file()
    for name in ("merged.gguf", "answers.jsonl", "scores.jsonl", "evaluated.jsonl", "pages/page.html", "p/plan.json"):
        assert (project / "desk" / "made" / name).stat().st_size
    assert sorted(os.listdir(project)) == ["chats.jsonl", "config.py", "desk", "model", "model-tokenizer", "runs"]


def test_a_run_goes_on_from_another_folder_and_is_the_same_run_there(project):
    resume = [sys.executable, "-m", "sftjax.main", "--resume=../runs/one", "--dry_run"]
    options = {"cwd": project / "desk", "env": tiny_run.environment(), "capture_output": True, "text": True}
    finished = subprocess.run(resume, **options, timeout=300)
    assert finished.returncode == 0 and "finished" in finished.stdout, finished.stderr
    (project / "runs" / "one" / "summary.json").rename(project / "summary.json")
    try:
        going_on = subprocess.run(resume, **options, timeout=300)
    finally:
        (project / "summary.json").rename(project / "runs" / "one" / "summary.json")
    assert going_on.returncode == 0 and "2 steps" in going_on.stdout, going_on.stderr
