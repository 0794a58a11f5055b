import json
import pickle
import struct
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from sftjax.errors import ConfigError, StorageError
from sftjax.weights import safetensors
from sftjax.weights.files import Folder


def write(path, header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def entry(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def open_one(folder):
    return safetensors.open_folder(Folder(folder))


BAD = {
    "empty": b"",
    "huge header": struct.pack("<Q", 2**62) + b"{}" + b" " * 20,
    "header beyond the file": struct.pack("<Q", 100) + b"{}" + b" " * 20,
}
BAD_HEADERS = {
    "not JSON": (b"{" * 20, b""),
    "nested deeply": (b"[" * 100_000, b""),
    "a list": (b"[1, 2, 3, 4, 5]", b""),
    "unknown dtype": ({"a": entry(dtype="Q7")}, b"\0" * 8),
    "negative shape": ({"a": entry((-2,))}, b"\0" * 8),
    "true as shape": ({"a": entry((True, 2))}, b"\0" * 8),
    "float as offset": ({"a": entry(end=8.0)}, b"\0" * 8),
    "size isn't shape x dtype": ({"a": entry((3,))}, b"\0" * 8),
    "overflowing shape": ({"a": entry((2**63, 2**63))}, b"\0" * 8),
    "gap": ({"a": entry(), "b": entry(begin=12, end=20)}, b"\0" * 20),
    "overlap": ({"a": entry(), "b": entry(begin=4, end=12)}, b"\0" * 12),
    "cut short": ({"a": entry()}, b"\0" * 7),
    "bytes left over": ({"a": entry()}, b"\0" * 9),
    "offsets backwards": ({"a": entry(begin=8, end=0)}, b"\0" * 8),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
    "a name twice": (b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses_bad_files(tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes(BAD[name])
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        open_one(tmp_path)


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_refuses_bad_headers(tmp_path, name):
    write(tmp_path / "model.safetensors", *BAD_HEADERS[name])
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        open_one(tmp_path)


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors", "model.pt"])
def test_no_pickle_is_ever_loaded(tmp_path, file):
    canary = tmp_path / "canary"
    (tmp_path / file).write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(ConfigError, match="pickle"):
        open_one(tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_begins_like_a_pickle_is_none(tmp_path, length):
    """0x0280 is 80 02 in the file, as a pickle of protocol 2 begins."""
    header = json.dumps({"a": entry()}).encode().ljust(length)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + header + bytes(8))
    assert open_one(tmp_path)["a"].shape == (2,)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "~x.safetensors", "x.safetensors\0", "x.bin",
     "", "n" * 300 + ".safetensors", 7],
)  # fmt: skip
def test_index_can_t_lead_out_of_the_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    write(tmp_path / "x.safetensors", {"a": entry()}, b"\0" * 8)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ConfigError):
        open_one(folder)


def test_links_may_not_lead_out(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write(tmp_path / "secret.safetensors", {"a": entry()}, b"\0" * 8)
    (folder / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(ConfigError, match="link"):
        open_one(folder)


def test_links_of_the_hub_s_cache_may(tmp_path):
    snapshot = tmp_path / "models--me--it" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--me--it" / "blobs"
    blobs.mkdir()
    write(blobs / "1234", {"a": entry()}, b"\0" * 8)
    (snapshot / "model.safetensors").symlink_to(blobs / "1234")
    assert set(open_one(snapshot)) == {"a"}


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({"a": "one.safetensors", "c": "one.safetensors"}, "'c' isn't in"),
        ({"a": "one.safetensors"}, "'b' is in"),
        ({"a": "one.safetensors", "b": "gone.safetensors"}, "gone"),
    ],
)
def test_index_must_agree_with_the_files(tmp_path, weight_map, match):
    write(tmp_path / "one.safetensors", {"a": entry(), "b": entry(begin=8, end=16)}, b"\0" * 16)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises((ConfigError, StorageError), match=match):
        open_one(tmp_path)


INDEXES = [
    (), (1,), (slice(1, 3),), (slice(None), slice(2, 5)), (2, slice(1, 4)), (slice(None), 0), (0, slice(0, 8, 2)),
    (slice(3, 3),),
]  # fmt: skip


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reads_slices_and_counts_their_bytes(tmp_path, index, dtype):
    whole = np.random.default_rng(0).normal(size=(4, 8, 3)).astype(np.float32).astype(np.dtype(dtype))
    with open(tmp_path / "model.safetensors", "wb") as out:
        pad = np.arange(5, dtype=np.uint8)
        out.write(safetensors.header_bytes([("p", pad.dtype, pad.shape), ("w", whole.dtype, whole.shape)], {}))
        safetensors.write_array(out, pad)
        safetensors.write_array(out, whole)
    stored = open_one(tmp_path)["w"]
    before = stored.file.bytes_read
    expected = whole[index]
    for kind in ("float32", "bfloat16"):
        out = np.empty(expected.shape, np.dtype(kind))
        stored.read(index, out)
        assert np.array_equal(out, expected.astype(np.dtype(kind)))
    assert stored.file.bytes_read - before == 2 * expected.nbytes


def test_the_reference_library_reads_what_is_written(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float16)}
    with open(tmp_path / "x.safetensors", "wb") as out:
        out.write(safetensors.header_bytes([(n, a.dtype, a.shape) for n, a in arrays.items()], {"format": "pt"}))
        for array in arrays.values():
            safetensors.write_array(out, array)
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(np.array_equal(loaded[name], array) for name, array in arrays.items())
    save_file(arrays, tmp_path / "model.safetensors")
    assert set(open_one(tmp_path)) == set(arrays)


def test_bfloat16_widens_exactly(tmp_path):
    from sftjax.weights.files import copy_converted

    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    out = np.empty(every.shape, np.float32)
    copy_converted(every, out)
    assert np.array_equal(out, every.astype(np.float32), equal_nan=True)


def test_weights_that_are_there_twice_are_read_once(tmp_path):
    raw = tiny.config_dict("llama")
    folder = tiny.write_model(tmp_path, raw, tiny.random_tensors(raw), files=2)
    (folder / "consolidated.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    expected = {name: stored.file.path for name, stored in safetensors.open_folder(Folder(folder)).items()}
    (folder / safetensors.INDEX).unlink()
    found = safetensors.open_folder(Folder(folder))
    assert {name: stored.file.path for name, stored in found.items()} == expected
