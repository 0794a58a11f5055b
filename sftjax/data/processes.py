"""Worker processes: spawned, never forked, since a forked child inherits the locks of threads that it doesn't have.

What they work with is sent to each once, when it begins; so it must be something that another process can load.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import FunctionType
from typing import Any

from sftjax.errors import ConfigError


def packed(thing: Any, what: str) -> bytes:
    """Returns `thing` as bytes from which another process makes it again.

    Args:
      what: how the message names it.

    Raises:
      ConfigError: it can't go to another process. (Each Python words its own reason differently.)
    """
    try:
        return bytes(_Packer.dumps(thing))
    except Exception as error:  # whatever its parts raise
        raise ConfigError(
            f"{what} can't go to another process: it is or holds a lambda, a function inside a function, or something "
            "open; use a function or a class of a file"
        ) from error


def of_file(path: str, name: str) -> Any:
    """The function or class `name` of a Python file, which need not be on the path of imports."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


class _Packer(ForkingPickler):
    """Names what is in a configuration file, which no other process can import, by the file."""

    def reducer_override(self, thing):
        if not isinstance(thing, FunctionType | type) or _is_importable(thing.__module__):
            return NotImplemented
        module = sys.modules.get(thing.__module__)
        path = thing.__code__.co_filename if isinstance(thing, FunctionType) else getattr(module, "__file__", "")
        if not thing.__qualname__.isidentifier() or not os.path.isfile(path):
            raise TypeError(f"{thing.__qualname__} has no place in a file")
        return of_file, (os.path.abspath(path), thing.__qualname__)


@cache
def _is_importable(module: str) -> bool:
    """Whether a spawned process can import it. (It has this one's main file as well, unless there is none.)"""
    if module == "__main__":
        return hasattr(sys.modules[module], "__file__")
    top = module.partition(".")[0]
    return top in sys.builtin_module_names or any(finder.find_spec(top, None) for finder in sys.meta_path)


@contextlib.contextmanager
def pool(workers: int, setup: Callable[[Any], None], shared: bytes) -> Iterator[ProcessPoolExecutor]:
    """Gives `workers` processes, each of which begins with `setup(what was packed into shared)`.

    They leave interrupts to this process, run the tokenizer in one thread, and end with the context or soon after this
    process.
    """
    context = multiprocessing.get_context("spawn")
    parts = context.Queue()  # whose thread hands them over: as arguments they would have one process wait for another
    for _ in range(workers):
        parts.put(shared)
    executor = ProcessPoolExecutor(workers, context, _begin, (setup, parts))
    try:
        with _interrupts_held():  # what a process holds back, those that it starts do as well
            executor.submit(os.getpid)  # the first task starts them all
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
        parts.close()
        parts.cancel_join_thread()  # what a worker that was killed didn't fetch


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C, which goes to every process of a terminal, is this process's alone to answer."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(setup: Callable[[Any], None], parts: multiprocessing.Queue[bytes]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    setup(ForkingPickler.loads(parts.get()))


def _die_with(parent: int) -> None:
    """Ends this process soon after its parent has ended (a killed parent can't tell its workers to stop).

    Not PR_SET_PDEATHSIG: that fires when the *thread* that started the worker ends.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
