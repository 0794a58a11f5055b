"""Files that appear whole: written aside, synced, and renamed, so that a reader, a crash or a full disk finds the old
content or the new one, and never a part.

    .NAME.partial   being written; what a killed process left is overwritten by the next one
    NAME            complete, and on the disk before `whole_file` returns

In a bucket (any path with "://") objects appear whole by themselves once they are closed; there the content is gathered
in a temporary file first, because closing an object after an error would commit what there is of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

import fsspec

from sftjax.errors import StorageError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_remote(path: str | os.PathLike[str]) -> bool:
    return "://" in str(path)


def failure(path: str | os.PathLike[str], error: OSError) -> StorageError:
    """The one line for a file or folder that can't be written, with what helps."""
    remedy = "make room" if error.errno in NO_ROOM else "choose another place, or repair this one"
    return StorageError(
        f"{path}: can't be written ({error.strerror or error}); {remedy}, then run the same command again"
    )


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file to write that takes its name when the block ends; if the block raises, nothing is changed.

    Args:
      path: local, or with "://"; its folder is made.

    Raises:
      StorageError: it can't be written; raised on entry where that is known then.
    """
    path = str(path)
    with _as_storage_error(path), _writing(path) as file:
        yield file
    moment("file written", path)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file in one piece; see `whole_file`."""
    with whole_file(path) as file:
        file.write(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file in one piece, as UTF-8; see `whole_file`."""
    write_bytes(path, text.encode("utf-8", errors="surrogatepass"))


def moment(name: str, *details: Any) -> None:
    """Names a moment of the program, as the audit event "sftjax.NAME".

    Costs a tenth of a microsecond and does nothing, unless somebody listens (`sys.addaudithook`): tests do, to bring
    about a fault exactly there.
    """
    sys.audit(f"sftjax.{name}", *details)


def fsync(path: str | os.PathLike[str]) -> None:
    """Asks the system to write a file or a folder's names to disk, where it can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:  # not every file system can
        pass
    finally:
        os.close(handle)


@contextlib.contextmanager
def _as_storage_error(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.filename is not None and os.path.basename(str(error.filename)) not in _names(path):
            raise  # of a file that the block itself opened
        raise failure(path, error) from error


def _names(path: str) -> tuple[str, str, str]:
    """What the failing file can be called: itself, written aside, or the folder that it goes into."""
    name, folder = os.path.basename(path), os.path.basename(os.path.dirname(os.path.abspath(path)))
    return name, f".{name}.partial", folder


def _writing(path: str) -> contextlib.AbstractContextManager[BinaryIO]:
    return _writing_remote(path) if is_remote(path) else _writing_local(path)


@contextlib.contextmanager
def _writing_local(path: str) -> Iterator[BinaryIO]:
    target = Path(os.path.abspath(path))
    aside = target.with_name(f".{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder is in its place", path)
    if target.exists() and not target.is_file():  # a pipe or a terminal, which nothing may replace
        with open(target, "wb") as file:
            yield file
        return
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        moment("file renaming", path)
        os.replace(aside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    fsync(target.parent)


@contextlib.contextmanager
def _writing_remote(path: str) -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile() as gathered:
        yield gathered
        gathered.seek(0)
        with fsspec.open(path, "wb") as file:
            _copy(gathered, file)


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    shutil.copyfileobj(source, target, 2**22)
