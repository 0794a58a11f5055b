"""What a message says of its own weight in the loss: the spellings that are honoured, and those that are refused."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sftjax.data.types import RowError

SWITCHES = ("train", "training", "trainable", "loss")  # true or false
NUMBERS = ("weight", "loss_weight", "loss_scale")  # 0 or more
_REFUSED = {
    "train_detail": "spans by character aren't read: split the message where training begins, or give the whole "
    "message train or weight",
    "mask": "in some sets it means trained and in others not: rename it to train (true = trained)",
}
KEYS = frozenset((*SWITCHES, *NUMBERS, *_REFUSED))
_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).smallest_subnormal)


def weight_of(message: Mapping, number: int) -> float | None:
    """The weight that a message asks for; None where it says nothing.

    Raises:
      RowError: a value that can't be, keys that contradict each other, or one that isn't read.
    """
    if KEYS.isdisjoint(message):
        return None
    for key, remedy in _REFUSED.items():
        if message.get(key) is not None and message[key] != []:
            raise RowError(f"unread_{key}", f"message {number} has {key}: {remedy}")
    wishes = {key: _switch(message[key], key, number) for key in SWITCHES if message.get(key) is not None}
    wishes |= {key: _number(message[key], key, number) for key in NUMBERS if message.get(key) is not None}
    if not wishes:
        return None
    numbers = {value for key, value in wishes.items() if key in NUMBERS}
    if len(numbers) > 1 or len({value > 0 for value in wishes.values()}) > 1:
        said = ", ".join(f"{key}={message[key]!r}" for key in wishes)
        raise RowError("bad_weight", f"message {number}: {said} contradict each other: leave one")
    return numbers.pop() if numbers else next(iter(wishes.values()))


def problem_with(weight) -> str | None:
    """Why something can't be a weight, in words; None where it can."""
    if isinstance(weight, (bool, np.bool_)) or not isinstance(weight, (int, float, np.number)):
        return "is not a number"
    if not 0 <= weight <= _LARGEST:  # NaN too
        return "is not a finite number from 0 up (as float32)"
    return "is 0 as float32" if 0 < weight < _SMALLEST else None


def _switch(value, key: str, number: int) -> float:
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise RowError("bad_weight", f"message {number}: {key} is {value!r}, not true or false")
    return float(value)


def _number(value, key: str, number: int) -> float:
    if problem := problem_with(value):
        raise RowError("bad_weight", f"message {number}: {key} {value!r} {problem}")
    return float(value)
