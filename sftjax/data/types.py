"""What passes between the parts of the data wing: one training sample, and why a row gave none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Sample:
    """One training example: the ids, and how much each id counts as something to be predicted.

        tokens   <s> What ? \n Four . </s>
        weights   0   0   0  0   1  1  1     weights[i] belongs to tokens[i] as a *target*

    `weights[0]` is never used: nothing stands before the first token that could predict it.

    Attributes:
      tokens: int32 [n].
      weights: float32 [n]; 0 = not trained.
      source: number of the source in the mixture.
      index: row of its file, from 0.
      sample: counts from 0 where one row became several samples.
      flags: short slugs for the ledger: "straddle" (a token crosses the start of a trained span), "prompt_differs"
        (the prompt would be tokenised otherwise at generation), "control_text" (user text spelled a control token and
        was tokenised as plain text), "unrolled" (one of several samples of its conversation), "continued" (the
        generation prompt and what follows from it, which the template itself never writes so), "thinking_on" and
        "thinking_off" (the template's own switch was set for it), "lost_..." (see `conservation`).
      lost: lines for a person on the parts that the flags say are lost.
    """

    tokens: np.ndarray
    weights: np.ndarray
    source: int = 0
    index: int = 0
    sample: int = 0
    flags: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


class RowError(ValueError):
    """A row that gives no sample.

    Attributes:
      reason: short slug under which the ledger counts it, such as "no_assistant_turn".
      detail: one line for a person, without the row's place (the caller knows it).
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)  # both as args: the error crosses process borders by pickle
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
