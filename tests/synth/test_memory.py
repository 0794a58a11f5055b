import orjson
import pytest

from sftjax.errors import ConfigError, StorageError
from sftjax.synth.memory import FILE, Memory, in_chunks


def run(folder, upto, made, settings=None):
    """Asks for the squares of 0..upto-1; `made` gets those that were computed."""
    with Memory(folder, settings or {"seed": 1}) as memory:
        return [memory.call({"square": n}, lambda n=n: made.append(n) or n * n) for n in range(upto)]


def test_a_call_is_made_once(tmp_path):
    made = []
    assert run(tmp_path, 3, made) == [0, 1, 4]
    assert run(tmp_path, 5, made) == [0, 1, 4, 9, 16]
    assert made == [0, 1, 2, 3, 4]


def test_a_torn_last_line_is_asked_for_again(tmp_path):
    made = []
    run(tmp_path, 3, made)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-4])
    assert run(tmp_path, 3, made) == [0, 1, 4]
    assert made == [0, 1, 2, 2] and (tmp_path / FILE).read_bytes() == whole


def test_other_settings_are_refused_by_name(tmp_path):
    run(tmp_path, 1, [])
    with pytest.raises(ConfigError, match="another n, seed"):
        run(tmp_path, 1, [], {"seed": 2, "n": 8})


def test_other_requests_are_refused(tmp_path):
    run(tmp_path, 2, [])
    with Memory(tmp_path, {"seed": 1}) as memory, pytest.raises(ConfigError, match="other prompts"):
        memory.call({"cube": 0}, lambda: 0)


def test_one_process_at_a_time(tmp_path):
    with Memory(tmp_path, {}), pytest.raises(StorageError), Memory(tmp_path, {}):
        pass
    with Memory(tmp_path, {}):  # and it is free again
        pass


def test_what_fails_is_not_remembered(tmp_path):
    def fail():
        raise StorageError("no answer")

    with Memory(tmp_path, {}) as memory, pytest.raises(StorageError):
        memory.call("a", fail)
    assert (tmp_path / FILE).read_bytes() == b""


def test_the_first_run_sees_what_a_later_one_will(tmp_path):
    with Memory(tmp_path, {}) as memory:
        first = memory.call("a", lambda: [("text", "stop"), float("nan")])
    assert first == [["text", "stop"], None] == orjson.loads((tmp_path / FILE).read_bytes())["result"]


def test_chunks_keep_everything():
    assert in_chunks([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
