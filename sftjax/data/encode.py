"""From a row of a file to training samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sftjax.data.tokenizer import Tokenizer
from sftjax.data.types import RowError, Sample


class RowEncoder:
    """Encodes rows; picklable; the same row always gives the same samples."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        format: str = "auto",
        fields: Mapping[str, str] | None = None,
        train_on: str = "all",
        system: str | None = None,
        on_mask_error: str = "drop",
    ):
        self.tokenizer = tokenizer

    def __call__(self, row: dict, index: int = 0, source: int = 0) -> list[Sample]:
        """Samples of one row; raises RowError when it gives none."""
        raise NotImplementedError

    def encode_batch(self, rows: Sequence[dict], indices: Sequence[int], source: int = 0) -> list[list[Sample] | RowError]:
        """The same for many rows at once (faster: one call into the tokenizer); errors are returned in their place."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hex digest of tokenizer, template, format and policy."""
        raise NotImplementedError
