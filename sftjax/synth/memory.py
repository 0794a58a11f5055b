"""What was paid for is kept: calls of a teacher or a scorer, on disk, in the order they were made.

Every method here is a deterministic program around such calls. A run that was killed is run again from the start, finds
its first calls answered, and goes on where it stopped: its output is that of a run that was never interrupted.

    calls.jsonl   {"call": digest of the request, "result": ...}     one a line; a torn last line is dropped
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson

from sftjax.errors import ConfigError, StorageError
from sftjax.lock import FolderLock
from sftjax.utils.storage import write_text

FILE = "calls.jsonl"
SETTINGS = "settings.json"


class Memory:
    """Calls that were answered, of one output folder. A context manager: one process works in a folder at a time.

    Args:
      folder: made if it isn't there.
      settings: what the run was asked for; JSON.

    Raises:
      ConfigError: the folder is of a run with other settings. StorageError: it can't be written.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]):
        self.folder = Path(folder)
        self._settings = settings
        self.remembered = 0  # calls of an earlier run that weren't asked for yet

    def __enter__(self) -> Memory:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(str(self.folder))
            try:
                check_settings(self.folder, self._settings)
                self._open()
            except BaseException:
                self._lock.release()
                raise
        except OSError as error:
            raise StorageError(f"--output {self.folder}: can't be used ({error.strerror or error})") from None
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()
        self._lock.release()

    def _open(self) -> None:
        path = self.folder / FILE
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        self._known = iter([orjson.loads(line) for line in whole.splitlines()])
        self.remembered = whole.count(b"\n")
        self._file = path.open("ab")
        self._file.truncate(len(whole))

    def call(self, request: Any, do: Callable[[], Any]) -> Any:
        """What `do()` gave when this call was first made; JSON values.

        Raises:
          ConfigError: an earlier run asked for something else at this place: its input files have changed.
        """
        digest = hashlib.sha256(orjson.dumps(request, default=str, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]
        known = next(self._known, None)
        if known is not None:
            self.remembered -= 1
            if known["call"] != digest:
                raise ConfigError(
                    f"--output {self.folder}: its run was made from other prompts or files than now; give another "
                    "folder, or remove this one"
                )
            return known["result"]
        line = orjson.dumps({"call": digest, "result": do()}) + b"\n"
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        return orjson.loads(line)["result"]  # as a later run would find it


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes what a run was asked for into its folder, or compares it with what an earlier one was.

    Raises:
      ConfigError: they differ; names the settings that do.
    """
    path, now = folder / SETTINGS, orjson.loads(orjson.dumps(settings, default=str))
    if not path.exists():
        write_text(path, orjson.dumps(now, option=orjson.OPT_INDENT_2).decode())
        return
    before = orjson.loads(path.read_bytes())
    changed = [key for key in sorted(set(before) | set(now)) if before.get(key) != now.get(key)]
    if changed:
        raise ConfigError(
            f"--output {folder} holds a run with another {', '.join(changed)}: give another folder, or remove this one"
        )


def in_chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


class Progress:
    """Done, of how many, and the time left, on stderr: one line that is written over on a terminal, else now and then.

    Args:
      what: for example "prompts answered".
    """

    def __init__(self, what: str, total: int, *, memory: Memory | None = None):
        self._what, self._total, self._memory = what, total, memory
        self._done = self._fresh = 0
        self._start = self._shown = time.monotonic()

    def add(self, count: int) -> None:
        remembered = self._memory is not None and self._memory.remembered > 0
        self._done += count
        now = time.monotonic()
        if remembered:
            self._start = now
        else:
            self._fresh += count
        last, terminal = self._done >= self._total, sys.stderr.isatty()
        if not last and now - self._shown < (0.2 if terminal else 15):
            return
        self._shown = now
        line = f"{self._done:,}/{self._total:,} {self._what}"
        if self._fresh and not last:
            left = round((self._total - self._done) * (now - self._start) / self._fresh)
            line += f"  ETA {left // 60}:{left % 60:02d}"
        start, end = ("\r\x1b[K", "\n" if last else "") if terminal else ("", "\n")
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)
