"""Signals that ask a program to stop, from its first line on; light, so that it can be imported before all else.

While a program starts (imports, flags, opening files), Python's own answer to Ctrl-C is an exception between any two
bytecodes: a traceback out of some import, or a crash in the middle of compiled code. `leave_at_once` replaces it until
`stopping.StopSignal` takes over, which knows what is unsaved.
"""

from __future__ import annotations

import contextlib
import os
import signal

from sftjax.errors import EXIT_PREEMPTED

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


def heeded() -> tuple[signal.Signals, ...]:
    """The signals that mean stop here: those that whoever started the program didn't have ignored (`nohup`)."""
    return tuple(number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN)


def leave_at_once() -> None:
    """From now on a signal to stop ends the process on the spot, with code 75: nothing is unsaved yet."""

    def leave(number: int, _frame) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"\nstopped by {signal.Signals(number).name} while starting; nothing is lost\n".encode())
        os._exit(EXIT_PREEMPTED)

    for number in heeded():
        signal.signal(number, leave)
