"""The tokenizer of a model folder, with what training needs beside it: stop tokens, pad, template."""

from __future__ import annotations

from pathlib import Path


class Tokenizer:
    """A fast tokenizer with its chat template. Picklable (worker processes get a copy)."""

    eos_id: int | None
    bos_id: int | None
    pad_id: int  # never needed to be distinct from eos: padding is found by position, not by id
    vocab_size: int  # len(tokenizer), added tokens included
    stop_ids: tuple[int, ...]
    added_tokens: tuple[str, ...]  # tokens that are new to the model: its embedding grows by these

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; control tokens spelled in it are control tokens; nothing is added in front or behind."""
        raise NotImplementedError

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` as plain text, even where it spells a control token."""
        raise NotImplementedError

    def decode(self, ids, *, skip_special: bool = False) -> str:
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hex digest of everything that decides ids: tokenizer, template text, end-of-turn, added tokens."""
        raise NotImplementedError

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer files and chat_template.jinja."""
        raise NotImplementedError


def load(path: str | Path, *, chat_template: str | None = None, end_of_turn: str | None = None) -> Tokenizer:
    """Loads the tokenizer of an HF folder, or of one with only a SentencePiece `tokenizer.model`.

    Args:
      path: folder.
      chat_template: name of a built-in template (see `templates.BUILTIN`), a file with Jinja text, or None for the
        folder's own.
      end_of_turn: token that ends an assistant turn, in place of the template's own.
    """
    raise NotImplementedError
