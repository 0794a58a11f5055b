"""What the pages tell people to type: blocks of bash and commands within a sentence, as they stand there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
_INLINE = re.compile(r"`((?:python3? |bash |pip )[^`]+)`")
_UNCOMMENTED = re.compile(r"""^(?:'[^']*'|"[^"]*"|(?<=\S)\#|[^#'"])*""")


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    page: str
    line: int
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def commands(root: Path, page: Path) -> list[Command]:
    """The commands of a page in their order, a continued one as one line, comments left out."""
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(root))
    found: list[tuple[int, str]] = []
    for block in _BLOCK.finditer(text):
        if block[1] == "bash":
            found += _joined(block[2], text[: block.start()].count("\n") + 2)
    prose = _BLOCK.sub(lambda block: re.sub(r"[^\n]", " ", block[0]), text)
    for inline in _INLINE.finditer(prose):
        found.append((prose[: inline.start()].count("\n") + 1, " ".join(inline[1].split())))
    return [Command(name, line, command) for line, command in sorted(found)]


def json_block(root: Path) -> str:
    """The README's example of a row of data."""
    return next(block[2].strip() for block in _BLOCK.finditer((root / "README.md").read_text()) if block[1] == "json")


def _joined(block: str, line: int) -> list[tuple[int, str]]:
    found, start, parts = [], line, []
    for number, written in enumerate(block.splitlines(), line):
        if not parts:
            start = number
        part = _UNCOMMENTED.match(written)[0].strip()
        if part.endswith("\\"):
            parts.append(part[:-1].strip())
            continue
        if whole := " ".join(filter(None, [*parts, part])):
            found.append((start, whole))
        parts = []
    return found
