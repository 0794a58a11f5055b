"""Commands in bash, one after the other, as in one terminal: what is exported stays, a server runs beside the next."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import IO


class Failed(Exception):
    """A command's end, with the last of what it printed."""


class Shell:
    limit: float = 300  # seconds of one command

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment
        self.server: subprocess.Popen | None = None
        self.log = folder / "server.log"

    def run(self, command: str, *, stdin: str = "", server: bool = False) -> None:
        """Runs a command to its end, or a server until it answers.

        Raises:
          Failed: it ended with another code than 0, or not within the limit.
        """
        if command.startswith(("source ", "export ")):
            return self.update(command)
        if server:
            return self._serve(command)
        with tempfile.TemporaryFile() as output:
            process = self._start(command, output, stdin=subprocess.PIPE)
            try:
                process.communicate(stdin.encode(), timeout=self.limit)
            except subprocess.TimeoutExpired:
                _end(process)
                raise Failed(f"not done after {self.limit:.0f} s\n{_tail(_all(output))}") from None
            if process.returncode:
                raise Failed(f"exit code {process.returncode}\n{_tail(_all(output))}")

    def update(self, command: str) -> None:
        """Runs a command that changes the environment, and keeps the change."""
        done = subprocess.run(
            ["bash", "-c", f"{command} && env -0"], cwd=self.folder, env=self.environment, capture_output=True
        )
        if done.returncode:
            raise Failed(done.stderr.decode())
        lines = filter(None, done.stdout.decode().split("\0"))
        self.environment = dict(line.split("=", 1) for line in lines)

    def stop(self) -> None:
        """Ends the server, politely.

        Raises:
          Failed: it ended with another code than 0.
        """
        if not self.server:
            return
        process, self.server = self.server, None
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            _end(process)
            raise Failed("the server didn't end within 30 s of SIGTERM") from None
        if code:
            raise Failed(f"the server ended with code {code}\n{_tail(self.log.read_bytes())}")

    def _serve(self, command: str) -> None:
        self.stop()
        with self.log.open("wb") as output:
            self.server = self._start(f"exec {command}", output, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + self.limit
        while time.monotonic() < deadline and self.server.poll() is None:
            try:
                urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.3)
        code, process, self.server = self.server.poll(), self.server, None
        _end(process)
        raise Failed(f"exit code {code}, or no answer after {self.limit:.0f} s\n{_tail(self.log.read_bytes())}")

    def _start(self, command: str, output, stdin) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "-c", command], cwd=self.folder, env=self.environment, stdin=stdin, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def _end(process: subprocess.Popen) -> None:
    """Kills a command with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _all(output: IO[bytes]) -> bytes:
    output.seek(0)
    return output.read()


def _tail(output: bytes) -> str:
    return output[-3000:].decode(errors="replace")
