"""Quality rules: small functions of one exchange, and the tables that weigh them.

A rule answers with True or False, or with a share from 0 to 1. The score of a row starts at 1, each rule takes off
its weight times its answer, and 0 is the floor. In a conversation of several exchanges a rule that `spreads` takes off
its weight in proportion to the exchanges that it found; another takes it off when it found one.

`guide` is the preset of a well-known guide to instruction tuning, to the letter; `default` has all rules.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from sftjax.curate import patterns
from sftjax.curate.language import ABOUT_LANGUAGES, WITH_LATIN_LETTERS, language, scripts
from sftjax.curate.text import Dialogue, Exchange, spoken, words
from sftjax.data import processes
from sftjax.errors import ConfigError

Check = Callable[[Exchange], float]


@dataclass(frozen=True)
class Rule:
    """A named check with what it takes off the score."""

    name: str
    check: Check
    weight: float
    spreads: bool = False

    @property
    def about(self) -> str:
        check = self.check.func if isinstance(self.check, partial) else self.check
        return (check.__doc__ or "").strip().split("\n")[0]


def score(dialogue: Dialogue, rules: Sequence[Rule]) -> tuple[float, dict[str, float]]:
    """The score of a row, and what each rule that found something took off.

    Raises:
      ConfigError: a rule failed.
    """
    taken: dict[str, float] = {}
    for rule in rules:
        try:
            answers = [float(rule.check(exchange)) for exchange in dialogue.exchanges]
        except Exception as error:  # whatever a user's own rule raises
            raise ConfigError(f"rule {rule.name} failed: {type(error).__name__}: {error}") from error
        answer = sum(answers) / len(answers) if rule.spreads else max(answers)
        if answer:
            taken[rule.name] = round(rule.weight * answer, 6)
    return max(0.0, round(1 - sum(taken.values()), 6)), taken


# --- length ---------------------------------------------------------------------------------------------------------


def empty_response(exchange: Exchange) -> bool:
    """The response is empty or blank."""
    return not exchange.response.strip() and not exchange.acts


def short_response(count: int, exchange: Exchange) -> bool:
    """The response has few words."""
    return len(exchange.response_words) < count and not exchange.acts


def long_response(ratio: float, exchange: Exchange) -> bool:
    """The response is out of proportion to its instruction."""
    if exchange.instruction is None:
        return False
    return len(exchange.response_words) > ratio * len(exchange.instruction_words)


# --- manner ---------------------------------------------------------------------------------------------------------


def literal_opener(exchange: Exchange) -> bool:
    """The response starts with one of four stock phrases, such as "Sure!"."""
    return exchange.response.lstrip().startswith(("Sure!", "Certainly!", "Of course!", "Great question!"))


def stock_opener(exchange: Exchange) -> bool:
    """The response starts with a stock phrase, such as "Sure, here you go"."""
    return bool(patterns.STOCK_OPENER.match(exchange.plain))


def literal_hedge(exchange: Exchange) -> bool:
    """The response has "[CITATION NEEDED]", or "I believe" within its first 50 characters."""
    return "[CITATION NEEDED]" in exchange.response or "I believe" in exchange.response[:50]


def hedging(exchange: Exchange) -> bool:
    """A mark for a missing citation, or "I believe" within the first 50 characters."""
    return bool(patterns.CITATION_MARK.search(exchange.response)) or "i believe" in exchange.response[:50].lower()


def refusal(exchange: Exchange) -> bool:
    """A short response that refuses, to a prompt that asks for nothing dangerous."""
    return is_refusal(exchange.plain) and not patterns.ADVERSARIAL.search(exchange.instruction or "")


def is_refusal(response: str) -> bool:
    return bool(patterns.REFUSAL.search(response[:200])) and len(response.split()) < 90


def boilerplate(exchange: Exchange) -> bool:
    """The response speaks of itself as a language model or of its knowledge cutoff."""
    return bool(patterns.BOILERPLATE.search(exchange.plain))


def placeholder(exchange: Exchange) -> bool:
    """A gap that somebody was to fill in: [Your Name], TODO, lorem ipsum."""
    found = patterns.PLACEHOLDER.search(exchange.prose)
    return bool(found) and not patterns.PLACEHOLDER.search(exchange.instruction or "")


# --- truncation -----------------------------------------------------------------------------------------------------


def cut_off(exchange: Exchange) -> bool:
    """The response stops in the middle of a sentence."""
    text = exchange.response.rstrip()
    if exchange.loose or not (text[-1:].isalpha() or text[-1:] == ",") or text.count("```") % 2:
        return False  # `loose`: who leaves out full stops everywhere is not cut off
    line = text[text.rfind("\n") + 1 :].strip()
    if patterns.DANGLING.search(line) and len(exchange.response_words) >= 6:
        return True
    return len(line.split()) >= 4 and len(exchange.response_words) >= 12 and not patterns.LIST_LINE.match(line)


def open_fence(exchange: Exchange) -> bool:
    """A code fence is opened and not closed."""
    return len(patterns.FENCE.findall(exchange.response)) % 2 == 1


def open_bracket(exchange: Exchange) -> bool:
    """The last bracket is opened and not closed."""
    text = patterns.ENUMERATION.sub(" ", exchange.prose)
    for opening, closing in ("()", "[]", "{}"):
        last = text.rfind(opening)
        if last > text.rfind(closing) and text.count(opening) > text.count(closing):
            before, after = text[max(0, last - 1) : last], text[last + 1 :].strip()
            if len(after) >= 3 and (not before.strip() or before.isalnum()):  # not a smiley :(
                return True
    return False


# --- repetition and noise -------------------------------------------------------------------------------------------


def repeated_phrase(exchange: Exchange) -> bool:
    """The same words again and again."""
    found = words(exchange.prose)
    runs = list(zip(*(found[k:] for k in range(5)), strict=False))
    again = len(runs) - len(set(runs))
    return again >= 5 and (again > 0.5 * len(runs) or _stutters(found))


def _stutters(found: Sequence[str]) -> bool:
    """Whether up to 20 words stand four times in a row."""
    for period in range(1, 21):
        run = 0
        for now, before in zip(found[period:], found, strict=False):
            run = run + 1 if now == before else 0
            if run >= max(3 * period, 8):
                return True
    return False


def repeated_line(exchange: Exchange) -> bool:
    """The same line or sentence four times or more."""
    lines = [line.strip() for line in patterns.LINE_OR_SENTENCE.split(exchange.prose)]
    lines = [line for line in lines if len(line) >= 6]
    return len(lines) >= 4 and Counter(lines).most_common(1)[0][1] >= 4


def encoding_damage(exchange: Exchange) -> bool:
    """Text decoded the wrong way (â€™ for ’), or not at all (&quot;), lost characters, or control characters."""
    text = exchange.response
    if patterns.CONTROL.search(text):
        return True
    if patterns.UNDECODED.search(exchange.prose) and not patterns.UNDECODED.search(exchange.instruction or ""):
        return True
    return not text.isascii() and ("\ufffd" in text or patterns.mojibake(text))


def url_only(exchange: Exchange) -> bool:
    """Links and next to nothing else."""
    rest, links = patterns.URL.subn(" ", exchange.response)
    return links > 0 and len(spoken(rest)) <= 3


def symbol_heavy(exchange: Exchange) -> bool:
    """More marks than words, outside code and tables."""
    text = patterns.LINE_MARK.sub("", exchange.prose)
    if len(patterns.TABLE_LINE.findall(text)) >= 2:
        return False
    found = text.split()
    if len(found) < 4:
        return len(text) >= 8 and sum(map(str.isalnum, text)) < 0.2 * len(text)
    return len(patterns.SYMBOL_WORD.findall(text)) > 0.3 * len(found)


def prompt_echo(exchange: Exchange) -> bool:
    """The response repeats its prompt."""
    asked = words(exchange.instruction or "")
    if len(asked) < 4 or len(exchange.response_words) < 4:
        return False
    said = words(exchange.response[: 2 * len(exchange.instruction or "") + 200])
    return said[: len(asked)] == asked


# --- language -------------------------------------------------------------------------------------------------------


def wrong_language(code: str, exchange: Exchange) -> bool:
    """The response is in another language than its prompt (or than the one that is asked for)."""
    asked = exchange.instruction or ""
    if ABOUT_LANGUAGES.search(asked) or not exchange.prose.strip():
        return False
    found, wanted = language(exchange.prose), code or language(asked, sure=False)
    if not found or not wanted:
        return False
    return found not in WITH_LATIN_LETTERS if wanted == "latin" else found != wanted


def mixed_script(exchange: Exchange) -> bool:
    """Words of another script inside Latin text, without cause in the prompt."""
    if exchange.response.isascii():
        return False
    counts = scripts(exchange.prose)
    if len(counts) < 2 or max(counts, key=counts.__getitem__) != "latin":
        return False
    asked = scripts(exchange.instruction or "")
    others = {name: count for name, count in counts.items() if name not in ("latin", "greek") and name not in asked}
    return sum(others.values()) >= 3 and not ABOUT_LANGUAGES.search(exchange.instruction or "")


# --- by lists and by scorers ----------------------------------------------------------------------------------------


def listed_words(listed: Iterable[str]) -> Check:
    pattern = re.compile(r"(?<!\w)(?:" + "|".join(sorted(map(re.escape, listed))) + r")(?:s|es)?(?!\w)", re.I)
    return partial(word_list, pattern)


def word_list(pattern: re.Pattern[str], exchange: Exchange) -> bool:
    """A word of the given list occurs in the response."""
    return bool(pattern.search(exchange.response))


def hf_classifier(model: str, label: str) -> Check:
    """A rule from a text classifier in Hugging Face layout: the probability of `label` for the response.

    Needs transformers with a backend that runs the model (torch); the default path of curation needs neither.
    """
    return partial(classifier, model, label)


def classifier(model: str, label: str, exchange: Exchange) -> float:
    """A classifier's probability of a label."""
    (found,) = _classifier(model)([exchange.response])
    return next((one["score"] for one in found if one["label"] == label), 0.0)


@cache
def _classifier(model: str) -> Callable[[list[str]], list[list[dict]]]:
    from transformers import pipeline

    return pipeline("text-classification", model=model, tokenizer=model, top_k=None, truncation=True)


# --- the tables -----------------------------------------------------------------------------------------------------

GUIDE = (
    Rule("short_response", partial(short_response, 5), 0.5, spreads=True),
    Rule("long_response", partial(long_response, 50), 0.2, spreads=True),
    Rule("stock_opener", literal_opener, 0.3, spreads=True),
    Rule("hedging", literal_hedge, 0.1, spreads=True),
)

# One fault of substance leads below the threshold of 0.7; manner takes two.
DEFAULT = (
    Rule("empty_response", empty_response, 1.0),
    Rule("short_response", partial(short_response, 5), 0.3, spreads=True),
    Rule("long_response", partial(long_response, 50), 0.2, spreads=True),
    Rule("stock_opener", stock_opener, 0.2, spreads=True),
    Rule("hedging", hedging, 0.15, spreads=True),
    Rule("refusal", refusal, 0.4),
    Rule("boilerplate", boilerplate, 0.4),
    Rule("placeholder", placeholder, 0.4),
    Rule("cut_off", cut_off, 0.4),
    Rule("open_fence", open_fence, 0.4),
    Rule("open_bracket", open_bracket, 0.35),
    Rule("repeated_phrase", repeated_phrase, 0.5),
    Rule("repeated_line", repeated_line, 0.5),
    Rule("encoding_damage", encoding_damage, 0.4),
    Rule("url_only", url_only, 0.5),
    Rule("symbol_heavy", symbol_heavy, 0.5),
    Rule("prompt_echo", prompt_echo, 0.4),
    Rule("wrong_language", partial(wrong_language, ""), 0.5),
    Rule("mixed_script", mixed_script, 0.4),
)
PRESETS = {"guide": GUIDE, "default": DEFAULT, "none": ()}


def build(
    preset: str = "default",
    *,
    weights: Mapping[str, float] | None = None,
    word_list: Sequence[str] | str = (),
    language: str = "",
    extra: Sequence[tuple[str, Check | str, float]] = (),
) -> tuple[Rule, ...]:
    """The table of a run.

    Args:
      preset: a key of PRESETS.
      weights: other weights for some of its rules; 0 leaves one out.
      word_list: words no response should have, or a file with one a line. Rule `word_list`, weight 0.5.
      language: code of the language that responses should be in; empty: that of their prompts.
      extra: (name, function of an Exchange or "file.py:function" or "module:function", weight) of further rules.

    Raises:
      ConfigError: no such preset, rule or function.
    """
    if preset not in PRESETS:
        raise ConfigError(f"quality.preset={preset!r}: choose one of {', '.join(PRESETS)}")
    table = list(PRESETS[preset])
    if language:
        table = [
            replace(rule, check=partial(wrong_language, language)) if rule.name == "wrong_language" else rule
            for rule in table
        ]
    if listed := _lines(word_list):
        table.append(Rule("word_list", listed_words(listed), 0.5))
    for name, function, weight in extra:
        table.append(Rule(name, resolve(function), float(weight)))
    names = [rule.name for rule in table]
    for name in weights or {}:
        if name not in names:
            raise ConfigError(f"quality.weights: there is no rule {name!r} in this run; there are {', '.join(names)}")
    if len(set(names)) < len(names):
        raise ConfigError("quality.extra: two rules have the same name")
    table = [replace(rule, weight=float((weights or {}).get(rule.name, rule.weight))) for rule in table]
    return tuple(rule for rule in table if rule.weight)


def _lines(word_list: Sequence[str] | str) -> list[str]:
    if not isinstance(word_list, str):
        return list(word_list)
    if not word_list:
        return []
    try:
        return [line.strip() for line in Path(word_list).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"quality.word_list={word_list}: can't be read ({error})") from None


def resolve(function: Callable | str, field: str = "quality.extra") -> Callable:
    """The function itself, or the one that "file.py:function" or "module:function" names.

    Raises:
      ConfigError: no such function.
    """
    if callable(function):
        return function
    place, _, name = str(function).rpartition(":")
    try:
        if place.endswith(".py"):
            return processes.of_file(place, name)
        return getattr(importlib.import_module(place), name)
    except (ImportError, AttributeError, OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{field}: {function!r} is no function that can be loaded ({error})") from None


def fingerprint(check: Check) -> str:
    """What a rule does, as text that is the same in another process: its code, and what it was made with."""
    if isinstance(check, partial):
        return " ".join((fingerprint(check.func), *(repr(getattr(one, "pattern", one)) for one in check.args)))
    code = getattr(check, "__code__", None)
    if code is None:
        return type(check).__qualname__
    made_with = [cell.cell_contents for cell in check.__closure__ or ()]
    plain = [repr(value) for value in made_with if isinstance(value, (str, int, float, re.Pattern))]
    constants = [repr(one) for one in code.co_consts if isinstance(one, (str, int, float, tuple, type(None)))]
    return " ".join((code.co_code.hex(), *code.co_names, *constants, *plain))
