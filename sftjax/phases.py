"""What a program is doing where nothing else is said: each phase named, with its time when it is done, on stderr.

    opening the model: 3.2 s

On a terminal a spinner with the time turns meanwhile; elsewhere a phase that takes long is named when that is known.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

PATIENCE_S = 5.0  # without a terminal: how long a phase may be silent
_lock = threading.Lock()  # held while a phase is shown: another one within it, or in another thread, gets a line only
_quiet = threading.Event()


def be_quiet() -> None:
    """Nothing is shown from now on: in every process of a run but the first."""
    _quiet.set()


@contextlib.contextmanager
def phase(what: str, *, line: bool = True) -> Iterator[None]:
    """Shows a stretch of work.

    Args:
      what: it in words, "reading the weights".
      line: whether a line with its time stays behind.
    """
    if _quiet.is_set():
        yield
        return
    began, shown = time.monotonic(), _lock.acquire(blocking=False)
    try:
        with _spinner(what) if _on_terminal() and shown else _reminder(what, line):
            yield
    finally:
        if shown:
            _lock.release()
    if line:
        _say(f"{what}: {time.monotonic() - began:.1f} s")


def _on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def _spinner(what: str) -> Iterator[None]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # what is printed meanwhile goes above the spinner, but never out of a pipe
    options = {"transient": True, "redirect_stdout": sys.stdout.isatty(), "redirect_stderr": True}
    with Progress(*columns, console=Console(stderr=True), **options) as shown:
        shown.add_task(what, total=None)
        yield


@contextlib.contextmanager
def _reminder(what: str, line: bool) -> Iterator[None]:
    timer = threading.Timer(PATIENCE_S, _say, [f"{what} ..."])
    timer.daemon = True
    if line:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody listens any more
        print(text, file=sys.stderr, flush=True)
