"""Whether an answer follows verifiable instructions (IFEval, arXiv:2311.07911).

Rows: `instruction_id_list` and `kwargs`, one for each instruction. The checks follow the paper's program; two are
rougher than there, because they do without its models: sentences are counted by their ends, and a language is told by
its script and function words, so that languages of one script other than Latin count as one.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from sftjax.curate.language import language
from sftjax.errors import DataError
from sftjax.scorers.formats import sentences
from sftjax.scorers.rows import Row, field_of

_SCRIPT_OF = {
    "ar": "ARABIC", "bg": "CYRILLIC", "bn": "BENGALI", "el": "GREEK", "fa": "ARABIC", "gu": "GUJARATI", "he": "HEBREW",
    "hi": "DEVANAGARI", "kn": "KANNADA", "ko": "HANGUL", "mk": "CYRILLIC", "ml": "MALAYALAM", "mr": "DEVANAGARI",
    "ne": "DEVANAGARI", "pa": "GURMUKHI", "ru": "CYRILLIC", "ta": "TAMIL", "te": "TELUGU", "th": "THAI",
    "uk": "CYRILLIC", "ur": "ARABIC",
}  # fmt: skip
_SWAHILI = frozenset(
    {"na", "ya", "wa", "kwa", "ni", "katika", "za", "hii", "kama", "kuwa", "yake", "vya", "ili", "pia"}
)
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def strict(row: Row, answer: str, argument: str = "") -> float:
    return float(all(followed(row, answer)))


def loose(row: Row, answer: str, argument: str = "") -> float:
    """Each instruction is followed by the answer, or by it without its first or last line, or without asterisks."""
    lines = answer.split("\n")
    cut = [lines, lines[1:], lines[:-1], lines[1:-1]]
    texts = ["\n".join(part).strip() for part in cut]
    texts += [text.replace("*", "") for text in texts]
    return float(all(any(each) for each in zip(*(followed(row, text) for text in texts), strict=True)))


def instructions(row: Row, answer: str, argument: str = "") -> float:
    results = followed(row, answer)
    return sum(results) / len(results) if results else 1.0


def followed(row: Row, answer: str) -> list[bool]:
    """For each of the row's instructions, whether the answer follows it. An empty answer follows none.

    Raises:
      DataError: the row isn't one of IFEval, or an instruction isn't known.
    """
    names = field_of(row, "instruction_id_list")
    arguments = row.get("kwargs") or [{}] * len(names)
    results = []
    for name, values in zip(names, arguments, strict=True):
        if name not in _CHECKS:
            raise DataError(f"IFEval instruction {name!r} isn't known; known are {', '.join(_CHECKS)}")
        values = {key: value for key, value in (values or {}).items() if value is not None}
        try:
            results.append(bool(answer.strip()) and bool(_CHECKS[name](answer, **values)))
        except TypeError as error:
            raise DataError(f"IFEval instruction {name!r}: kwargs {values!r} don't fit ({error})") from error
    return results


def _compare(count: int, limit: int, relation: str) -> bool:
    if relation not in ("at least", "less than"):
        raise DataError(f"IFEval relation {relation!r}: 'at least' or 'less than'")
    return count >= limit if relation == "at least" else count < limit


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


# --- keywords ---------------------------------------------------------------------------------------------------------


def _existence(text: str, keywords: list[str]) -> bool:
    return all(re.search(re.escape(word), text, re.IGNORECASE) for word in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(len(re.findall(re.escape(keyword), text, re.IGNORECASE)), frequency, relation)


def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_frequency, let_relation)


# --- language and case ------------------------------------------------------------------------------------------------


def _script_share(text: str, script: str) -> float:
    letters = [unicodedata.name(char, "") for char in text if char.isalpha()]
    return sum(name.startswith(script) for name in letters) / max(1, len(letters))


def is_language(text: str, code: str) -> bool:
    """Whether a text is in a language, by its two-letter code; False where the code isn't known."""
    if code in _SCRIPT_OF:
        return _script_share(text, _SCRIPT_OF[code]) > 0.5
    if code == "sw":
        words = [word.lower() for word in _words(text)]
        return sum(word in _SWAHILI for word in words) > 0.08 * max(1, len(words))
    return (language(text) or language(text, sure=False)) == code


def _english(text: str) -> bool:
    """English, or too short or odd to say."""
    return language(text) in ("en", None)


# --- lengths ----------------------------------------------------------------------------------------------------------


def _number_words(text: str, num_words: int, relation: str) -> bool:
    return _compare(len(_words(text)), num_words, relation)


def _number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compare(sentences(text), num_sentences, relation)


def _between(text: str, divider: str) -> list[str] | None:
    """The parts between dividers; None where one is empty, but for the first and the last."""
    parts = re.split(divider, text)
    if any(not part.strip() for part in parts[1:-1]):
        return None
    return [part.strip() for part in parts if part.strip()]


def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = _between(text, r"\s?\*\*\*\s?")
    return parts is not None and len(parts) == num_paragraphs


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = text.split("\n\n")
    if sum(bool(part.strip()) for part in parts) != num_paragraphs or nth_paragraph > len(parts):
        return False
    words = parts[nth_paragraph - 1].split()
    first = re.match(r"[^.,?!'\"]*", words[0].lstrip("'\"")) if words else None
    return bool(first) and first[0].lower() == first_word.lower()


# --- content and format -----------------------------------------------------------------------------------------------


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    letters = [re.escape(letter) for letter in postscript_marker.lower() if letter.isalpha()]
    dotted = postscript_marker in ("P.S.", "P.P.S")
    marker = r"\.\s?".join(letters) if dotted else re.escape(postscript_marker.lower())
    return re.search(marker, text.lower()) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*\*[^*\n].*$|^\s*-.*$", text, re.MULTILINE)) == num_bullets


def _highlighted(text: str, num_highlights: int) -> bool:
    single = [part for part in re.findall(r"\*([^\n*]*)\*", text) if part.strip()]
    double = [part for part in re.findall(r"\*\*([^\n*]*)\*\*", text) if part.strip()]
    return len(single) + len(double) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", text)) >= num_sections


def _json(text: str) -> bool:
    text = re.sub(r"^```(?:json)?", "", text.strip(), flags=re.IGNORECASE).removesuffix("```")
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(title.strip("<> ") for title in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str) -> bool:
    parts = _between(text, r"\*{6}")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def _repeats(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    words = re.findall(r"[\w'-]*\w", text)
    return _compare(sum(word.isupper() for word in words), capital_frequency, capital_relation)


_CHECKS: Mapping[str, Callable[..., Any]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": lambda text, language: is_language(text, language),
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda text: any(option in text for option in _OPTIONS),
    "detectable_format:number_highlighted_sections": _highlighted,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda text: text.isupper() and _english(text.lower()),
    "change_case:english_lowercase": lambda text: text.islower() and _english(text),
    "punctuation:no_comma": lambda text: "," not in text,
}
