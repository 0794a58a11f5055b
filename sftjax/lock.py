"""One writer for a run folder: two of them both report every commit, and ruin each other's checkpoints.

On a local file system the kernel's `flock` decides: it goes away with the process, however that ends. The file says
who holds it, and its age is a heartbeat, for file systems that other hosts share without sharing locks (NFS, FUSE)
and for object stores, which have no locks at all.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import weakref
from typing import Any

import fsspec

from sftjax.errors import StorageError

if os.name == "posix":
    import fcntl

HEARTBEAT_S = 20.0
STALE_S = 120.0  # a holder on another host that hasn't been heard of for so long is gone
NAME = "lock.json"


class FolderLock:
    """Holds a folder until `release`, or the end of the process.

    Attributes:
      recovered: a line about the dead owner whose lock was taken over, or "".

    Raises:
      StorageError: another process holds it; the message names the process, the host and the time.
    """

    def __init__(self, folder: str):
        self._path = f"{folder.rstrip('/')}/{NAME}"
        self._folder = folder
        self._remote = "://" in folder
        self._handle: int | None = None
        self._end = threading.Event()
        self.recovered = ""
        self._owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": _utc(time.time())}
        if self._remote:
            self._take_remote()
        else:
            self._take_local()
        self._thread = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Gives the folder free; safe to call twice."""
        if self._end.is_set():
            return
        self._end.set()
        with contextlib.suppress(OSError):
            if self._remote:
                _filesystem(self._path).rm(self._path)
            elif self._handle is not None:
                os.unlink(self._path)  # while it is still locked, so that nobody else's is removed
        self._close()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_) -> None:
        self.release()

    # -- local

    def _take_local(self) -> None:
        for _ in range(100):
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            locks = self._flock()
            if locks is False:
                owner = _read_json(self._path)
                self._close()
                if self._is_dead(owner):  # a worker it had just forked is about to drop what it inherited
                    time.sleep(0.05)
                    continue
                raise self._refusal(owner)
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._path).st_ino == os.fstat(self._handle).st_ino:
                    break
            self._close()  # its holder removed it between our opening and locking: look again
        else:
            raise self._refusal(_read_json(self._path))
        # A worker process forked later would inherit the lock and keep it beyond our death.
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: (lock := reference()) and lock._close())
        self._check_previous(_read_json(self._path), locks is None)
        self._write()

    def _flock(self) -> bool | None:
        """True: locked; False: somebody else has it; None: the file system has no locks."""
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            return None

    def _check_previous(self, owner: dict[str, Any], no_locks: bool) -> None:
        """We have the kernel's lock, if there is one; is the owner written down there gone as well?"""
        if not owner:
            return
        if owner.get("host") == self._owner["host"]:
            if no_locks and _alive(owner.get("pid")):
                self._close()
                raise self._refusal(owner)
        elif self._age() < STALE_S:
            self._close()
            raise self._refusal(owner)
        self.recovered = f"took over the lock of process {owner.get('pid')} on {owner.get('host')}, which is gone"

    def _is_dead(self, owner: dict[str, Any]) -> bool:
        return owner.get("host") == self._owner["host"] and not _alive(owner.get("pid"))

    def _age(self) -> float:
        """Seconds since the last heartbeat by the file system's own clock, whatever this host's says."""
        probe = f"{self._path}.{os.getpid()}"
        try:
            with open(probe, "w"):
                now = os.stat(probe).st_mtime
            return now - os.stat(self._path).st_mtime
        finally:
            with contextlib.suppress(OSError):
                os.unlink(probe)

    def _write(self) -> None:
        text = json.dumps(self._owner).encode()
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, text, 0)

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    # -- object stores: best effort, since nothing there is exclusive

    def _take_remote(self) -> None:
        owner = _read_json(self._path)
        if owner and time.time() - owner.get("beat", 0) < STALE_S:
            here = owner.get("host") == self._owner["host"]
            if not here or _alive(owner.get("pid")):
                raise self._refusal(owner)
        if owner:
            self.recovered = f"took over the lock of process {owner.get('pid')} on {owner.get('host')}, which is gone"
        self._write_remote()

    def _write_remote(self) -> None:
        with fsspec.open(self._path, "w") as file:
            json.dump({**self._owner, "beat": time.time()}, file)

    # -- both

    def _beat(self) -> None:
        while not self._end.wait(HEARTBEAT_S):
            with contextlib.suppress(Exception):  # a missed beat isn't worth a run
                if self._remote:
                    self._write_remote()
                elif self._handle is not None:
                    os.utime(self._path)

    def _refusal(self, owner: dict[str, Any]) -> StorageError:
        who = f"process {owner['pid']} on {owner['host']} (since {owner['since']})" if owner else "another process"
        return StorageError(
            f"{self._folder}: in use by {who}; wait for it, stop it, or choose another run_dir. "
            f"If it is surely gone, remove {self._path}."
        )


def _filesystem(path: str) -> fsspec.AbstractFileSystem:
    return fsspec.core.url_to_fs(path)[0]


def _read_json(path: str) -> dict[str, Any]:
    try:
        with fsspec.open(path, "r") as file:
            value = json.load(file)
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


def _alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
