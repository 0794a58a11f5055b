"""A model's folder, local or remote (`gs://`, through fsspec), read by byte ranges.

File names that come from a checkpoint's own index are not trusted: only plain names inside the folder are opened,
and a symbolic link may not lead out of it.
"""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path

import fsspec
import numpy as np

from sftjax.errors import ConfigError, StorageError
from sftjax.utils.storage import is_remote

_PLAIN_NAME = re.compile(r"[\w][\w.\-]{0,200}", re.ASCII)


class Folder:
    """The files of one folder."""

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        self.remote = is_remote(path)
        if self.remote:
            self._fs, self._root = fsspec.core.url_to_fs(self.path)
        else:
            self._root = os.path.realpath(self.path)

    def names(self) -> list[str]:
        """Names of the files in it, sorted."""
        try:
            if self.remote:
                return sorted(os.path.basename(entry.rstrip("/")) for entry in self._fs.ls(self._root, detail=False))
            return sorted(entry.name for entry in os.scandir(self._root) if entry.is_file())
        except OSError as error:
            raise StorageError(f"{self.path}: can't be listed ({error})") from error

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def read_bytes(self, name: str, limit: int = 256 * 2**20) -> bytes:
        """A whole small file.

        Raises:
          StorageError: it can't be read, or is larger than `limit` bytes.
        """
        with self.open(name) as file:
            if file.size > limit:
                raise StorageError(f"{self.path}/{name}: {file.size:,} bytes; at most {limit:,} are read")
            return file.read(0, file.size)

    def open(self, name: str) -> RangeFile:
        """One file for reading ranges.

        Raises:
          ConfigError: the name isn't a plain file name, or a link leads out of the folder.
          StorageError: it can't be opened.
        """
        if not _PLAIN_NAME.fullmatch(name):
            raise ConfigError(f"{self.path}: the file name {name[:80]!r} isn't a plain name inside the folder")
        if self.remote:
            return RangeFile(f"{self._root.rstrip('/')}/{name}", self._fs)
        path = os.path.join(self._root, name)
        target = os.path.realpath(path)
        if not any(os.path.commonpath([target, root]) == root for root in self._allowed_roots()):
            raise ConfigError(f"{path}: a symbolic link leads out of the folder, to {target}; copy the file instead")
        return RangeFile(target)

    def _allowed_roots(self) -> list[str]:
        """The folder, and for a snapshot in the hub's cache its `blobs`, where all its links point."""
        root = Path(self._root)
        cached = root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")
        return [self._root, str(root.parent.parent / "blobs")] if cached else [self._root]


class RangeFile:
    """A file read by ranges. `bytes_read` counts what was asked for."""

    def __init__(self, path: str | os.PathLike, filesystem: fsspec.AbstractFileSystem | None = None):
        self.path, self.bytes_read, self._fs, self._fd = str(path), 0, filesystem, -1
        try:
            if filesystem is not None:
                self.size = int(filesystem.size(self.path))
            else:
                self._fd = os.open(self.path, os.O_RDONLY)
                self.size = os.fstat(self._fd).st_size
                if not os.path.isfile(self.path):
                    raise StorageError(f"{self.path}: not a regular file")
        except OSError as error:
            raise StorageError(f"{self.path}: can't be opened ({error.strerror or error})") from error

    def __enter__(self) -> RangeFile:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, start: int, count: int) -> bytes:
        out = bytearray(count)
        self.read_into(start, memoryview(out))
        return bytes(out)

    def read_into(self, start: int, out: memoryview) -> None:
        """Fills `out` (bytes, contiguous) from the offset `start`; no intermediate copy for local files."""
        self.bytes_read += len(out)
        if self._fs is not None:
            out[:] = self._fs.cat_file(self.path, start=start, end=start + len(out))
            return
        done = 0
        while done < len(out):  # one call reads at most 2 GiB
            got = os.preadv(self._fd, [out[done : done + 2**30]], start + done)
            if got == 0:
                raise StorageError(f"{self.path}: ends at byte {start + done:,}, but more is expected; truncated?")
            done += got

    def read_strided(self, start: int, dtype: np.dtype, shape: tuple[int, ...], index: tuple, out: np.ndarray) -> None:
        """Copies `index` of the array stored at `start` into `out`. Only the pages touched are read, and none kept."""
        self.bytes_read += out.size * dtype.itemsize
        count = int(np.prod(shape)) * dtype.itemsize
        if self._fs is not None:
            block = np.frombuffer(self._fs.cat_file(self.path, start=start, end=start + count), dtype)
            copy_converted(block.reshape(shape)[index], out)
            return
        page = start - start % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self._fd, start - page + count, offset=page, access=mmap.ACCESS_READ)
        view = np.frombuffer(mapped, dtype, count=count // dtype.itemsize, offset=start - page).reshape(shape)
        copy_converted(view[index], out)
        del view
        mapped.close()


def copy_converted(source: np.ndarray, out: np.ndarray) -> None:
    """`out[...] = source` with the fast way from bfloat16 to float32 (a shift)."""
    if source.dtype.name == "bfloat16" and out.dtype == np.float32:
        np.left_shift(source.view(np.uint16), np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
    else:
        out[...] = source
