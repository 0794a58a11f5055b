"""The program itself on data as people have it: what the dry run reads, and what it says of what it can't."""

import json
import re

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from tests import tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("intake")
    tiny_run.model(where / "model")
    return where


def write(path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count: int, of: str) -> list[dict]:
    return [
        {"question": f"the {of} dog sees {i} cats", "answer": f"the {of} tree finds {i} cats"} for i in range(count)
    ]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


def dry_run(folder, sources, name: str, code: int = 0):
    fields = {"data__train": repr(tuple(sources)), "data__eval_fraction": 0.0, "data__max_dropped_fraction": 0.5}
    command = tiny_run.command(folder / "model", "", folder / name, **fields)
    return tiny_run.run([*command, "--dry_run"], code=code)


def test_layouts_and_shapes_of_the_hub_in_one_dry_run(folder):
    """The right rows of each: all of train, none of test, no card."""
    card, data = "---\nlicense: mit\n---\n# A card\n\nof many words\n", folder / "data"
    for name, kind in (("snapshot", "parquet"), ("lines", "jsonl")):
        write(data / name / "data" / f"train-00000-of-00001.{kind}", pairs(5, name))
        write(data / name / "data" / f"test-00000-of-00001.{kind}", pairs(3, "wrong"))
        (data / name / "README.md").write_text(card)
        (data / name / ".git").mkdir()
        write(data / name / ".git" / "train.jsonl", pairs(3, "wrong"))
    write(data / "saved" / "train" / "data-00000-of-00001.arrow", pairs(6, "saved"))
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"}
    (data / "saved" / "train" / "state.json").write_text(json.dumps(state))
    (data / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    configs = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/*.jsonl\n---\n"
    write(data / "configs" / "main" / "a.jsonl", pairs(7, "main"))
    write(data / "configs" / "other" / "a.jsonl", pairs(3, "wrong"))
    (data / "configs" / "README.md").write_text(configs)
    text = "<|im_start|>user\na red {}<|im_end|>\n<|im_start|>assistant\nblue {}<|im_end|>\n"
    write(data / "texts" / "train.jsonl", [{"text": text.format(i, i)} for i in range(8)])
    chosen = [{"prompt": f"red {i}", "chosen": f"blue {i}", "rejected": "no cat at all"} for i in range(9)]
    write(data / "chosen" / "train.jsonl", chosen)
    counts = {"snapshot": 5, "lines": 5, "saved": 6, "configs": 7, "texts": 8, "chosen": 9}
    report = dry_run(folder, [{"path": str(data / name), "name": name} for name in counts], "run").stdout
    assert "40 of 40 read, 0 without a sample" in report
    assert "rendered_text 8, unread_column:rejected 9" in report
    for name, rows in counts.items():
        assert re.search(rf" {name} +│ {rows} rows, ", report), report


def test_rows_of_no_known_format_are_told_with_what_would_make_them_conversations(folder):
    rows = [{"ask": row["question"], "reply": row["answer"]} for row in pairs(20, "old")]
    path = write(folder / "ask.jsonl", rows)
    said = dry_run(folder, [path], "unknown", 65).stderr.strip().splitlines()[-1]
    assert "unknown_format" in said and "fields={'question': 'ask', 'answer': 'reply'}" in said


def test_numbers_that_can_not_be_are_refused_before_anything_is_opened(folder):
    error = dry_run(folder, [{"path": "nowhere.jsonl", "loss_weight": -1}], "numbers", 78).stderr.strip()
    assert error.startswith("error: data.train") and "loss_weight=-1 is not" in error and "\n" not in error
