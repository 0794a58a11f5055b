"""Rules about answers: that they end, and what they say."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Any

from sftjax.curate.patterns import REFUSAL
from sftjax.doctor.figures import Figures, Verdict, words
from sftjax.scorers.statistics import repeated


def stop_token_untrained(run: Figures) -> Verdict:
    """A tenth of the conversations or more never train the token that ends an answer."""
    share = run.preflight.get("stop_trained")
    if share is None or share > 0.9:
        return None
    return (
        f"the token that ends an answer is trained in {share:.0%} of the conversations only",
        "data.train_on='all', and a {'path', 'format'} of its own in data.train for rows of another kind; "
        "tools/preview.py shows which rows train none",
    )


def stop_token_missing(run: Figures) -> Verdict:
    """generation_config.json doesn't name the token that the training taught to stop on: others would not stop."""
    taught = (run.model.get("stop_ids") or [None])[0]
    settings = run.base_files("generation_config.json")
    if taught is None or not settings or "eos_token_id" not in settings:
        return None
    named = settings["eos_token_id"]
    named = named if isinstance(named, list) else [named]
    if taught in named:
        return None
    return (
        f"answers end with token {taught}, but generation_config.json names {named}: other programs would not stop",
        f"export.merge=True (the export then names it), or add {taught} to eos_token_id there",
    )


def endless_answers(run: Figures) -> Verdict:
    """Two thirds of the answers don't stop within twice what the trained answers take."""
    if len(run.answers) < 3 or not run.preflight.get("samples"):
        return None
    usual = run.preflight["trained_tokens"] / run.preflight["samples"]  # of a conversation: an answer has fewer
    endless = [a for a in run.answers if a.get("finish_reason") == "length" and (a.get("num_tokens") or 0) > 2 * usual]
    if len(endless) < 2 / 3 * len(run.answers):
        return None
    remedy = f"train.num_train_epochs={max(2, round(2 * run.epochs))}"
    if run.preflight.get("truncated"):
        remedy = "data.over_length='drop' (a row that is cut loses its stop token)"
    return (
        f"{len(endless)} of {len(run.answers)} answers did not stop within {endless[0]['num_tokens']} tokens, where a "
        f"conversation has {usual:.0f} trained ones",
        remedy,
    )


def _worse(run: Figures, test: Callable[[str], bool], share: float) -> tuple[int, int] | None:
    """(answers with a flaw, answers) where it is at least a share of three or more, and more than before training."""
    flawed = sum(test(answer["answer"]) for answer in run.answers)
    if len(run.answers) < 3 or flawed < share * len(run.answers):
        return None
    before = sum(test(answer["answer"]) for answer in run.answers_before)
    if run.answers_before and flawed / len(run.answers) <= before / len(run.answers_before):
        return None
    return flawed, len(run.answers)


MARKUP = re.compile(
    r"<\|?(?:im_start|im_end|start_header_id|end_header_id|eot_id|start_of_turn|end_of_turn|endoftext|user|assistant|system)"
    r"\|?>|\[/?INST\]|<</?SYS>>|^\s*(?:### ?(?:Instruction|Response|Human|Assistant)\b|(?:user|assistant|system)\n)",
    re.I | re.M,
)


def empty_answers(run: Figures) -> Verdict:
    """Half of the answers or more have nothing in them."""

    def blank(answer: str) -> bool:  # spaces, and what has no width
        return all(unicodedata.category(character)[0] in "ZC" for character in answer)

    if not (found := _worse(run, blank, 0.5)):
        return None
    remedy = "data.train=('FILE',) without rows whose answers are empty or blank (tools/curate.py)"
    if run.setting("model.chat_template"):
        remedy = f"model.chat_template='' (the model's own), or {remedy}"
    return f"{found[0]} of {found[1]} answers are empty", remedy


def garbled_answers(run: Figures) -> Verdict:
    """A third of the answers or more hold template markup, or characters that are no text."""

    def garbled(answer: str) -> bool:
        odd = sum(character == "�" or (ord(character) < 32 and character not in "\n\t\r") for character in answer)
        return bool(MARKUP.search(answer)) or odd > 0.02 * len(answer)

    if not (found := _worse(run, garbled, 1 / 3)):
        return None
    remedy = f"train.learning_rate={run.lower_rate():g}"
    if run.setting("model.chat_template"):
        remedy = "model.chat_template='' (the model's own)"
    return f"{found[0]} of {found[1]} answers hold template markup, or characters that are no text", remedy


def loops(run: Figures) -> Verdict:
    """A third of the answers or more repeat themselves: half of their four-word runs were there before."""
    if not (found := _worse(run, lambda answer: len(words(answer)) >= 12 and repeated(words(answer)) > 0.5, 1 / 3)):
        return None
    return (
        f"{found[0]} of {found[1]} answers go round in circles",
        f"train.learning_rate={run.lower_rate():g}, and data.train without rows that repeat themselves "
        "(tools/curate.py); eval.repetition_penalty=1.1 hides it",
    )


def refusals(run: Figures) -> Verdict:
    """A third of the answers or more refuse, and more than before."""
    if not (found := _worse(run, lambda answer: bool(REFUSAL.search(answer)), 1 / 3)):
        return None
    return (
        f"{found[0]} of {found[1]} answers refuse",
        "data.train=('FILE',) with what tools/curate.py leaves of it (its rule `refusal` lists such rows)",
    )


def style_collapse(run: Figures) -> Verdict:
    """Three quarters of at least four answers begin with the same three words."""

    def opening(answer: dict[str, Any]) -> str:
        said = words(answer["answer"])[:3]
        return " ".join(said).lower() if len(said) == 3 else ""

    if len(run.answers) < 4 or len({json.dumps(answer.get("messages")) for answer in run.answers}) < 4:
        return None
    (common, count), *_ = Counter(map(opening, run.answers)).most_common(1)
    before = sum(opening(answer) == common for answer in run.answers_before)
    if not common or count < 0.75 * len(run.answers) or before >= count:
        return None
    return (
        f"{count} of {len(run.answers)} answers begin with {common!r} ({before} did before)",
        "data.train=('FILE',) balanced by tools/curate.py, and train.num_train_epochs=1",
    )
