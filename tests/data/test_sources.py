"""Sources: the same rows from every kind of file, places in errors, and files as people have them."""

import gzip
import json
import pickle
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from sftjax.data import files as reading
from sftjax.data.sources import open_source
from sftjax.data.types import RowError
from sftjax.errors import ConfigError, DataError, StorageError

ROWS = [{"prompt": f"frage {i} é", "completion": "x\n" * i} for i in range(1, 8)]
CALLS = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
]


def lines(rows) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write(path, content) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def files(folder) -> dict[str, str]:
    table = pa.Table.from_pylist(ROWS)
    parquet.write_table(table, folder / "a.parquet", row_group_size=3)
    with zipfile.ZipFile(folder / "a.whl", "w") as archive:
        archive.writestr("inner/a.jsonl", lines(ROWS))
    quoted = "\n".join(f'"{r["prompt"]}","{r["completion"]}"' for r in ROWS)
    return {
        "jsonl": write(folder / "a.jsonl", lines(ROWS)),
        "no newline at the end": write(folder / "b.jsonl", lines(ROWS).rstrip(b"\n")),
        "BOM, CRLF, blank lines": write(
            folder / "c.jsonl", b"\xef\xbb\xbf" + lines(ROWS).replace(b"\n", b"\r\n\r\n \n")
        ),
        "list": write(folder / "a.json", json.dumps(ROWS)),
        "list with a BOM": write(folder / "b.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode()),
        "jsonl called json": write(folder / "c.json", lines(ROWS)),
        "list called jsonl": write(folder / "d.jsonl", json.dumps(ROWS)),
        "no suffix": write(folder / "rows", lines(ROWS)),
        "gz": write(folder / "a.jsonl.gz", gzip.compress(lines(ROWS))),
        "parquet": str(folder / "a.parquet"),
        "csv": write(folder / "a.csv", f"prompt,completion\r\n{quoted}\r\n"),
        "in a wheel": f"{folder}/a.whl!inner/a.jsonl",
        "fsspec": f"file://{folder}/a.jsonl",
    }


def test_the_same_rows_from_every_kind_of_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SFTJAX_CACHE", str(tmp_path / "cache"))
    for name, path in files(tmp_path).items():
        source = open_source(path)
        assert [source[i] for i in range(len(source))] == ROWS, name
        copy = pickle.loads(pickle.dumps(source))
        assert copy[3] == ROWS[3] and copy.fingerprint() == source.fingerprint() == open_source(path).fingerprint()
        with pytest.raises(IndexError):
            source[len(ROWS)]


def test_remote_files_are_read_through_fsspec(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("SFTJAX_CACHE", str(tmp_path))
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.jsonl", lines(ROWS[:3]))
    memory.pipe("/bucket/b.jsonl", lines(ROWS[3:]))
    source = open_source("memory://bucket/*.jsonl")
    assert [source[i] for i in range(len(source))] == ROWS
    memory.pipe("/bucket/b.jsonl", lines(ROWS[:1]))
    assert len(open_source("memory://bucket/b.jsonl")) == 1  # changed content is fetched again
    with pytest.raises(StorageError, match="no such file"):
        open_source("memory://bucket/none.jsonl")
    with pytest.raises(StorageError, match="nosuch"):
        open_source("nosuch://bucket/a.jsonl")


def test_folders_patterns_and_lists_are_one_source(tmp_path):
    write(tmp_path / "a.jsonl", lines(ROWS[:3]))
    write(tmp_path / "b.jsonl", lines(ROWS[3:]))
    write(tmp_path / "README", "not data")
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    for path in (str(tmp_path), f"{tmp_path}/*.jsonl", [a, b]):
        source = open_source({"path": path, "name": "both"})
        assert [source[i] for i in range(len(source))] == ROWS
        assert source.name == "both" and source.location(3) == f"{b}:1" and source.location(2) == f"{a}:3"


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("", range(7)),
        ("train", range(7)),
        ("train[:3]", range(3)),
        ("[5:]", range(5, 7)),
        ("[-2:]", range(5, 7)),
        ("[:50%]", range(4)),
        ("[50%:]", range(4, 7)),
        ("[2:1000]", range(2, 7)),
        ("[:1]+[6:]", (0, 6)),
    ],
)
def test_slices(tmp_path, split, rows):
    path = write(tmp_path / "a.jsonl", lines(ROWS))
    source = open_source({"path": path, "split": split})
    assert [source[i] for i in range(len(source))] == [ROWS[i] for i in rows]
    assert source.location(0) == f"{path}:{rows[0] + 1}"
    assert (source.fingerprint() == open_source(path).fingerprint()) == (split in ("", "train"))


@pytest.mark.parametrize("split", ["test", "[1", "[a:]", "train[3]", "train[:3]]"])
def test_bad_slices(tmp_path, split):
    with pytest.raises(ConfigError, match="split"):
        open_source({"path": write(tmp_path / "a.jsonl", lines(ROWS)), "split": split})
    with pytest.raises(DataError, match="leaves none"):
        open_source({"path": write(tmp_path / "a.jsonl", lines(ROWS)), "split": "[7:]"})


BROKEN = {
    "broken_json": b'{"a": 1',
    "not_utf8": b'{"a": "\xff\xfe"}',
    "not_an_object": b"[1, 2]",
    "broken_json ": b'{"a": NaN}',
    "broken_json  ": b"[" * 100_000,
    "broken_json   ": b'{"a": "\\ud800"}',
}


@pytest.mark.parametrize("reason", list(BROKEN))
def test_a_broken_line_is_named_and_the_others_are_read(tmp_path, reason):
    path = write(tmp_path / "a.jsonl", b'{"x": 1}\n\n' + BROKEN[reason] + b'\n{"x": 3}\n')
    source = open_source(path)
    assert len(source) == 3 and source[0] == {"x": 1} and source[2] == {"x": 3}
    with pytest.raises(RowError) as caught:
        source[1]
    assert caught.value.reason == reason.strip()
    assert source.location(1) == f"{path}:3" and source.location(2) == f"{path}:4"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \r\n", "is empty"),
        ("a.json", b'[{"a": 1},', "not JSON"),
        ("a.json", b'[{"a": "\xff"}]', "not UTF-8"),
        ("a.json", b"[]", "has no rows"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16"),
        ("a.parquet", b"PAR1 and no more", "not a Parquet file"),
        ("a.parquet", b"nothing of the kind", "not a Parquet file"),
        ("a.csv", b"a,a\n1,2\n", "same name"),
        ("a.csv", b"a,b\n\xff,2\n", "not UTF-8"),
        ("a.bin", b"\x00\x01", "neither its name nor its content"),
        ("a.txt", b" \n", "is empty"),
    ],
)
def test_files_that_can_not_be_read_are_named(tmp_path, name, content, said):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=said) as caught:
        open_source(path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_and_misspelt_keys(tmp_path):
    with pytest.raises(StorageError, match="no such file"):
        open_source(str(tmp_path / "x.jsonl"))
    with pytest.raises(StorageError, match="no data files"):
        open_source(str(tmp_path))
    with pytest.raises(ConfigError, match="unknown key 'pth'"):
        open_source({"pth": "x"})
    with pytest.raises(ConfigError, match="no path"):
        open_source({"path": ""})


def test_csv_cells(tmp_path):
    path = write(tmp_path / "a.csv", 'messages,n\n"[{""role"": ""user"", ""content"": ""q""}]","1\n2"\nlonely\n')
    source = open_source(path)
    assert json.loads(source[0]["messages"])[0]["content"] == "q" and source[0]["n"] == "1\n2"
    with pytest.raises(RowError, match="broken_csv"):
        source[1]
    assert source.location(1) == f"{path}:4"


def test_keys_that_arrow_filled_in_go_away(tmp_path):
    parquet.write_table(pa.Table.from_pylist(CALLS), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    assert [source[i] for i in range(2)] == CALLS


@pytest.mark.parametrize(
    ("unit", "rows"),
    [
        ("line", [("one", 1), ("two", 2), ("three", 5)]),
        ("paragraph", [("one\ntwo", 1), ("three", 5)]),
        ("file", [("one\ntwo\n\n \nthree\n", 1)]),
    ],
)
def test_text_by_line_paragraph_or_file(tmp_path, unit, rows):
    path = write(tmp_path / "a.txt", "one\r\ntwo\n\n \nthree\n")
    source = open_source({"path": path, "unit": unit})
    assert [(source[i]["text"], source.location(i)) for i in range(len(source))] == [
        (t, f"{path}:{n}") for t, n in rows
    ]


def test_large_lines_and_chunk_borders(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 7)
    path = write(tmp_path / "a.jsonl", lines(ROWS))
    source = open_source(path)
    assert [source[i] for i in range(len(source))] == ROWS


def test_hub_ids_say_what_to_do_without_the_package_or_the_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ConfigError, StorageError), match=r"give their path"):
        open_source("hub:nobody/nothing")


def tfds_build(folder, file_format):
    import tensorflow_datasets as tfds

    rows = [{**row, "names": ["a", "é"][: i % 3], "n": i} for i, row in enumerate(CHATS)]

    class Chats(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self):
            text = tfds.features.Text()
            features = {"messages": tfds.features.Sequence({"role": text, "content": text}), "n": np.int64}
            features = {**features, "names": tfds.features.Sequence(text)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(rows)

    Chats(data_dir=folder, file_format=file_format).download_and_prepare()
    return rows


CHATS = [
    {"messages": [{"role": "user", "content": f"héllo {i}"}, {"role": "assistant", "content": "x\n" * i + "y"}]}
    for i in range(6)
]


def test_tfds_rows_equal_those_of_the_jsonl_route(tmp_path):
    rows = tfds_build(tmp_path, "array_record")
    source = open_source({"path": "tfds:chats", "data_dir": str(tmp_path)})
    by_number = sorted((source[i] for i in range(len(source))), key=lambda row: row["n"])  # TFDS shuffles on writing
    assert by_number == rows
    copy = pickle.loads(pickle.dumps(source))
    assert copy[2] == source[2] and copy.fingerprint() == source.fingerprint()
    half = open_source({"path": "tfds:chats", "data_dir": str(tmp_path), "split": "train[:50%]"})
    assert len(half) == 3 and half[1] == source[1] and half.location(1) == "tfds:chats/train[1]"
    with pytest.raises(DataError, match="no split 'test'"):
        open_source({"path": "tfds:chats", "data_dir": str(tmp_path), "split": "test"})


def test_other_tfds_builds_are_refused_with_the_remedy(tmp_path):
    tfds_build(tmp_path, "parquet")
    with pytest.raises(DataError, match=r"prepared as parquet.*file_format='array_record'"):
        open_source({"path": "tfds:chats", "data_dir": str(tmp_path)})
    info = tmp_path / "chats" / "1.0.0" / "dataset_info.json"
    content = json.loads(info.read_text())
    info.write_text(json.dumps({**content, "fileFormat": "tfrecord"}))
    with pytest.raises(DataError, match=r"prepared as tfrecord.*file_format='array_record'"):
        open_source({"path": "tfds:chats", "data_dir": str(tmp_path)})
    with pytest.raises(DataError, match="doesn't find it"):
        open_source({"path": "tfds:none", "data_dir": str(tmp_path)})


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"loss_weight": -1}, "loss_weight=-1"),
        ({"weight": "2"}, "weight='2'"),
        ({"weight": True}, "weight=True"),
        ({"proportion": float("nan")}, "proportion=nan"),
        ({"max_epochs": [1]}, "max_epochs="),
        ({"loss_weight": 1e39}, "loss_weight="),
        ({"fields": "question"}, "fields='question'"),
        ({"split": 3}, "split=3"),
        ({"path": 3}, "path=3"),
    ],
)
def test_numbers_and_names_that_can_not_be_are_refused_before_anything_is_read(entry, said):
    with pytest.raises(ConfigError, match=said) as caught:
        open_source({"path": "nowhere.jsonl", **entry})
    assert "\n" not in str(caught.value)
