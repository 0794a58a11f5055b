"""reasoning-gym's verifiers."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from sftjax.errors import ConfigError, DataError
from sftjax.scorers.rows import Row

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@functools.lru_cache
def task_of(task: str) -> Callable[..., float]:
    """A task's verifier: (answer, entry) -> score.

    Raises:
      ConfigError: no such task, or the package isn't there.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(f"scorer reasoning_gym:{task} needs the package: pip install reasoning-gym") from error
    try:
        return reasoning_gym.get_score_answer_fn(task)
    except (AttributeError, KeyError, ValueError) as error:
        raise ConfigError(f"scorer reasoning_gym:{task}: {error}") from error


def final_answer(text: str) -> str:
    """What stands in the last <answer>...</answer>, or all of the text."""
    tagged = _TAGGED.findall(text)
    return (tagged[-1] if tagged else text).strip()


def verified(row: Row, answer: str, argument: Any = "") -> float:
    """Row: an entry of the task's data set: question, answer, metadata."""
    metadata = row.get("metadata")
    task = argument or (metadata or {}).get("source_dataset")
    if not isinstance(metadata, dict) or not task:
        raise DataError("scorer reasoning_gym: a row has no metadata of its task; write whole entries of the data set")
    return float(task_of(task)(final_answer(answer), dict(row)))
