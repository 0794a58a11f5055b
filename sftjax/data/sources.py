"""Files of rows with random access."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Source(Protocol):
    """Rows of one file, by number. Picklable; opens its file again in another process."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index` (of the slice). Raises types.RowError when the row can't be read."""
        ...

    def location(self, index: int) -> str:
        """Where row `index` stands, such as "train.jsonl:17" (lines count from 1)."""
        ...

    def fingerprint(self) -> str:
        """Hex digest of the content and of the slice."""
        ...


def open_source(spec: Mapping[str, Any] | str) -> Source:
    """Opens a source.

    Args:
      spec: a path, or a mapping with `path` (local, gs:// or any fsspec address, "tfds:name", "hub:owner/name") and
        optionally `slice` ("train[:1000]", "[:10%]"), `name`. Other keys (format, fields, weight) are the caller's.
    """
    raise NotImplementedError
