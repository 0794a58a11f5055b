"""Programs that a model wrote, run in a child with limits."""

import time

import pytest

from sftjax.scorers import make_scorer
from sftjax.scorers.programs import code_in, cut_completion, program, runs

ROW = {
    "prompt": 'from math import pi\n\ndef helper(x):\n    return x + 1\n\ndef area(r):\n    """A circle, and 1."""\n',
    "entry_point": "area",
    "test": "def check(candidate):\n    assert abs(candidate(1) - 4.14159265) < 1e-6\n",
}


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("    return helper(pi * r * r)\n\nprint('and so on", 1),  # a completion, and what came behind it
        ("Sure!\n```python\ndef area(r):\n    return helper(pi * r * r)\n```\nDone.", 1),  # with the prompt's import
        ("```python\ndef area(r):\n    return 0\n```", 0),
        ("    raise SystemExit(0)\n", 0),  # leaving early is not passing
        ("    import os; os._exit(0)\n", 0),
        ("I would rather not.", 0),
    ],
)
def test_humaneval(answer, score):
    assert make_scorer("tests", allow_code=True)(ROW, answer) == score


def test_mbpp():
    row = {"prompt": "Add two numbers.", "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}
    score = make_scorer("tests", allow_code=True)
    assert score(row, "```\ndef add(a, b):\n    return a + b\n```") == 1
    assert score(row, "def add(a, b):\n    return 3") == 0


def test_limits():
    started = time.monotonic()
    assert not runs("import time\ntime.sleep(60)", seconds=0.5)
    assert time.monotonic() - started < 10
    assert not runs("x = bytearray(4 << 30)")
    assert not runs("open('big', 'wb').write(bytes(2 << 20))")
    assert not runs(
        "import os\nassert 'PYTEST_CURRENT_TEST' not in os.environ\nassert not os.listdir('.') == ['program.py']"
    )
    assert runs("import os\nassert os.listdir('.') == ['program.py']\nprint('x' * 3_000_000)")


def test_a_child_of_the_child_does_not_outlive_it(tmp_path):
    mark = tmp_path / "mark"
    later = f"import time; time.sleep(1); open({str(mark)!r}, 'w')"
    source = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {later!r}])"
    assert runs(source)
    time.sleep(2)
    assert not mark.exists()


def test_code_is_found_where_it_is_defined():
    text = "```\nx\n```\n```python\ndef f():\n    pass\n```"
    assert code_in(text, "f").startswith("def f") and code_in(text) == "x" and code_in("y", "f") == "y"
    assert cut_completion("    return 1\n\ndef other():\n") == "    return 1\n\n"
    assert "check(area)" in program(ROW, "    return 1")
