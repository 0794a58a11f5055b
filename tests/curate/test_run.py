"""A curation from end to end: what is written, that all is accounted for, and that a killed run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orjson
import pytest

from sftjax.curate import chunks, run
from sftjax.curate.settings import from_mapping
from sftjax.data.sources import open_source
from sftjax.errors import ConfigError, StorageError
from tests.curate import planted, real_data

ROOT = Path(__file__).resolve().parents[2]
ITEM = "At what temperature in kelvin does pure water boil at the pressure of one atmosphere?"


def rows(count=600, seed=0):
    """Made-up rows that none of the steps minds."""
    rng = np.random.default_rng(seed)
    words = [
        "".join(rng.choice(list("bdfglmnprst")) + rng.choice(list("aeiou")) for _ in range(3)) for _ in range(2000)
    ]
    made = []
    for _ in range(count):
        chosen = rng.choice(words, size=40).tolist()
        made.append(real_data.chat(f"How is the {' '.join(chosen[:9])}?", f"It is the {' '.join(chosen[9:])}."))
    return made


def write(path, lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else orjson.dumps(line) for line in lines) + b"\n")
    return str(path)


def settings(tmp_path, sources, **changes):
    return from_mapping({"sources": sources, "output": str(tmp_path / "out"), "workers": 1, **changes})


def lines(path):
    return [orjson.loads(line) for line in Path(path).read_bytes().splitlines()]


@pytest.fixture
def faulty(tmp_path):
    """Rows with a fault each at known places."""
    made = rows(60)
    made[3] = real_data.chat("Why is it so?", "")
    made[10] = b'{"messages": [}'
    made[11] = {"nothing": "known"}
    made[20] = {**made[19], "messages": [{**m, "content": m["content"].upper()} for m in made[19]["messages"]]}
    made[30] = real_data.chat(made[29]["messages"][0]["content"], made[29]["messages"][1]["content"] + " Yes indeed.")
    made[40] = real_data.chat(
        f"Please answer. {ITEM}", "It boils at three hundred and seventy-three kelvin, or a bit less."
    )
    made[50]["messages"][1]["content"] += " Write to jane@example.com."
    made[55]["license"] = "MIT"
    bench = write(tmp_path / "bench.jsonl", [{"question": ITEM}])
    return write(tmp_path / "data.jsonl", made), bench


def test_every_row_is_kept_or_accounted_for(tmp_path, faulty):
    path, bench = faulty
    found = run.curate(settings(tmp_path, path, contamination={"benchmarks": (bench,)}))
    kept, removed = lines(tmp_path / "out/kept.jsonl"), lines(tmp_path / "out/removed.jsonl")
    assert {line["index"]: line["rule"] for line in removed} == {
        3: "empty_response", 10: "unreadable", 11: "unreadable", 20: "exact_duplicate", 30: "near_duplicate",
        40: "contamination",
    }  # fmt: skip
    assert all(list(line) == ["row", "index", "source", "rule", "score", "detail"] for line in removed)
    assert all(isinstance(line["score"], float) and line["source"] == "data.jsonl" for line in removed)
    assert "data.jsonl:20," in removed[3]["detail"] and "temperature in kelvin" in removed[5]["detail"]
    assert "broken_json" in removed[1]["detail"]
    assert sorted(row["_index"] for row in kept) == sorted(set(range(60)) - {line["index"] for line in removed})
    source = open_source(path)
    for row in kept:
        whole = {key: value for key, value in row.items() if not key.startswith("_")}
        assert whole == source[row["_index"]]
        assert row["_source"] == "data.jsonl" and 0.7 <= row["_score"] <= 1 and len(row["_sha256"]) == 64
    assert found == orjson.loads((tmp_path / "out/curation.json").read_bytes())
    assert (found["rows_read"], found["rows_kept"]) == (60, 54)
    assert {rule: entry["count"] for rule, entry in found["removed"].items()} == {
        "unreadable": 2, "empty_response": 1, "contamination": 1, "exact_duplicate": 1, "near_duplicate": 1,
    }  # fmt: skip
    assert found["personal"] == {
        "mode": "report", "rows": 1, "kinds": {"email": 1},
        "where": [{"row": f"{tmp_path}/data.jsonl:51", "index": 50, "source": "data.jsonl", "kinds": {"email": 1}}],
    }  # fmt: skip
    assert found["licences"] == {"unknown": 53, "MIT": 1}
    assert not (tmp_path / "out/.work").exists()
    card = (tmp_path / "out/dataset_card.md").read_text()
    assert "| near_duplicate | 1 |" in card and "MIT (1)" in card and str(tmp_path) not in card


def test_what_is_kept_can_be_read_again(tmp_path, faulty):
    path, _ = faulty
    for kind in ("jsonl", "parquet"):
        run.curate(settings(tmp_path, path, output_format=kind, personal={"mode": "mask"}))
        source = open_source(str(tmp_path / f"out/kept.{kind}"))
        assert [file.name for file in (tmp_path / "out").glob("kept.*")] == [f"kept.{kind}"]
        found = [source[i] for i in range(len(source))]
        masked = next(row for row in found if row["_index"] == 50)
        assert masked["messages"][1]["content"].endswith("Write to [EMAIL].") and len(found) == 55
        assert all("example.com" not in str(row) for row in found)
        assert b"jane@" not in b"".join(file.read_bytes() for file in (tmp_path / "out").iterdir())


def test_a_dry_run_writes_no_rows(tmp_path, faulty):
    path, _ = faulty
    found = run.curate(settings(tmp_path, path), dry_run=True)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "curation.html", "curation.json", "removed.jsonl",
    ]  # fmt: skip
    assert found["rows_kept"] == 55 and "would be" in next(run.summary_lines(found))


def test_modes_report_and_off(tmp_path, faulty):
    path, bench = faulty
    off = {name: {"mode": "off"} for name in ("exact", "near", "semantic", "personal")}
    found = run.curate(settings(tmp_path, path, quality={"preset": "none"}, **off))
    assert list(found["removed"]) == ["unreadable"] and found["duplicates"] == {}
    report = {name: {"mode": "report"} for name in ("exact", "near", "semantic")}
    report["contamination"] = {"mode": "report", "benchmarks": (bench,)}
    found = run.curate(settings(tmp_path, path, **report))
    assert list(found["removed"]) == ["unreadable", "empty_response"]
    assert {name: entry["found"] for name, entry in found["duplicates"].items()} == {
        "exact": 1,
        "near": 2,
        "semantic": 2,
    }
    assert found["contamination"]["benchmarks"]["bench.jsonl"]["contaminated"] == 1


def test_the_best_of_a_group_stays_and_the_top_share(tmp_path):
    made = rows(100)
    made[7] = real_data.chat("How is it?", "Sure! " + made[8]["messages"][1]["content"])
    made[8] = real_data.chat("How is it?", made[8]["messages"][1]["content"])
    path = write(tmp_path / "data.jsonl", made)
    run.curate(settings(tmp_path, path))
    (removed,) = lines(tmp_path / "out/removed.jsonl")
    assert (removed["index"], removed["rule"], removed["score"]) == (7, "near_duplicate", 0.8)
    off = {name: {"mode": "off"} for name in ("exact", "near", "semantic")}
    found = run.curate(settings(tmp_path, path, quality={"keep_top": 0.8}, **off))
    assert found["rows_kept"] == 80 and found["removed"]["keep_top"]["count"] == 20
    assert 7 in [line["index"] for line in lines(tmp_path / "out/removed.jsonl")]


def test_caps(tmp_path):
    a, b = write(tmp_path / "a.jsonl", rows(90, seed=1)), write(tmp_path / "b.jsonl", rows(10, seed=2))
    found = run.curate(settings(tmp_path, (a, b), balance={"max_per_source": 0.75}))
    assert found["balance"]["after"]["sources"] == {"a.jsonl": 30, "b.jsonl": 10}
    found = run.curate(settings(tmp_path, (a, b), balance={"max_per_source": 20}))
    assert found["removed"]["max_per_source"]["count"] == 70
    with pytest.raises(ConfigError, match=r"give a share above 0\.5"):
        run.curate(settings(tmp_path, (a, b), balance={"max_per_source": 0.4}))


def test_processes_and_chunks_change_nothing(tmp_path, monkeypatch, faulty):
    path, bench = faulty
    kept = []
    for number, (workers, size) in enumerate(((1, 1000), (2, 7))):
        monkeypatch.setattr(chunks, "ROWS", size)
        given = {"contamination": {"benchmarks": (bench,)}, "workers": workers, "output": str(tmp_path / str(number))}
        run.curate(settings(tmp_path, path, **given))
        kept.append([(tmp_path / str(number) / name).read_bytes() for name in ("kept.jsonl", "removed.jsonl")])
    assert kept[0] == kept[1]


def test_two_sources_of_one_name_and_formats(tmp_path):
    (tmp_path / "x").mkdir()
    one = write(
        tmp_path / "data.jsonl", [{"question": "How is it going today?", "answer": "It goes quite well, thank you."}]
    )
    two = write(tmp_path / "x/data.jsonl", rows(3))
    sources = ({"path": one, "fields": {"prompt": "question", "completion": "answer"}, "licence": "CC0"}, two)
    found = run.curate(settings(tmp_path, sources))
    assert [(source["name"], source["kept"], source["licence"]) for source in found["sources"]] == [
        ("data.jsonl", 1, "CC0"), ("data.jsonl#2", 3, ""),
    ]  # fmt: skip
    assert {row["_source"] for row in lines(tmp_path / "out/kept.jsonl")} == {"data.jsonl", "data.jsonl#2"}


def test_an_own_rule_runs_in_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "ROWS", 10)
    path = write(tmp_path / "data.jsonl", rows(40))
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import os\n"
        "def has_ba(exchange):\n"
        f"    open({str(tmp_path / 'seen')!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        "    return 'ba' in exchange.response\n"
        "def broken(exchange):\n    return 1 / 0\n"
    )
    said = []
    found = run.curate(
        settings(tmp_path, path, quality={"extra": (("has_ba", f"{mine}:has_ba", 0.5),)}, workers=2), say=said.append
    )
    assert found["removed"]["has_ba"]["count"] > 0
    assert str(os.getpid()) not in (tmp_path / "seen").read_text().split()
    with pytest.raises(ConfigError, match=r"data.jsonl:1: rule broken failed: ZeroDivisionError"):
        run.curate(settings(tmp_path, path, quality={"extra": (("broken", f"{mine}:broken", 0.5),)}, workers=2))
    assert not any("one process" in line for line in said)
    # What can't go to another process stays in this one, and is told.
    extra = (("has_ba", lambda exchange: "ba" in exchange.response, 0.5),)
    again = run.curate(
        settings(tmp_path, path, quality={"extra": extra}, workers=2, output=str(tmp_path / "b")), say=said.append
    )
    assert again["removed"]["has_ba"]["count"] == found["removed"]["has_ba"]["count"]
    assert any(line.startswith("one process looks at the rows: rule has_ba can't go to another") for line in said)


def test_a_config_file_s_own_functions_run_in_the_workers(tmp_path):
    """Its module can't be imported by name, and threads of ours are no reason to fork."""
    path = write(tmp_path / "data.jsonl", rows(2200))
    config = tmp_path / "config.py"
    config.write_text(
        "import os\n"
        "from configs.curate.default import get_config as default\n"
        "def has_ba(exchange):\n"
        f"    open({str(tmp_path / 'seen')!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        "    return 'ba' in exchange.response\n"
        "def get_config(arg=''):\n"
        "    config = default()\n"
        "    with config.unlocked():\n"
        "        config.quality.extra = (('has_ba', has_ba, 0.5),)\n"
        "    return config\n"
    )
    command = [sys.executable, "tools/curate.py", f"--config={config}", f"--config.sources={path}"]
    command += [f"--config.output={tmp_path / 'out'}", "--config.workers=2", "--config.semantic.mode=off"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "one process" not in done.stderr
    assert len(set((tmp_path / "seen").read_text().split())) == 2


def test_an_own_encoder(tmp_path):
    class Lengths:
        def encode(self, texts):
            return np.array([[len(one) % 7, 1.0] for one in texts])

    path = write(tmp_path / "data.jsonl", rows(40))
    found = run.curate(settings(tmp_path, path, semantic={"encoder": Lengths(), "threshold": 0.9999}))
    assert 30 <= found["duplicates"]["semantic"]["found"] < 40


COMMAND = [sys.executable, str(ROOT / "tools/curate.py"), f"--config={ROOT / 'configs/curate/default.py'}"]


def tool(*arguments):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=240)


def test_killed_in_the_middle_it_goes_on_and_comes_to_the_same(tmp_path):
    path = write(tmp_path / "data.jsonl", rows(12_000))
    arguments = [f"--config.sources={path}", "--config.workers=2", "--config.semantic.mode=off"]
    whole = tool(*arguments, f"--config.output={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [*COMMAND, *arguments, f"--config.output={tmp_path / 'out'}"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(done := list((tmp_path / "out").glob(".work/*/*.npz"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert len(done) < 12 and not (tmp_path / "out/kept.jsonl").exists()
    again = tool(*arguments, f"--config.output={tmp_path / 'out'}")
    assert again.returncode == 0 and "going on from" in again.stderr, again.stderr
    for name in ("kept.jsonl", "removed.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_tool_tells_what_is_wrong_in_one_line(tmp_path):
    path = write(tmp_path / "data.jsonl", rows(5))
    out = f"--config.output={tmp_path / 'out'}"
    for arguments, code, message in (
        ([f"--config.sources={path}"], 78, "output is empty"),
        ([out], 78, "sources is empty"),
        ([out, f"--config.sources={path}", "--config.near.mode=maybe"], 78, "near.mode='maybe'"),
        ([out, f"--config.sources={tmp_path}/none.jsonl"], 74, "no such file"),
        ([out, f"--config.sources={path}", "--config.quality.tresh=1"], 78, "tresh"),
        ([f"--config={tmp_path}/none.py"], 78, "none.py"),
    ):
        done = tool(*arguments)
        assert done.returncode == code and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = tool(out, f"--config.sources={path}", "--dry_run")
    assert done.returncode == 0 and "5 of 5 rows would be kept (100.0%)" in done.stdout, done.stderr


def test_nothing_that_can_be_used(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"nothing": "known"}] * 3)
    found = run.curate(settings(tmp_path, path))
    assert (found["rows_read"], found["rows_kept"]) == (3, 0)
    assert (
        found["removed"]["unreadable"]["count"] == 3
        and "No row is left" in (tmp_path / "out/curation.html").read_text()
    )


def test_settings_are_checked():
    good = {"sources": ("a",), "output": "b"}
    for wrong in ({"nere": {}}, {"near": {"treshold": 1}}, {"near": {"threshold": 1.5}}, {"output_format": "csv"}):
        with pytest.raises(ConfigError):
            from_mapping({**good, **wrong})


def test_a_folder_that_cannot_be_written(tmp_path):
    path = write(tmp_path / "data.jsonl", rows(5))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        run.curate(settings(tmp_path, path, output=str(tmp_path / "file")))


def test_planted_faults_end_to_end(tmp_path):
    """All kinds at once, through the files: what is planted goes, what is clean stays."""
    base = [
        real_data.chat(row["question"], row["answer"])
        for row in real_data.lines(real_data.shared("gsm8k_train.jsonl"))[:2200]
    ]
    bench = real_data.shared("ifeval_prompts.jsonl")
    made, truth = planted.plant(base, benchmark=[row["prompt"] for row in real_data.lines(bench)], per_kind=20, seed=4)
    path = write(tmp_path / "data.jsonl", made)
    found = run.curate(settings(tmp_path, path, contamination={"benchmarks": (str(bench),)}))
    removed = {line["index"] for line in lines(tmp_path / "out/removed.jsonl")}
    copies = {row for fault in truth for row in (fault.index, fault.of) if row is not None and fault.of is not None}
    marked = {fault.index for fault in truth}
    assert len(removed - marked - copies) <= 0.01 * (len(made) - len(marked | copies))
    for kind in ("empty_response", "refusal", "open_fence", "mojibake", "prompt_echo", "leak_prompt", "leak_changed"):
        assert all(fault.index in removed for fault in truth if fault.kind == kind), kind
    assert found["rows_kept"] + len(removed) == len(made)
    assert json.dumps(found)


LONG = "Tom walks along the river with his old dog every day before the sun comes up, and he likes to sing on the way"


def sums(numbers, answer, **more):
    return {
        "question": f"{LONG}. He has {numbers[0]} apples and buys {numbers[1]}. How many has he?",
        "answer": answer,
        **more,
    }


def called(name, arguments, question=LONG):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
    }


def thought(text):
    answer = {"role": "assistant", "content": "He should sing.", "reasoning_content": text}
    return {"messages": [{"role": "user", "content": LONG}, answer]}


def test_rows_that_differ_in_what_they_teach_are_no_duplicates(tmp_path):
    said = "the song helps him and his dog to find their way home again in the dark before the sun is up"
    apart = [
        sums((3, 4), "That makes 7 apples in all, and the dog has none."),
        sums((3, 5), "That makes 8 apples in all, and the dog has none."),
        sums(("three", "four"), "That makes seven apples in all, and the dog has none."),
        sums(("three", "five"), "That makes eight apples in all, and the dog has none."),
        {"question": f"{LONG}. Is he happy about it, would you say so?", "answer": "yes, he is."},
        {"question": f"{LONG}. Is he happy about it, would you say so?", "answer": "not at all!"},
        called("find_river", {"name": "Elbe"}),
        called("find_dog", {"name": "Elbe"}),
        called("find_river", {"name": "Rhine"}),
        thought(f"He likes it, so {said}."),
        thought("Nobody hears him there, and singing in the open air keeps a person warm and awake in winter months."),
        {"system": "You are a poet.", "question": f"{LONG}. Why does he sing?", "answer": f"Because {said}."},
        {"system": "You are a judge.", "question": f"{LONG}. Why does he sing?", "answer": f"Because {said}."},
    ]
    copies = [  # of the first, a call and the last
        sums((3, 4), "That makes 7 apples in all, and the dog has none, too."),
        called("find_river", {"name": "Elbe"}),
        {"system": "You are a judge.", "question": f"{LONG}. Why does he sing?", "answer": f"Because {said}, yes."},
    ]
    path = write(tmp_path / "data.jsonl", [*apart, *copies])
    run.curate(settings(tmp_path, path, quality={"threshold": 0.0}))
    assert [line["_index"] for line in lines(tmp_path / "out/kept.jsonl")] == [*range(len(apart))]
    removed = {line["index"]: line["detail"].split(",")[0] for line in lines(tmp_path / "out/removed.jsonl")}
    rows = {number: f"of {tmp_path}/data.jsonl:{line}" for number, line in ((13, 1), (14, 7), (15, 13))}
    assert removed == rows
