"""Distillation: a teacher's answers to given prompts. Magpie: the prompts too, from an aligned model and nothing else.

Magpie     <|im_start|>user\\n  --teacher-->  a question<|im_end|>  --teacher-->  an answer      (arXiv:2406.08464)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sftjax.scorers.rows import messages_of
from sftjax.synth import text
from sftjax.synth.asking import Asker, Filters
from sftjax.synth.rejection import Made
from sftjax.synth.teacher import Conversation, Reply, Sampling

MIN_WORDS, MAX_WORDS = 3, 300  # of a question


def distill(rows: Sequence[Mapping[str, Any]], asker: Asker, sampling: Sampling) -> Made:
    """The teacher's answer to each prompt (see `scorers.rows`), unless it is empty, cut off or a refusal."""
    filters = Filters()
    found = answered([messages_of(row) for row in rows], asker, sampling, filters)
    made = [{"messages": messages, "method": "distill", "index": index} for index, messages in found]
    report = {"method": "distill", "prompts": len(rows), "rows": len(made), "filters": filters.as_dict()}
    return Made(made, report)


def answered(
    conversations: Sequence[Conversation], asker: Asker, sampling: Sampling, filters: Filters
) -> list[tuple[int, list[Mapping[str, Any]]]]:
    """(number of the conversation, it with the teacher's answer) of those whose answer can be used."""
    replies = asker.chat(conversations, sampling, what="answers")
    return [
        (number, [*conversations[number], {"role": "assistant", "content": reply.text.strip()}])
        for number, reply in enumerate(replies)
        if filters.first(answer_checks(reply)) is None
    ]


def answer_checks(reply: Reply) -> list[tuple[str, bool]]:
    """Why an answer isn't used, in order."""
    return [
        ("answer_empty", not reply.text.strip()),
        ("answer_cut_off", reply.cut),
        ("answer_refuses", text.is_refusal(reply.text)),
    ]


def magpie(count: int, asker: Asker, sampling: Sampling, *, prefix: str, end_of_turn: str = "") -> Made:
    """Questions that the teacher writes behind the template's opening of a user's turn, and its answers to them.

    Args:
      count: questions to draw; fewer rows come out.
      prefix: what the template writes in front of a user's first message (`teacher.query_prefix`).
      end_of_turn: text that ends the question where the teacher, behind a URL, doesn't stop there by itself.
    """
    filters = Filters()
    drawn = dataclasses.replace(sampling, stop=(*sampling.stop, end_of_turn) if end_of_turn else sampling.stop)
    known: set[str] = set()
    questions = []
    for reply in asker.complete([prefix] * count, drawn, what="questions"):
        question = reply.text.strip()
        length = len(question.split())
        checks = [
            ("question_cut_off", reply.cut),
            ("question_too_short", length < MIN_WORDS),
            ("question_too_long", length > MAX_WORDS),
            ("question_known", text.key(question) in known),
        ]
        if filters.first(checks) is None:
            known.add(text.key(question))
            questions.append(question)
    asked = [[{"role": "user", "content": question}] for question in questions]
    made = answered(asked, asker, sampling, filters)
    rows = [{"messages": messages, "method": "magpie", "index": index} for index, messages in made]
    report = {"method": "magpie", "prompts": count, "rows": len(rows), "filters": filters.as_dict()}
    return Made(rows, report)
