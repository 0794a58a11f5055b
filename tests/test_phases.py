"""Phases: named with their time on stderr, a spinner on a terminal, nothing of it in a pipe of results."""

import os
import pty
import re
import subprocess
import sys
import time

import pytest

from sftjax import phases
from tests.tiny_run import ROOT

PROGRAM = """
import sys, time
from sftjax.phases import phase
with phase("reading the weights"):
    print("a result")
    with phase("reading the first"):
        pass
    time.sleep(0.3)
"""


def test_a_phase_is_a_line_with_its_time_and_one_before_it_when_it_takes_long(capsys, monkeypatch):
    monkeypatch.setattr(phases, "PATIENCE_S", 0.05)
    with phases.phase("quick"):
        pass
    with phases.phase("slow"):
        time.sleep(0.3)
    with phases.phase("unsaid", line=False):
        time.sleep(0.1)
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(r"quick: 0\.0 s\nslow \.\.\.\nslow: 0\.\d s\n", said.err), said.err


def test_a_phase_that_fails_is_not_called_done(capsys):
    with pytest.raises(ValueError, match="broken"), phases.phase("trying"):
        raise ValueError("broken")
    assert capsys.readouterr().err == ""
    with phases.phase("again"):
        pass
    assert "again: " in capsys.readouterr().err


def test_on_a_terminal_a_spinner_turns_and_results_stay_in_their_pipe():
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=theirs, env=environment, timeout=60
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # that is how a closed terminal ends
        pass
    finally:
        os.close(ours)
    assert done.returncode == 0 and done.stdout == b"a result\n"
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r", "\n")
    assert re.search(r"[⠀-⣿] reading the weights 0:00:0", text), text  # the spinner, and the time so far
    assert re.search(r"^reading the weights: 0\.\d s", text, re.M) and "reading the first: 0.0 s" in text
    assert shown.rstrip().endswith(b" s") and b"\x1b[?25h" in shown  # the cursor is back
