"""Stopping when asked: SIGTERM (a preempted machine), SIGINT (Ctrl-C) and SIGHUP (a dropped connection), in every phase
of a run. A signal that was ignored when the program began (`nohup`) stays ignored.

A flag polled between steps isn't enough. Python runs signal handlers between bytecodes only, so during a compilation of
minutes nothing would happen and the machine would be gone. So a thread is told of the signal by the interpreter itself
(`signal.set_wakeup_fd`), and where nothing is unsaved (`nothing_to_lose`) it ends the process when the main
thread doesn't within a grace time.

No handler raises. An exception out of a handler appears between any two bytecodes, and so in the middle of jax's
lowering and compiling, which don't survive it: SIGSEGV (seen in each of 11 processes within 250 interrupts with jax
alone), or, in a callback of the garbage collector, nothing at all.

    phase                                  what a first signal does            a second one
    set-up, data, compile, export          ends the run in GRACE_S             ends it at once
    training, evaluation                   the loop stops at the next poll,    ends it at once; what came after
                                           saves, and ends                     the last checkpoint is lost
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import jax

from sftjax.errors import EXIT_PREEMPTED, Preempted
from sftjax.utils import interrupts

GRACE_S = 1.0  # for the main thread to come to the phase's end by itself, where nothing can be lost


class StopRequested(Preempted):
    """The run was asked to stop."""


class StopSignal:
    """A context in which SIGTERM, SIGINT and SIGHUP are requests.

        with StopSignal() as stop:
            with stop.nothing_to_lose("compiling"):
                ...
            for step in ...:
                ...
                if stop.reached(step):
                    save(); raise StopRequested(...)

    In a run of several processes JAX's own preemption service hears SIGTERM and lets all stop at the same step;
    `reached` asks it. Outside the main thread (a notebook's worker, say) signals are left alone.

    Args:
      before_exit: called when the process is ended from the side, e.g. to release a lock.
    """

    def __init__(self, before_exit: Callable[[], None] | None = None):
        self._before_exit = before_exit
        self._count = 0
        self._number = int(signal.SIGTERM)  # the one that came
        self._what = ""
        self._unlosable = threading.Event()  # set: nothing is unsaved
        self._closed = threading.Event()
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._old = {number: signal.signal(number, self._handle) for number in interrupts.heeded()}
            threading.Thread(target=self._watch, name="stop signals", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        if self._old:
            signal.set_wakeup_fd(self._old_fd)
            for number, handler in self._old.items():
                signal.signal(number, handler)
            self._old = {}
            self._writer.close()  # ends the thread

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._count > 0

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`: the same answer in every process. To be asked at every step."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def check(self) -> None:
        """Raises `StopRequested` if asked to stop; for long phases, in one process, that can be begun again."""
        if self.requested:
            raise StopRequested(self._message(self._number))

    @contextlib.contextmanager
    def nothing_to_lose(self, what: str) -> Iterator[None]:
        """A phase, `what` in words, that may be left at any point: a signal ends the run there, with code 75."""
        self._what = what
        self._unlosable.set()
        try:
            self.check()  # one that came just before
            yield
            self.check()
        finally:
            self._unlosable.clear()

    def _handle(self, number: int, _frame) -> None:
        """In the main thread, when it gets to Python code. The thread may have counted this signal before."""
        self._count = max(self._count, 1)
        self._number = number

    def _message(self, number: int) -> str:
        return (
            f"stopped by {signal.Signals(number).name} while {self._what}; nothing is lost, "
            "the same command continues the run"
        )

    def _watch(self) -> None:
        """In a thread of its own, at once, whatever the main thread does."""
        wanted = {int(number) for number in self._old}
        seen = 0
        while True:
            data = self._reader.recv(16)
            if not data:
                self._reader.close()
                return
            for number in (byte for byte in data if byte in wanted):
                seen += 1
                self._count, self._number = max(self._count, seen), number
                if seen > 1:
                    self._end("stopped at once by a second signal; the same command continues from the last checkpoint")
                elif self._unlosable.is_set():
                    threading.Thread(target=self._end_after_grace, args=(number,), daemon=True).start()
                else:
                    _say(f"{signal.Signals(number).name}: finishing the step and saving (again: leave at once)")

    def _end_after_grace(self, number: int) -> None:
        if not self._closed.wait(GRACE_S):
            self._end(self._message(number))

    def _end(self, message: str) -> None:
        """Leaves without the main thread, which may be deep in a compiler; children would outlive us."""
        _say(message)
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), b"\x1b[?25h")  # the cursor, which a spinner had hidden
        for child in multiprocessing.active_children():
            child.kill()
        if self._before_exit is not None:
            with contextlib.suppress(Exception):
                self._before_exit()
        os._exit(EXIT_PREEMPTED)


def _say(message: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"\n{message}\n")
        sys.stderr.flush()
