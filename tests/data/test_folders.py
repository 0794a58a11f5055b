"""Folders as people have them: which files are data, of which split, and what is never read."""

import bz2
import gzip
import json
import lzma
import pickle

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from sftjax.data.sources import open_source
from sftjax.errors import ConfigError, DataError, StorageError

CARD = "# A data set\n\nIt holds prompts.\n"


def row(name: str) -> dict:
    return {"prompt": f"of {name}", "completion": "x"}


def save(path, name: str, rows: int = 1) -> None:
    """A data file of any kind with rows that say whose they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([row(name)] * rows)
    kind = path.name.split(".", 1)[1]
    if kind == "parquet":
        parquet.write_table(table, path)
    elif kind == "arrow":
        with ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    elif kind in ("csv", "tsv"):
        comma = "," if kind == "csv" else "\t"
        path.write_text(f"prompt{comma}completion\n" + f"of {name}{comma}x\n" * rows)
    elif kind in ("txt", "md", "py"):
        path.write_text(f"of {name}\n" * rows)
    elif kind == "json":
        path.write_text(json.dumps([row(name)] * rows, indent=1))
    else:
        packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": pa.Codec("zstd").compress}
        pack = packed.get(kind.split(".")[-1], lambda content: content)
        content = pack((json.dumps(row(name)) + "\n").encode() * rows)
        if kind.endswith("zst"):
            with pa.CompressedOutputStream(str(path), "zstd") as file:
                file.write((json.dumps(row(name)) + "\n").encode() * rows)
        else:
            path.write_bytes(content)


def folder(tmp_path, *names: str, card: str = CARD):
    for name in names:
        save(tmp_path / name, name)
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "LICENSE").write_text("do as you like")
    for hidden in (".git/train.jsonl", ".cache/huggingface/train.jsonl", ".gitattributes", "script.py", ".train.jsonl"):
        save(tmp_path / hidden if "." in hidden[1:] else tmp_path / f"{hidden}.txt", "hidden")
    return tmp_path


def read(path, **spec) -> list[str]:
    source = open_source({"path": str(path), **spec})
    rows = [source[i] for i in range(len(source))]
    assert pickle.loads(pickle.dumps(source))[0] == rows[0]
    return [(one.get("prompt") or one["text"]).removeprefix("of ") for one in rows]


LAYOUTS = {
    "a card and a file": (["train.jsonl"], {"": ["train.jsonl"]}),
    "train and test": (["train.jsonl", "test.jsonl"], {"": ["train.jsonl"], "test": ["test.jsonl"]}),
    "a snapshot": (
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
        {"": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
         "test": ["data/test-00000-of-00001.parquet"]},
    ),
    "splits of its own": (
        ["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"],
        {"train_sft": ["data/train_sft-00000-of-00001.parquet"], "test_sft": ["data/test_sft-00000-of-00001.parquet"]},
    ),
    "one split of its own": (["data/default-00000-of-00001.parquet"], {"": ["data/default-00000-of-00001.parquet"]}),
    "splits as folders": (
        ["train/a.jsonl", "train/deep/b.jsonl", "dev/a.jsonl"],
        {"": ["train/a.jsonl", "train/deep/b.jsonl"], "validation": ["dev/a.jsonl"], "dev": ["dev/a.jsonl"]},
    ),
    "no splits": (["a.jsonl", "b/c.jsonl"], {"": ["a.jsonl", "b/c.jsonl"], "all": ["a.jsonl", "b/c.jsonl"]}),
    "all splits": (
        ["train.csv", "test.csv"], {"all": ["test.csv", "train.csv"], "train+test": ["train.csv", "test.csv"]}
    ),
    "the most frequent kind": (["a.parquet", "b.parquet", "c.jsonl", "notes.txt"], {"": ["a.parquet", "b.parquet"]}),
    "kinds as frequent": (["a.parquet", "a.jsonl", "a.csv"], {"": ["a.parquet"]}),
    "text beside data": (["train.jsonl", "notes.md", "requirements.txt"], {"": ["train.jsonl"]}),
    "text alone": (["b.txt", "a.md", "LICENSE.txt"], {"": ["a.md", "b.txt"]}),
    "compressed": (["a.jsonl.gz", "b.jsonl.zst", "c.jsonl.bz2", "d.jsonl.xz"],
                   {"": ["a.jsonl.gz", "b.jsonl.zst", "c.jsonl.bz2", "d.jsonl.xz"]}),
    "tables": (["train.tsv", "validation.tsv"], {"": ["train.tsv"]}),
    "lists": (["train.json", "test.json"], {"": ["train.json"]}),
    "arrow of the cache": (["x-train.arrow", "x-test.arrow", "cache-1a2b.arrow"], {"": ["x-train.arrow"]}),
}  # fmt: skip


@pytest.mark.parametrize(("names", "splits"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(tmp_path, monkeypatch, names, splits):
    monkeypatch.setenv("SFTJAX_CACHE", str(tmp_path / "cache"))
    where = folder(tmp_path / "set", *names)
    for split, expected in splits.items():
        assert read(where, split=split) == expected


def test_slices_of_splits(tmp_path):
    save(tmp_path / "train.jsonl", "train", 4)
    save(tmp_path / "test.jsonl", "test", 4)
    assert read(tmp_path, split="test[:1]+train[50%:]") == ["test", "train", "train"]
    source = open_source({"path": str(tmp_path), "split": "test[1:]"})
    assert source.location(0) == f"{tmp_path}/test.jsonl:2"


def test_splits_that_are_not_there_are_named(tmp_path):
    where = folder(tmp_path, "test.jsonl", "validation.jsonl")
    with pytest.raises(DataError, match=r"no split 'train'; there are: test, validation"):
        open_source(str(where))
    with pytest.raises(DataError, match="no split 'exam'"):
        open_source({"path": str(where), "split": "exam"})
    with pytest.raises(ConfigError, match="a file has no splits"):
        open_source({"path": str(where / "test.jsonl"), "split": "test"})


def test_what_is_left_out_is_told(tmp_path, caplog):
    read(folder(tmp_path, "train.jsonl", "extra.jsonl", "a.csv"))
    assert "extra.jsonl" in caplog.text and "a.csv" in caplog.text and "README" not in caplog.text


CONFIGS = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: ["main/test-*"]
- config_name: extra
  data_files: "extra/**/*.jsonl"
- config_name: third
  data_dir: third
---
# A card
"""


def test_configurations_of_the_card(tmp_path):
    names = ["main/train-0.jsonl", "main/test-0.jsonl", "extra/a/b.jsonl", "extra/c.jsonl", "third/train.jsonl"]
    where = folder(tmp_path, *names, card=CONFIGS)
    assert read(where) == ["main/train-0.jsonl"] and read(where, split="test") == ["main/test-0.jsonl"]
    assert read(where, config="extra") == ["extra/a/b.jsonl", "extra/c.jsonl"]
    assert read(where, config="third") == ["third/train.jsonl"]
    with pytest.raises(ConfigError, match="no configuration 'forth'; there are: main, extra, third"):
        open_source({"path": str(where), "config": "forth"})
    (where / "README.md").write_text(CONFIGS.replace("  default: true\n", ""))
    with pytest.raises(ConfigError, match=r"several configurations.*main, extra, third"):
        open_source(str(where))
    (where / "main/train-0.jsonl").unlink()
    with pytest.raises(DataError, match="names 'main/train-\\*', which isn't there"):
        open_source({"path": str(where), "config": "main"})
    (where / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(DataError, match="front matter is not YAML"):
        open_source(str(where))


def saved_to_disk(path, name: str) -> None:
    """What `Dataset.save_to_disk` leaves."""
    for number in range(2):
        save(path / f"data-0000{number}-of-00002.arrow", f"{name} {number}")
    files = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in range(2)]
    (path / "state.json").write_text(json.dumps({"_data_files": files, "_split": name, "_format_type": None}))
    (path / "dataset_info.json").write_text(json.dumps({"features": {}}))
    save(path / "cache-0a1b.arrow", "of a map")


def test_folders_of_save_to_disk(tmp_path):
    for name in ("train", "test"):
        saved_to_disk(tmp_path / name, name)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read(tmp_path) == ["train 0", "train 1"] and read(tmp_path, split="test") == ["test 0", "test 1"]
    assert read(tmp_path / "test") == ["test 0", "test 1"]
    with pytest.raises(DataError, match="no split 'train'; this is test"):
        open_source({"path": str(tmp_path / "test"), "split": "train"})
    broken = tmp_path / "train" / "data-00001-of-00002.arrow"
    broken.write_bytes(broken.read_bytes()[:-8])
    with pytest.raises(DataError, match="cut short"):
        open_source(str(tmp_path))


def test_a_folder_of_the_hubs_cache(tmp_path):
    blob = tmp_path / "blobs" / "0a1b"
    save(tmp_path / "blobs" / "train.jsonl", "new")
    (tmp_path / "blobs" / "train.jsonl").rename(blob)
    for revision in ("old", "new"):
        (tmp_path / "snapshots" / revision).mkdir(parents=True)
    (tmp_path / "snapshots/new/train.jsonl").symlink_to("../../blobs/0a1b")
    save(tmp_path / "snapshots/old/train.jsonl", "old")
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs/main").write_text("new")
    assert read(tmp_path) == ["new"] and read(tmp_path / "snapshots/old") == ["old"]


def test_patterns_at_any_depth(tmp_path):
    where = folder(tmp_path, "a.jsonl", "x/b.jsonl", "x/y/c.jsonl", "x/d.csv", "x/notes.md")
    assert read(f"{where}/**/*.jsonl") == ["a.jsonl", "x/b.jsonl", "x/y/c.jsonl"]
    assert read(f"{where}/*.jsonl") == ["a.jsonl"] and read(f"{where}/x/*") == ["x/b.jsonl"]
    assert read(f"{where}/**/*.md") == ["x/notes.md"] and read(f"{where}/README.md")[0] == "# A data set"
    with pytest.raises(StorageError, match="no data files"):
        open_source(f"{where}/**/*.parquet")


def test_folders_behind_an_address_and_in_a_zip(tmp_path, monkeypatch):
    import zipfile

    import fsspec

    monkeypatch.setenv("SFTJAX_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    content = json.dumps(row("far")).encode()
    memory.pipe({"/far/README.md": CARD.encode(), "/far/data/train.jsonl": content, "/far/data/test.jsonl": b"{}"})
    assert read("memory://far") == ["far"]
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("inner/data/train.jsonl", content)
    assert read(f"{tmp_path}/a.whl!inner") == ["far"]


def test_a_folder_of_pictures_is_refused(tmp_path):
    save(tmp_path / "metadata.jsonl", "pictures")
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="folder of pictures"):
        open_source(str(tmp_path))


WRITTEN = {
    "one object a line": '{"prompt": "a"}\n{"prompt": "b"}\n',
    "a list": '[{"prompt": "a"},\n {"prompt": "b"}]',
    "an object with the rows": '{"version": "1.0", "data": [{"prompt": "a"}, {"prompt": "b"}]}',
    "the same over lines": '{\n "version": 1,\n "data": [\n  {"prompt": "a"},\n  {"prompt": "b"}\n ]\n}\n',
}


@pytest.mark.parametrize("content", WRITTEN.values(), ids=WRITTEN.keys())
def test_ways_of_writing_json(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert read(tmp_path / "a.json") == ["a", "b"]


def test_an_object_that_is_a_row_is_one(tmp_path):
    (tmp_path / "a.json").write_text('{\n "prompt": "a",\n "n": [{"m": 1}]\n}')
    assert read(tmp_path / "a.json") == ["a"]
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "data": [{"role": "user", "content": "q"}]}')
    assert read(tmp_path / "b.jsonl") == ["a"]


def test_tables_with_semicolons(tmp_path):
    (tmp_path / "a.csv").write_text("prompt;completion\na, b;c\n")
    assert read(tmp_path / "a.csv") == ["a, b"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", 'a,b\n1,"x"\n2,"open\n3,y\n4,z\n', "a.csv:3: a quote opens here"),
        ("a.csv", 'a,b\n1,"x"\n2,"open\n3,"y"\n4,z\n', "a.csv:3: a quote opens here"),
        ("a.csv", 'a,b\n"1\n2","x\n3",y\n4,"z\n', "a.csv:5: a quote opens here"),
        ("a.csv", '"a,b\n1,2\n', "a.csv:1: a quote opens here"),
        ("a.jsonl", '{"a": 1}\n{"a": "b', "a.jsonl:2: the file ends in the middle of a row"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 50, mtime=0)[:-9], "cut short or damaged"),
        ("a.jsonl.zst", pa.Codec("zstd").compress(b'{"a": 1}\n' * 50).to_pybytes()[:-5], "cut short or damaged"),
        ("a.jsonl.xz", lzma.compress(b'{"a": 1}\n' * 50)[:-9], "cut short or damaged"),
        ("a.arrow", b"\xff\xff\xff\xff\x10", "cut short"),
        ("a.arrow", b"something else", "cut short"),
    ],
)
def test_a_file_whose_tail_is_lost_is_an_error(tmp_path, monkeypatch, name, content, said):
    monkeypatch.setenv("SFTJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=said) as caught:
        open_source(str(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True
