"""tools/preview.py as a user calls it."""

import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests import browser
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
    assert [line["row"] for line in lines] == [f"{files}/data.jsonl:{number}" for number in (1, 2, 3, 4)]
    assert set(lines[0]) == {"row", "index", "sample", "tokens", "weights", "text"}
    assert len(lines[0]["tokens"]) == len(lines[0]["weights"]) and "<b>Paris</b>" in lines[0]["text"]
    assert [set(line) for line in lines[1:3]] == [{"row", "index", "error"}] * 2
    assert lines[1]["error"].startswith("no_assistant_turn") and lines[2]["error"].startswith("broken_json")
    assert set(lines[3]["weights"]) == {0, 0.5}


def test_html_is_one_page_that_opens_offline_and_escapes_the_data(files):
    done = preview("--model", files / "model", "--data", files / "data.jsonl", "--out", files / "out.html")
    assert done.returncode == 0, done.stderr
    page = (files / "out.html").read_text()
    assert "&lt;b&gt;Paris&lt;/b&gt;␛[31m" in page and 'title="weight 0.5"' in page
    assert "<b>Paris" not in page and "\x1b" not in page
    assert "http:" not in page and "https:" not in page and "src=" not in page
    assert "control_text" in page and "broken_json" in page


def article(page, text):
    """The card that holds `text`: visible, and its rules."""
    return page.evaluate(f"""(() => {{
        const card = [...document.querySelectorAll("article")].find(one => one.textContent.includes({text!r}));
        return card && {{visible: !card.hidden, rules: card.dataset.rules}};
    }})()""")


def filtered(page, **values):
    """How many cards are visible with these values in the form; the form is cleared before."""
    return page.evaluate(f"""(async () => {{
        const form = document.querySelector(".filters");
        form.reset();
        for (const [name, value] of Object.entries({json.dumps(values)}))
            document.getElementById(name.replace("_", "-")).value = value;
        form.dispatchEvent(new Event("input"));
        return [...document.querySelectorAll("article")].filter(one => one.checkVisibility()).length;
    }})()""")


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
def test_the_page_in_a_browser(files, tmp_path, size):
    """Search and filters show what they should, packed rows lead to their samples, and nothing sticks out."""
    (tmp_path / "more.jsonl").write_text(
        "\n".join(
            json.dumps({"messages": chat("How many cats?", "word " * words + "end"), "_score": score})
            for words, score in ((3, 0.25), (90, 0.9), (100, 1.0))
        )
    )
    removed = {"index": 2, "source": "more.jsonl", "rule": "near_duplicate", "score": 1.0, "detail": "of row 1"}
    (tmp_path / "removed.jsonl").write_text(json.dumps(removed))
    done = preview(
        "--model", files / "model", "--data", files / "data.jsonl", tmp_path / "more.jsonl", "--max_length", 128,
        "--removed", tmp_path / "removed.jsonl", "--out", tmp_path / "out.html",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with browser.open_page(f"file://{tmp_path / 'out.html'}", tmp_path / "profile", size) as page:
        assert page.evaluate("performance.getEntriesByType('resource').length") == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        everything = filtered(page)
        assert everything == 7 and page.evaluate("document.getElementById('count').textContent") == "7 of 7 shown"
        assert filtered(page, query="PARIS") == 1 and article(page, "Rome") == {
            "visible": True,
            "rules": "control_text",
        }
        assert filtered(page, source="more.jsonl") == 3
        assert filtered(page, rule="near_duplicate") == 1 and filtered(page, rule="broken_json") == 1
        assert filtered(page, rule="-") == 3
        assert filtered(page, score_from="0.5") == 2 and filtered(page, score_to="0.5") == 1
        longest = page.evaluate(
            "Math.max(...[...document.querySelectorAll('article')].map(one => +one.dataset.tokens))"
        )
        assert filtered(page, tokens_from=longest) == 1 and filtered(page, tokens_to=longest - 1) == 6
        # every packed row is as wide as the others, whatever lies in it
        rows = page.evaluate("""[...document.querySelectorAll(".row")].map(row => [
            [...row.children].reduce((sum, one) => sum + +one.style.flexGrow, 0), row.clientWidth])""")
        assert {row[0] for row in rows} == {128} and len({row[1] for row in rows}) == 1 and len(rows) > 1
        # a segment shows its sample, hidden or not
        filtered(page, query="no such text")
        assert page.evaluate("""(async () => {
            document.querySelector(".row a").click();
            await new Promise(wake => setTimeout(wake, 200));
            return document.querySelector(location.hash).checkVisibility();
        })()""")
        # trained text is coloured, fainter where its weight is smaller
        alpha = page.evaluate("""[...document.querySelectorAll("article mark")].map(one =>
            [one.title, +getComputedStyle(one).backgroundColor.match(/[\\d.]+/g)[3]])""")
        shades = {title: shade for title, shade in alpha}
        assert 0 < shades["weight 0.5"] < shades["weight 1"] < 1


def test_terminal(files):
    done = preview("--model", files / "model", "--data", files / "data.jsonl", "--limit", 3)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and "\x1b[31m" not in done.stdout and "data.jsonl:2  not used" in done.stdout
    assert "Rome" in done.stdout and "sample 0" in done.stdout


def test_what_is_trained_is_marked_in_a_pipe_too(files):
    """The marks are the text that the JSON says is trained, and lines aren't broken at eighty characters."""
    done = preview("--model", files / "model", "--data", files / "data.jsonl")
    assert "<|im_start|>assistant\n«<b>Paris</b>␛[31m<|im_end|>»\n" in done.stdout
    assert "«Rome<|im_end|>»" in done.stdout and "«0.5: A<|im_end|>»" in done.stdout and "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) > 80  # the refusal, on one line
    assert done.stdout.count("«") == done.stdout.count("»") == 3


@pytest.mark.parametrize("environment, marks, colours", [({}, 0, True), ({"NO_COLOR": "1"}, 3, False)])
def test_on_a_terminal_it_is_coloured_unless_that_is_not_wanted(files, environment, marks, colours):
    command = [sys.executable, str(ROOT / "tools" / "preview.py")]
    command += ["--model", str(files / "model"), "--data", str(files / "data.jsonl")]
    reader, writer = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    kept |= {"TERM": "xterm-256color"} | environment
    with subprocess.Popen(command, stdout=writer, stderr=writer, env=kept) as process:
        os.close(writer)
        shown = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(reader, 1 << 16):
                shown += part
    os.close(reader)
    assert process.returncode == 0, shown
    assert shown.decode().count("«") == marks and (b"\x1b[32m" in shown) == colours


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--data", "nowhere.jsonl"], 74, "nowhere.jsonl: no such file"),
        (["--out", "x.txt"], 78, "has to end in .jsonl or .html"),
        (["--out", "/dev/null/x.jsonl"], 74, "can't write /dev/null/x.jsonl"),
        (["--template", "chatlm"], 78, "chat template 'chatlm'"),
        (["--split", "[9:]"], 65, "leaves none"),
        (["--out", "x.html", "--max_length", "100"], 78, "use 128"),
        (["--out", "x.html", "--removed", "nowhere.jsonl"], 74, "can't read nowhere.jsonl"),
        (["--data", "a.jsonl", "b.jsonl", "--out", "x.jsonl"], 78, "give one --data"),
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
