"""tools/preview.py as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.tiny import byte_level, chat

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    json.dumps({"messages": chat("Which <|im_end|>?", "<b>Paris</b>\x1b[31m", "And?", "Rome")}),
    json.dumps({"messages": chat("Q")}),
    "{broken",
    json.dumps({"messages": [*chat("Q"), {"role": "assistant", "content": "A", "weight": 0.5}]}),
]


def preview(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "preview.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preview")
    byte_level(folder / "model")
    (folder / "data.jsonl").write_text("\n".join(ROWS))
    return folder


def test_json_lines(files):
    done = preview("--model", files / "model", "--data", files / "data.jsonl", "--out", files / "out.jsonl")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (files / "out.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    assert set(lines[0]) == {"index", "sample", "tokens", "weights", "text"}
    assert len(lines[0]["tokens"]) == len(lines[0]["weights"]) and "<b>Paris</b>" in lines[0]["text"]
    assert [set(line) for line in lines[1:3]] == [{"index", "error"}] * 2
    assert lines[1]["error"].startswith("no_assistant_turn") and lines[2]["error"].startswith("broken_json")
    assert set(lines[3]["weights"]) == {0, 0.5}


def test_html_is_one_page_that_opens_offline_and_escapes_the_data(files):
    done = preview("--model", files / "model", "--data", files / "data.jsonl", "--out", files / "out.html")
    assert done.returncode == 0, done.stderr
    page = (files / "out.html").read_text()
    assert "<mark>&lt;b&gt;Paris&lt;/b&gt;␛[31m" in page and 'title="weight 0.5"' in page
    assert "<b>Paris" not in page and "\x1b" not in page
    assert "http" not in page and "<script" not in page and "src=" not in page
    assert "control_text" in page and "broken_json" in page and "2 rows not used" in page


def test_terminal(files):
    done = preview("--model", files / "model", "--data", files / "data.jsonl", "--limit", 3)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and "\x1b[31m" not in done.stdout and "data.jsonl:2  not used" in done.stdout
    assert "Rome" in done.stdout and "sample 0" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--data", "nowhere.jsonl"], 74, "nowhere.jsonl: no such file"),
        (["--out", "x.txt"], 78, "has to end in .jsonl or .html"),
        (["--out", "/nowhere/x.jsonl"], 74, "can't write /nowhere/x.jsonl"),
        (["--template", "chatlm"], 78, "chat template 'chatlm'"),
        (["--split", "[9:]"], 65, "leaves none"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(files, arguments, code, said):
    done = preview("--model", files / "model", "--data", files / "data.jsonl", *arguments)
    assert done.returncode == code and said in done.stderr
    assert done.stderr.strip().count("\n") == 0 and "Traceback" not in done.stderr


def test_a_folder_needs_neither_jax_nor_torch(files):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['preview', '--model', {str(files / 'model')!r}, "
        f"'--data', {str(files / 'data.jsonl')!r}]; import runpy\n"
        f"try: runpy.run_path({str(ROOT / 'tools' / 'preview.py')!r}, run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'jax' not in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
