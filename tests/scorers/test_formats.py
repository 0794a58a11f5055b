"""Forms of answers: JSON, schemas, fences, lengths."""

import json

import pytest

from sftjax.errors import ConfigError
from sftjax.scorers import make_scorer
from sftjax.scorers import schema as schemas
from sftjax.scorers.formats import code_blocks, sentences


def test_code_fences():
    closed = "Look:\n```python\nx = '```'\n```\nand\n~~~\ntext\n~~~"
    assert code_blocks(closed) == ([("python", "x = '```'"), ("", "text")], True)
    score = make_scorer("code_fences")
    texts = (closed, "none", "```py\nx", "````\n```\n", "```\na\n```\n```")
    assert [score({}, text) for text in texts] == [1, 1, 0, 0, 0]  # fmt: skip
    assert code_blocks("```\n```") == ([("", "")], True)


def test_json_whole_or_fenced():
    whole, fenced = make_scorer("json"), make_scorer("json:fenced")
    cases = {'{"a": 1}': (1, 1), "```json\n[1]\n```": (0, 1), "{'a': 1}": (0, 0), "NaN": (0, 0), "": (0, 0)}
    cases |= {"Here:\n```\n{}\n```\nand ```": (0, 1), "```json\n[1]": (0, 0), "[" * 100_000: (0, 0)}
    for text, expected in cases.items():
        assert (whole({}, text), fenced({}, text)) == expected, text[:20]


PERSON = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 2, "pattern": "^[A-Z]"},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 150},
        "kind": {"enum": ["cat", 1, None]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "uniqueItems": True, "maxItems": 3},
        "pair": {"prefixItems": [{"type": "string"}, {"type": "number"}], "items": False},
        "either": {"oneOf": [{"multipleOf": 2}, {"multipleOf": 3}]},
        "not_text": {"not": {"type": "string"}},
    },
    "$defs": {"tag": {"type": "string"}},
}
VALUES = [
    {"name": "Ann"},
    {"name": "A"},
    {"name": "ann"},
    {},
    {"name": "Ann", "age": 3.0},
    {"name": "Ann", "age": 3.5},
    {"name": "Ann", "age": True},
    {"name": "Ann", "age": 150},
    {"name": "Ann", "kind": None},
    {"name": "Ann", "kind": True},
    {"name": "Ann", "tags": ["a", "b"]},
    {"name": "Ann", "tags": ["a", "a"]},
    {"name": "Ann", "tags": ["a", 1]},
    {"name": "Ann", "pair": ["a", 1]},
    {"name": "Ann", "pair": ["a", 1, 2]},
    {"name": "Ann", "either": 4},
    {"name": "Ann", "either": 6},
    {"name": "Ann", "not_text": "x"},
    {"name": "Ann", "other": 1},
    [],
]


def test_schemas_agree_with_jsonschema():
    fits = [schemas.problem(value, PERSON) is None for value in VALUES]
    assert fits == [place in (0, 4, 8, 10, 13, 15) for place in range(len(VALUES))]
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema, to compare with, is not installed")
    assert fits == [jsonschema.Draft202012Validator(PERSON).is_valid(value) for value in VALUES]


def test_a_schema_from_a_file_a_row_or_a_spec(tmp_path):
    (tmp_path / "person.json").write_text(json.dumps(PERSON))
    answer, row = '```json\n{"name": "Ann"}\n```', {"schema": PERSON}
    for scorer in (f"json_schema:{tmp_path}/person.json", "json_schema", {"scorer": "json_schema", "argument": PERSON}):
        assert make_scorer(scorer)(row, answer) == 1.0
        assert make_scorer(scorer)(row, '{"name": 5}') == 0.0
    with pytest.raises(ConfigError, match="'dependentRequired' isn't understood"):
        make_scorer({"scorer": "json_schema", "argument": {"properties": {"a": {"dependentRequired": {}}}}})
    with pytest.raises(ConfigError, match="no type 'text'"):
        schemas.check({"type": "text"})
    with pytest.raises(ConfigError, match="nothing at '#/missing'"):
        schemas.problem(1, {"$ref": "#/missing"})


def test_lengths():
    assert sentences("Dr. Smith came at 3.5 p.m. today! Did he? Yes...") == 3
    assert sentences("no end") == 1 and sentences("...") == 0 and sentences("J. R. Ewing left.") == 1
    text = "One two three. Four five."
    for spec, fits in {
        "3-5words": 1,
        "6-words": 0,
        "-25chars": 1,
        "-24": 1,
        "2-2sentences": 1,
        "1-1sentences": 0,
    }.items():
        assert make_scorer(f"length:{spec}")({}, text) == fits, spec
