"""What a row is: kind of task, format, persona, first verb; by patterns, and rough.

The classes show that nine tenths of a set are maths, not what a single row is.
"""

from __future__ import annotations

import re
from typing import Any

from sftjax.curate import patterns
from sftjax.curate.rules import is_refusal
from sftjax.curate.text import Dialogue, spoken, words

TOKENS_PER_WORD = 1.4  # of English text with the vocabularies in use; only where no tokenizer is given
OPENING = 5  # words that make a template

_TASKS = (  # first that fits
    (
        "code",
        re.compile(
            r"```|\bdef \w+\(|#include|\bSELECT\b.+\bFROM\b|\bpublic static\b|</?\w+>.*</\w+>"
            r"|\b(?:python|javascript|java|c\+\+|sql|html|css|bash|regex|regular expression|function|algorithm"
            r"|code|program"
            r"|script|compile|debug|api)\b.{0,80}\b(?:write|implement|return|print|error|fix|function|loop|class)\b"
            r"|\b(?:write|implement|create|fix|debug)\b.{0,60}\b(?:function|script|program|query|code|class|regex)\b",
            re.I | re.S,
        ),
    ),
    (
        "maths",
        re.compile(
            r"\bhow (?:many|much)\b.*\d|\d.*\bhow (?:many|much)\b|\b(?:calculate|compute|solve|equation|integral"
            r"|derivative|probability|percent(?:age)?|sum of|product of|square root|triangle|geometry|algebra"
            r"|theorem|prove that)\b"
            r"|\d\s*[-+*/×÷^=]\s*\d",
            re.I | re.S,
        ),
    ),
    (
        "creative",
        re.compile(
            r"\b(?:write|compose|create|invent|make up|tell|generate|come up with|brainstorm)\b.{0,60}\b(?:story"
            r"|poem|song"
            r"|lyrics|haiku|limerick|joke|dialogue|slogan|tagline|fiction|novel|scene|plot|essay|speech|blog"
            r"|tweet|riddle"
            r"|names?|ideas?|letter|email|article|post|review|advert\w*)\b",
            re.I | re.S,
        ),
    ),
    (
        "formatting",
        re.compile(
            r"\b(?:rewrite|rephrase|paraphrase|reformat|format|summari[sz]e|summary|translate|convert|extract|classify"
            r"|categori[sz]e|sort|list|table|json|yaml|csv|xml|markdown|bullet|edit|proofread|correct the|fill in"
            r"|label)\b",
            re.I,
        ),
    ),
    (
        "reasoning",
        re.compile(
            r"\b(?:why|step by step|reason(?:ing)?|explain (?:how|why)|infer|deduce|logic\w*|puzzle|compare|contrast"
            r"|difference between|pros and cons|should i|what if|suppose|therefore|because|evaluate|analy[sz]e"
            r"|cause)\b",
            re.I,
        ),
    ),
)
_FACTUAL = re.compile(
    r"\b(?:what|who|when|where|which|whose|name the|define|describe|explain|is|are|does|do|did|can)\b", re.I
)
_ROLE_PLAY = re.compile(
    r"\b(?:act as|pretend (?:to be|you|that you)|role-?play|imagine (?:that )?you(?:'re| are)"
    r"|you are (?:now )?(?:a|an|the)\b"
    r"|take (?:on )?the role|in the (?:voice|style) of|from now on you)",
    re.I,
)
_PERSONA = re.compile(r"\byou(?:'re| are| play| act as)\b", re.I)
_VERB_LIST = """
write give explain describe create generate list find make tell identify provide suggest classify rewrite summarize
translate convert calculate compute compare design develop construct compose edit name choose select determine solve
answer discuss analyze evaluate predict propose outline categorize sort extract implement build plan draft rank show
help state define complete add remove replace arrange formulate come think imagine
"""
_SKIP_LIST = """
a an the of for to in on at by with from about and or me us you i my your his her its their our this that these those
some any following given below above two three four five one all each every short brief simple new good best possible
is are was were be been can could would should will please up out how what why when where who which it as into not no
more than most least long detailed
"""
_VERBS, _SKIP = frozenset(_VERB_LIST.split()), frozenset(_SKIP_LIST.split())


def describe(dialogue: Dialogue, tokens: int | None = None) -> dict[str, Any]:
    """A row in a few numbers and classes. `tokens` of all its text, where a tokenizer counted them."""
    first = dialogue.exchanges[0]
    count = sum(len(spoken(text)) for _, text in dialogue.messages)
    tokens = round(count * TOKENS_PER_WORD) if tokens is None else tokens
    formats = {format_of(exchange.response) for exchange in dialogue.exchanges}
    refusals = sum(is_refusal(exchange.plain) for exchange in dialogue.exchanges)
    prompts = "\n".join(exchange.instruction or "" for exchange in dialogue.exchanges)
    adversarial = bool(patterns.ADVERSARIAL.search(prompts))
    persona = bool(_PERSONA.search(dialogue.system))
    about = any(patterns.BOILERPLATE.search(exchange.plain) for exchange in dialogue.exchanges) if persona else False
    return {
        "tokens": tokens,
        "asked": sum(len(exchange.instruction_words) for exchange in dialogue.exchanges),
        "said": sum(len(exchange.response_words) for exchange in dialogue.exchanges),
        "turns": len(dialogue.exchanges),
        "task": task_of(dialogue, refusals > 0 or adversarial),
        "format": formats.pop() if len(formats) == 1 else "changing",
        "refusals": refusals,
        "adversarial": adversarial,
        "role_play": bool(_ROLE_PLAY.search(dialogue.system) or _ROLE_PLAY.search(prompts)),
        "persona": persona,
        "persona_broken": about,
        "opening": " ".join(words(first.response[:200])[:OPENING]),
        "asking": " ".join(words((first.instruction or "")[:200])[:OPENING]),
        "verb_noun": verb_noun(first.instruction or ""),
    }


def task_of(dialogue: Dialogue, safety: bool) -> str:
    """safety, code, maths, creative, formatting, reasoning, multi_turn, factual, text or other, by what is asked."""
    first = dialogue.exchanges[0]
    if first.instruction is None:
        return "text"
    if safety:
        return "safety"
    asked = first.instruction[:2000]
    for name, pattern in _TASKS:
        if pattern.search(asked) or (name == "code" and "```" in first.response):
            return name
    if len(dialogue.exchanges) > 2:
        return "multi_turn"
    return "factual" if _FACTUAL.search(asked) else "other"


def format_of(response: str) -> str:
    """What an answer looks like: code, table, json, list, headings or prose."""
    if "```" in response:
        return "code"
    text = response.strip()
    if text[:1] in "{[" and text[-1:] in "}]" and len(text) > 2:
        return "json"
    if len(re.findall(r"^\s*\|.*\|\s*$", text, re.M)) >= 2:
        return "table"
    if re.search(r"^#{1,4} ", text, re.M):
        return "headings"
    return "list" if len(re.findall(r"^\s*(?:[-*•]|\d+[.)])\s", text, re.M)) >= 2 else "prose"


def verb_noun(instruction: str) -> str:
    """The first verb of an instruction and what it is about, such as "write poem"; "" where there is no such verb."""
    found = words(instruction[:400])[:30]
    for place, word in enumerate(found[:12]):
        if word in _VERBS:
            noun = next((other for other in found[place + 1 :] if other not in _SKIP and not other.isdigit()), "")
            return f"{word} {noun}".strip()
    return ""
