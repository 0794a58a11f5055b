"""The tool: files in, files out; killed and run again; with a tiny model here and with one behind a URL."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from sftjax.curate import text as curation
from sftjax.data import tokenizer as tokenizers
from sftjax.data.encode import RowEncoder
from sftjax.errors import ConfigError
from sftjax.synth import run
from sftjax.synth.teacher import Sampling
from tests import tiny_run
from tests.synth.fakes import completion, server

REWARD = "def length(row, answer):\n    return len(answer) % 7\n"


def respond(path, body):
    """An answer that depends on the prompt and the seed."""
    return completion(body, f"{body['messages'][-1]['content']} {'x' * (body['seed'] % 11)}.")


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {number}"}) + "\n" for number in range(30)))
    return path


def made(url, prompts, output, **changes):
    """Best of three in this process; the bytes of rows and pairs."""
    settings = {"n": 3, "chunk": 4, "seed": 5, "threshold": 3.0, "pairs": True, **changes}
    teacher = run.TeacherSettings(url=url, name="m")
    reward = f"{prompts.parent / 'reward.py'}:length"
    report = run.synthesize(
        "rejection",
        output=str(output),
        teacher=teacher,
        sampling=Sampling(),
        input=str(prompts),
        reward=reward,
        **settings,
    )
    assert report == json.loads((output / run.REPORT).read_text())
    return (output / run.ROWS).read_bytes(), (output / run.PAIRS).read_bytes()


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path, prompts):
    asked, middle, go_on = [], threading.Event(), threading.Event()

    def slow(path, body):
        asked.append(body["seed"])
        if len(asked) == 50:  # of 90
            middle.set()
            go_on.wait(60)
        return respond(path, body)

    with server(slow) as url:
        command = [
            sys.executable, "tools/synthesize.py", "rejection", "--teacher_url", url, "--teacher_model", "m",
            "--input", str(prompts), "--reward", f"{tmp_path / 'reward.py'}:length", "--output", str(tmp_path / "out"),
            "--n", "3", "--chunk", "4", "--seed", "5", "--threshold", "3", "--pairs", "--concurrency", "1",
        ]  # fmt: skip
        child = subprocess.Popen(command, cwd=tiny_run.ROOT, env=tiny_run.environment(), stderr=subprocess.PIPE)
        assert middle.wait(120)
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        go_on.set()
        assert child.returncode == -signal.SIGKILL and not (tmp_path / "out" / run.ROWS).exists()
        before = len(asked)
        resumed = made(url, prompts, tmp_path / "out")
        # at most the chunk that the kill broke off is asked for again: 4 prompts, 3 answers each
        assert 40 <= len(asked) - before <= 90 - 50 + 12
        assert resumed == made(url, prompts, tmp_path / "whole")


def test_rows_are_what_training_and_curation_read(tmp_path, prompts):
    with server(respond) as url:
        rows, pairs = made(url, prompts, tmp_path / "out")
    rows = [json.loads(line) for line in rows.splitlines()]
    encoder = RowEncoder(tokenizers.load(tiny_run.tiny.byte_level(tmp_path / "tokenizer")))
    assert 0 < len(rows) < 30
    for row in rows:
        assert row["teacher"].endswith(" m") and row["method"] == "rejection"
        (exchange,) = curation.read(row).exchanges
        assert exchange.instruction == f"question {row['index']}" and exchange.response.startswith("question")
        (sample,) = encoder(row)
        assert sample.weights.any()
    assert all(json.loads(line)["chosen_score"] > json.loads(line)["rejected_score"] for line in pairs.splitlines())


def test_a_complete_run_asks_nothing_again_and_other_settings_are_refused(tmp_path, prompts):
    with server(respond) as url:
        first = made(url, prompts, tmp_path / "out")
        (tmp_path / "out" / run.ROWS).unlink()
    assert made(url, prompts, tmp_path / "out") == first  # the server is gone
    with pytest.raises(ConfigError, match="another seed"):
        made(url, prompts, tmp_path / "out", seed=6)
    (tmp_path / "reward.py").write_text(REWARD.replace("7", "5"))
    with pytest.raises(ConfigError, match="another reward_content"):
        made(url, prompts, tmp_path / "out")
    prompts.write_text(prompts.read_text().replace("question 3", "another"))
    with pytest.raises(ConfigError, match="input_content"):
        made(url, prompts, tmp_path / "out")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_run.model(tmp_path_factory.mktemp("model") / "m")


def test_a_model_here_is_deterministic_under_a_seed_and_resumes(tmp_path, model):
    def drawn(name, seed=0):
        run.synthesize(
            "magpie",
            output=str(tmp_path / name),
            teacher=run.TeacherSettings(model=str(model), batch_size=4),
            sampling=Sampling(temperature=1.0, max_new_tokens=24, stop=(".", "\n")),
            seed=seed,
            chunk=4,
            count=8,
            template_of="",
        )
        return (tmp_path / name / run.ROWS).read_bytes()

    first = drawn("a")
    calls = (tmp_path / "a" / "calls.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "calls.jsonl").write_bytes(b"".join(calls[:2]) + calls[2][:30])
    (tmp_path / "half" / "settings.json").write_bytes((tmp_path / "a" / "settings.json").read_bytes())
    assert drawn("half") == first
    assert (tmp_path / "half" / "calls.jsonl").read_bytes() == b"".join(calls)
    drawn("other", seed=1)
    assert (tmp_path / "other" / "calls.jsonl").read_bytes().splitlines()[0] != calls[0].rstrip()


def test_the_teacher_is_one_or_the_other():
    for settings in ({}, {"model": "m", "url": "http://x", "name": "n"}, {"url": "http://x"}, {"name": "n"}):
        with pytest.raises(ConfigError, match="give the teacher"):
            run.open_teacher(run.TeacherSettings(**settings))


def test_help_documents_every_field_of_a_row(tmp_path):
    done = tiny_run.run([sys.executable, "tools/synthesize.py", "--help"])
    for name in ("messages", "method", "teacher", "index", "sample", "score", "scores", "second_score", "depth"):
        assert f'"{name}"' in done.stdout
    for name in ("operation", "parent", "number", "chosen", "rejected", "chosen_score", "classification"):
        assert f'"{name}"' in done.stdout
