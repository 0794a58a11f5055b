"""Files appear whole or not at all."""

import os
import resource
import signal
import subprocess
import sys

import fsspec
import pytest

from sftjax.errors import StorageError
from sftjax.utils import storage


def test_a_file_has_its_name_only_when_complete(tmp_path):
    path = tmp_path / "new" / "file.json"
    with storage.whole_file(path) as file:
        file.write(b"half")
        assert not path.exists() and os.listdir(path.parent) == [".file.json.partial"]
    assert path.read_bytes() == b"half" and os.listdir(path.parent) == ["file.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_raises_leaves_the_old_content_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), storage.whole_file(path) as file:
        file.write(b"new")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_leftover_of_a_killed_process_is_used_up(tmp_path):
    (tmp_path / ".file.partial").write_text("left by another")
    storage.write_text(tmp_path / "file", "mine")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_one_line_with_the_path_and_what_helps(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    program = f"""
import resource, signal
from sftjax.errors import exit_with_message
from sftjax.utils import storage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
exit_with_message(lambda: storage.write_bytes({str(path)!r}, b"x" * 5000))
"""
    assert hasattr(resource, "RLIMIT_FSIZE") and signal.SIGXFSZ
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 74
    assert done.stderr == (
        f"error: {path}: can't be written (File too large); make room, then run the same command again\n"
    )
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_errors_of_the_block_are_its_own(tmp_path):
    with pytest.raises(FileNotFoundError), storage.whole_file(tmp_path / "out") as file:
        file.write((tmp_path / "missing").read_bytes())


def test_a_folder_in_its_place_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(StorageError, match="a folder is in its place"):
        storage.write_text(tmp_path / "out", "text")


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = subprocess.Popen(["cat", path], stdout=subprocess.PIPE)
    storage.write_text(path, "text")
    assert reader.communicate()[0] == b"text" and path.is_fifo()


def test_an_object_in_a_bucket_is_not_replaced_by_half_of_the_new_one():
    storage.write_text("memory://bucket/file", "old")
    with pytest.raises(ValueError), storage.whole_file("memory://bucket/file") as file:
        file.write(b"new")
        raise ValueError
    with fsspec.open("memory://bucket/file") as file:
        assert file.read() == b"old"


def test_moments_can_be_listened_to_and_cost_next_to_nothing(tmp_path):
    program = """
import sys
seen = []
sys.addaudithook(lambda name, details: seen.append((name, *details)) if name.startswith("sftjax.") else None)
from sftjax.utils import storage
storage.write_text(sys.argv[1], "text")
print(seen)
"""
    path = str(tmp_path / "file")
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert done.stdout == f"{[('sftjax.file renaming', path), ('sftjax.file written', path)]}\n"
