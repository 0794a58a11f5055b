"""Runs of the real program with one fault each, and what to compare afterwards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tests import tiny_run

FIELDS = {
    "peft__method": "lora",
    "peft__r": 2,
    "train__max_steps": 6,
    "train__batch_size": 2,
    "checkpoint__save_steps": 2,
    "eval__eval_steps": 3,
    "eval__num_samples": 1,
    "eval__max_new_tokens": 4,
    "log__tensorboard": False,
}


class Ended(NamedTuple):
    """How a run ended: its exit code (minus the signal that ended it), and what it printed."""

    code: int
    text: str

    @property
    def error(self) -> str:
        """The line that says what is wrong."""
        lines = [line for line in self.text.splitlines() if line.startswith("error: ")]
        return lines[0].removeprefix("error: ") if len(lines) == 1 else ""


class Place:
    """A folder with a tiny model, conversations, and the process that runs are forked from."""

    def __init__(self, folder: Path):
        self.folder = folder
        tiny_run.model(folder / "model")
        tiny_run.conversations(folder / "chats.jsonl", count=30)
        environment = {**tiny_run.environment(), "XDG_CACHE_HOME": str(folder / "cache")}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tiny_run.ROOT,
        )
        assert self._answer() == {"ready": True}

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        return json.loads(self._process.stdout.readline())

    def run(self, run_dir: Path, *, fault: dict[str, Any] | None = None, model: Path | None = None, **fields) -> Ended:
        """Trains into `run_dir`, or goes on there; see `zygote` for `fault` ("match" and "count" may be left out)."""
        line = tiny_run.command(
            model or self.folder / "model", self.folder / "chats.jsonl", run_dir, **{**FIELDS, **fields}
        )
        log = run_dir.with_name(f"{run_dir.name}.log")
        armed = fault and {"match": "", "count": 1, **fault}
        command = {"arguments": line[3:], "log": str(log), "fault": armed}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        assert "pid" in self._answer()
        return Ended(self._answer()["code"], log.read_text(errors="replace"))


def leftovers(run: Path) -> list[str]:
    """What a finished run must not leave: parts of files, locks, folders being written or removed."""
    return sorted(
        str(path.relative_to(run))
        for path in run.rglob("*")
        if path.name.endswith((".partial", ".old", ".new", "-tmp")) or path.name in ("lock.json", "deleted")
        or "orbax-checkpoint-tmp" in path.name
    )  # fmt: skip


def newest_checkpoint(run: Path) -> Path:
    steps = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    return run / "checkpoints" / str(max(steps))


def outcome(run: Path) -> dict[str, Any]:
    """What two runs that are the same have in common, to the byte: figures, answers, export, last checkpoint."""
    last = max(
        (path for path in (run / "checkpoints").iterdir() if path.name.isdigit()), key=lambda path: int(path.name)
    )
    summary = json.loads((run / "summary.json").read_text())
    found = {name: (run / name).read_text() for name in ("metrics.jsonl", "samples.jsonl")}
    found |= {
        f"export/{path.relative_to(run / 'export')}": path.read_bytes()
        for path in sorted((run / "export").rglob("*"))
        if path.is_file() and path.name != "README.md"  # the card has the speed in it
    }
    found["summary"] = {key: value for key, value in summary.items() if key != "export"}
    found["digest"] = json.loads((last / "digest" / "metadata").read_text())["leaves"]
    found["files"] = sorted(path.name for path in run.iterdir() if not path.name.endswith(".damaged"))
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def copy(run: Path, name: str) -> Path:
    """The same run at another place, where a fault can't hurt it."""
    target = run.with_name(name)
    shutil.copytree(run, target, symlinks=True)
    return target
