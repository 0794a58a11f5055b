"""From a scorer's name to the function."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sftjax.errors import ConfigError, DataError, UserError
from sftjax.scorers import formats, gym, ifeval, matches, programs
from sftjax.scorers.rows import Row

Scorer = Callable[[Row, str], float]
Spec = str | Mapping[str, Any]

# name -> (row, answer, argument) -> score; the argument is what stands behind the name and a colon, "" without
_SCORERS: dict[str, Callable[[Row, str, Any], float]] = {
    "exact": matches.exact,
    "normalized": matches.normalized,
    "contains": matches.contains,
    "choice": matches.choice,
    "numeric": matches.numeric,
    "gsm8k": matches.gsm8k,
    "regex": matches.regex,
    "json": formats.valid_json,
    "json_schema": formats.json_schema,
    "code_fences": formats.code_fences,
    "length": formats.length,
    "ifeval": ifeval.strict,
    "ifeval_loose": ifeval.loose,
    "ifeval_instructions": ifeval.instructions,
    "tests": programs.passes,
    "reasoning_gym": gym.verified,
}
_RUNS_CODE = {"tests"}
_TAKES_ARGUMENT = {"numeric", "regex", "json", "json_schema", "length", "tests", "reasoning_gym"}


def make_scorer(spec: Spec | Scorer, *, allow_code: bool = False) -> Scorer:
    """A function (row, answer) -> score. Scores are between 0 and 1 (1: right), but for functions of your own.

    Args:
      spec: a name, mostly with an argument behind a colon, or {"scorer": NAME, "argument": ..., "name": ...}:

        exact                  the answer is the expected text, outer blanks apart
        normalized             the same, letter case, punctuation and English articles apart
        contains               the expected text's words occur in the answer, normalised as above
        choice                 the option's letter that the answer settles on is the expected one
        numeric[:TOLERANCE]    the answer's number is the expected one's: the one behind '####', in \\boxed{}, or the
                               last one; TOLERANCE is relative
        gsm8k                  the same, but the answer must have it behind '####'
        regex[:PATTERN]        the pattern, or the row's `pattern`, is found in the answer
        json[:fenced]          the answer is JSON; "fenced": or the only code block in it is
        json_schema[:FILE]     it is (fenced or not) and fits the schema in the file, or in the row's `schema`
        code_fences            every code fence that is opened is closed
        length:LOW-HIGH[UNIT]  so many words (or "chars", "sentences"); one bound may be left out
        ifeval                 all instructions of an IFEval row are followed
        ifeval_loose           the same, first and last line and asterisks apart
        ifeval_instructions    the share of its instructions that are followed
        tests[:SECONDS]        the program in the answer passes the row's `test` (HumanEval) or `test_list` (MBPP). Runs
                               the model's code in a child process: only with `allow_code`
        reasoning_gym[:TASK]   its verifier; without TASK that of the row's metadata (needs the package)
        FILE.py:FUNCTION       your function (row, answer) -> number or bool

      allow_code: whether programs that a model wrote may be run. They are limited in time, memory and file sizes, but
        not kept from the network or from reading files: use a machine or a container that can be lost.

    Raises:
      ConfigError: no such scorer, or not allowed; names what there is.
      (later) DataError: a row lacks what the scorer needs; names the fields.
    """
    if callable(spec):
        return spec
    name, argument = _parse(spec)
    if name.endswith(".py"):
        return _own(name, str(argument))
    if name not in _SCORERS:
        raise ConfigError(f"scorer {name!r} is unknown: choose one of {', '.join(_SCORERS)}, or FILE.py:FUNCTION")
    if name in _RUNS_CODE and not allow_code:
        raise ConfigError(f"scorer {name!r} runs code that the model wrote: add --allow_code where that may be done")
    if argument and name not in _TAKES_ARGUMENT:
        raise ConfigError(f"scorer {name!r} takes no argument, so not {argument!r}")
    if name == "length" and not argument:
        raise ConfigError(f"scorer {name!r} needs an argument, such as {name}:10-100words")
    function = functools.partial(_SCORERS[name], argument=argument)
    checks = {"numeric": matches.tolerance_of, "regex": matches.pattern_of, "length": formats.bounds_of}
    checks |= {"json_schema": formats.schema_of, "tests": programs.seconds_of, "reasoning_gym": gym.task_of}
    if argument and name in checks:
        checks[name](argument)  # a bad argument is said now, not at the first row
    return function


def make_scorers(specs: Sequence[Spec], *, allow_code: bool = False) -> dict[str, Scorer]:
    """Several, by name."""
    return {scorer_name(spec): make_scorer(spec, allow_code=allow_code) for spec in specs}


def scorer_name(spec: Spec | Scorer) -> str:
    """What the scorer's results are filed under."""
    if callable(spec):
        return getattr(spec, "__name__", "scorer")
    if isinstance(spec, Mapping) and spec.get("name"):
        return str(spec["name"])
    name, argument = _parse(spec)
    if name.endswith(".py"):
        return f"{os.path.basename(name)}:{argument}"
    return f"{name}:{argument}" if argument and isinstance(argument, str) else name


def _parse(spec: Spec) -> tuple[str, Any]:
    if isinstance(spec, Mapping):
        unknown = set(spec) - {"scorer", "argument", "name"}
        if unknown or "scorer" not in spec:
            raise ConfigError(f"scorer {dict(spec)!r}: give scorer, and argument and name where wanted; nothing else")
        name, argument = _parse(spec["scorer"])
        return name, spec.get("argument", argument)
    if ".py:" in spec:
        path, _, function = spec.rpartition(":")
        return path, function
    name, _, argument = spec.partition(":")
    return name, argument


def _own(path: str, function: str) -> Scorer:
    """A function of the user's own file, its results made floats."""
    where = importlib.util.spec_from_file_location("sftjax_scorer_" + os.path.basename(path)[:-3], path)
    if where is None or not os.path.exists(path):
        raise ConfigError(f"scorer {path}:{function}: there is no such file")
    module = importlib.util.module_from_spec(where)
    try:
        where.loader.exec_module(module)
        chosen = getattr(module, function)
    except Exception as error:  # whatever the user's file raises
        raise ConfigError(f"scorer {path}:{function}: {type(error).__name__}: {error}") from error

    def score(row: Row, answer: str) -> float:
        try:
            return float(chosen(row, answer))
        except UserError:
            raise
        except Exception as error:
            raise DataError(f"scorer {path}:{function}: {type(error).__name__}: {error}") from error

    return score
