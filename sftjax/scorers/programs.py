"""Programs that a model wrote, run against a row's tests in a child process with limits.

The child has a time limit, and limits of memory, processor time, open files and file sizes; its folder is a new one
that is removed, its environment empty, its output thrown away. It is not kept from the network or from files that this
user can read. A test is passed when the child gets to its end: a program that leaves early has not passed.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from typing import Any

from sftjax.errors import ConfigError
from sftjax.scorers.formats import code_blocks
from sftjax.scorers.rows import Row, field_of

SECONDS = 10.0
MEMORY_BYTES = 1 << 30
_BEHIND_FUNCTION = re.compile(r"^(?:def |class |if |print\(|assert |#|@|```)", re.MULTILINE)
# Runs the program it is given, and only then repeats the word that it was told: nothing the program prints is seen.
_CHILD = """
import os, resource, runpy, sys
word = sys.stdin.readline()
seconds, memory, program = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
for name, limit in (
    ("RLIMIT_CPU", int(seconds) + 1), ("RLIMIT_AS", memory), ("RLIMIT_FSIZE", 1 << 20),
    ("RLIMIT_NOFILE", 64), ("RLIMIT_CORE", 0),
):
    resource.setrlimit(getattr(resource, name), (limit, limit))
real = os.dup(1)
nowhere = os.open(os.devnull, os.O_WRONLY)
os.dup2(nowhere, 1)
os.dup2(nowhere, 2)
sys.argv = [program]
runpy.run_path(program, run_name="program")
os.write(real, word.encode())
"""


def seconds_of(argument: Any) -> float:
    try:
        seconds = float(argument or SECONDS)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ConfigError(f"scorer tests:{argument}: give a number of seconds")
    return seconds


def passes(row: Row, answer: str, argument: Any = "") -> float:
    """Row: HumanEval's `prompt`, `test`, `entry_point`, or MBPP's `test_list` (and `test_setup_code`)."""
    return float(runs(program(row, answer), seconds=seconds_of(argument)))


def program(row: Row, answer: str) -> str:
    """The answer's code with the row's tests behind it."""
    test = field_of(row, "test", "test_list", "tests")
    name = row.get("entry_point")
    code = code_in(answer, name)
    prompt = row.get("prompt")
    if name and isinstance(prompt, str) and re.search(rf"^\s*def {re.escape(name)}\b", prompt, re.MULTILINE):
        if re.search(rf"^def {re.escape(name)}\b", code, re.MULTILINE):
            code = f"{prompt}\n\n{code}"  # the prompt's imports and helpers; the answer's function wins
        else:
            code = prompt + cut_completion(code)
    if not isinstance(test, str):
        test = "\n".join([str(row.get("test_setup_code") or ""), *map(str, test)])
    call = f"\ncheck({name})\n" if name and "def check(" in test else "\n"
    return f"{code}\n\n{test}\n{call}"


def code_in(answer: str, name: str | None = None) -> str:
    """The code block that defines `name`, or the first one, or the whole answer."""
    blocks = [code for _, code in code_blocks(answer)[0]]
    defining = [code for code in blocks if name and re.search(rf"^def {re.escape(name)}\b", code, re.MULTILINE)]
    return (defining or blocks or [answer])[0]


def cut_completion(text: str) -> str:
    """A function's body, without what comes behind the function."""
    end = _BEHIND_FUNCTION.search(text)
    return text[: end.start()] if end else text


def runs(source: str, *, seconds: float = SECONDS) -> bool:
    """Whether a program gets to its end."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="sftjax-tests-") as folder:
        path = os.path.join(folder, "program.py")
        with open(path, "w", encoding="utf-8", errors="replace") as file:
            file.write(source)
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD, str(seconds), str(MEMORY_BYTES), path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "PATH": os.defpath},
            start_new_session=True,
        )
        try:
            said = child.communicate(word.encode() + b"\n", timeout=seconds)[0]
        except (subprocess.TimeoutExpired, BrokenPipeError):
            said = b""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # what it may have started, too
            child.kill()
            child.wait()
            child.stdout.close()
    return said.strip() == word.encode()
