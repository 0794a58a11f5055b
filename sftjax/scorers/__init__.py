"""Scorers: how good an answer is, as a number from the row and the answer's text alone. No model, no jax.

    scorer = make_scorer("numeric")
    scorer({"question": "6 * 12?", "answer": "6 * 12 = 72\n#### 72"}, "That makes 72.")    # 1.0

See `make.make_scorer` for the names.
"""

from sftjax.scorers.make import Scorer, make_scorer, make_scorers, scorer_name
from sftjax.scorers.rows import expected_of, messages_of

__all__ = ["Scorer", "expected_of", "make_scorer", "make_scorers", "messages_of", "scorer_name"]
