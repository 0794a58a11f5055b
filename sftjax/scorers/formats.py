"""Scorers of an answer's form."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from sftjax.errors import ConfigError
from sftjax.scorers import schema as schemas
from sftjax.scorers.rows import Row, field_of

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)
_LENGTH = re.compile(r"(\d*)-(\d*)\s*(words|chars|sentences)?")
_SENTENCE_END = re.compile(r"""[.!?…。！？]+["'”’)\]]*(?=\s|$)""")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|etc|No|Fig|Inc|Ltd|[A-Z]|(?:[A-Za-z]\.)+[A-Za-z])\.$")


def code_blocks(text: str) -> tuple[list[tuple[str, str]], bool]:
    """Fenced code blocks as (language, code), and whether the last fence was closed (CommonMark's rules)."""
    blocks, opened = [], None
    for fence in _FENCE.finditer(text):
        marks, info = fence[1], fence[2].strip()
        if opened is None:
            if "`" not in info:
                opened = (marks, info, fence.end() + 1)
        elif marks[0] == opened[0][0] and len(marks) >= len(opened[0]) and not info:
            blocks.append((opened[1].split(" ")[0].lower(), text[opened[2] : max(opened[2], fence.start() - 1)]))
            opened = None
    if opened is not None:
        blocks.append((opened[1].split(" ")[0].lower(), text[opened[2] :]))
    return blocks, opened is None


def code_fences(row: Row, answer: str, argument: str = "") -> float:
    return float(code_blocks(answer)[1])


def parse_json(answer: str, *, fenced: bool) -> tuple[bool, Any]:
    """Whether the whole answer (or the only code block in it) is JSON, and its value. NaN and Infinity aren't JSON."""
    blocks, closed = code_blocks(answer) if fenced else ([], True)
    texts = [answer, *([blocks[0][1]] if len(blocks) == 1 and closed else [])]
    for text in texts:
        try:
            return True, json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            continue
    return False, None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def valid_json(row: Row, answer: str, argument: str = "") -> float:
    return float(parse_json(answer, fenced=argument == "fenced")[0])


@functools.lru_cache
def _schema_file(path: str) -> schemas.Schema:
    try:
        with open(path, encoding="utf-8") as file:
            schema = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"scorer json_schema:{path}: not a JSON file ({error})") from error
    schemas.check(schema)
    return schema


def schema_of(argument: Any) -> schemas.Schema:
    """The schema that an argument means: itself, or a file's."""
    if isinstance(argument, Mapping):
        schemas.check(argument)
        return argument
    return _schema_file(str(argument))


def json_schema(row: Row, answer: str, argument: Any = "") -> float:
    if argument:
        schema = schema_of(argument)
    else:
        schema = field_of(row, "schema", "json_schema")
        schema = json.loads(schema) if isinstance(schema, str) else schema
        schemas.check(schema)
    is_json, value = parse_json(answer, fenced=True)
    return float(is_json and schemas.problem(value, schema) is None)


def sentences(text: str) -> int:
    """How many sentences, by their ends; initials and a few abbreviations end none."""
    text = text.strip()
    count = last = 0
    for end in _SENTENCE_END.finditer(text):
        if not _ABBREVIATION.search(text[: end.start() + 1]) and re.search(r"\w", text[last : end.end()]):
            count, last = count + 1, end.end()
    return count + bool(re.search(r"\w", text[last:]))


def bounds_of(argument: str) -> tuple[int, float, str]:
    """(lowest, highest, unit) of LOW-HIGH[UNIT]."""
    found = _LENGTH.fullmatch(argument.strip())
    if not found or not (found[1] or found[2]):
        raise ConfigError(f"scorer length:{argument}: write LOW-HIGH, then words, chars or sentences (10-100words)")
    return int(found[1] or 0), float(found[2] or "inf"), found[3] or "words"


def length(row: Row, answer: str, argument: str) -> float:
    low, high, unit = bounds_of(argument)
    count = sentences(answer) if unit == "sentences" else len(answer if unit == "chars" else answer.split())
    return float(low <= count <= high)
