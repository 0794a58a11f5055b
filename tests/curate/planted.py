"""Real rows with faults put in: what the rules are measured on. Committed before the rules were written.

    rows, truth = plant(real_rows, benchmark=items, seed=0)
    truth[i] = Fault(index of the planted row, kind, index of the row it is a copy of or None)

A quality fault changes a row in place; a duplicate or a leak is a further row. Rows are {"messages": [...]}.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import NamedTuple

from tests.curate import fault_words as words

Row = dict


class Fault(NamedTuple):
    """One planted fault. `of` is the row's original, for duplicates."""

    index: int
    kind: str
    of: int | None = None


def answer(row: Row) -> str:
    return row["messages"][-1]["content"]


def prompt(row: Row) -> str:
    return row["messages"][-2]["content"]


def with_answer(row: Row, text: str) -> Row:
    row = deepcopy(row)
    row["messages"][-1]["content"] = text
    return row


def with_prompt(row: Row, text: str) -> Row:
    row = deepcopy(row)
    row["messages"][-2]["content"] = text
    return row


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


# --- quality ----------------------------------------------------------------------------------------------------------


def empty_response(rng, row):
    return with_answer(row, rng.choice(["", " ", "\n\n", "  \t"]))


def short_response(rng, row):
    return with_answer(row, " ".join(answer(row).split()[: rng.randint(1, 4)]) or "Yes")


def long_response(rng, row):
    """Over 60 words for each word of a question of one or two words."""
    text = " ".join(answer(row).split())
    while len(text.split()) < 150:
        text += " " + " ".join(rng.sample(text.split(), k=min(20, len(text.split())))) + f" ({rng.randint(1, 999)})."
    return with_answer(with_prompt(row, rng.choice(["Why?", "Explain", "Continue", "Go on", "More"])), text)


def stock_opener(rng, row):
    return with_answer(row, f"{rng.choice(words.STOCK_OPENERS)} {answer(row)}")


def wider_opener(rng, row):
    return with_answer(row, f"{rng.choice(words.WIDER_OPENERS)} {answer(row)}")


def citation_mark(rng, row):
    parts = answer(row).split(" ")
    parts.insert(rng.randint(1, len(parts)), "[CITATION NEEDED]")
    return with_answer(row, " ".join(parts))


def early_belief(rng, row):
    lead = rng.choice(["I believe that ", "I believe ", "Well, I believe ", "To be honest, I believe "])
    return with_answer(row, lead + answer(row))


def refusal(rng, row):
    tail = rng.choice(
        ["", " Is there anything else?", " Please ask something different.", " It goes against my rules."]
    )
    return with_answer(row, rng.choice(words.REFUSALS) + tail)


def boilerplate(rng, row):
    parts = sentences(answer(row))
    parts.insert(rng.randint(0, len(parts)), rng.choice(words.BOILERPLATE))
    return with_answer(row, " ".join(parts))


def placeholder(rng, row):
    parts = sentences(answer(row))
    parts.insert(rng.randint(0, len(parts)), rng.choice(words.PLACEHOLDERS))
    return with_answer(row, " ".join(parts))


def cut_sentence(rng, row):
    """Cut between two words of a sentence, as by a token limit."""
    found = list(re.finditer(r"[a-z]{2,} (?=[a-z]{2,})", answer(row)))
    found = [match for match in found if match.end() > len(answer(row)) // 2] or found
    return with_answer(row, answer(row)[: rng.choice(found).end() - 1])


def open_fence(rng, row):
    code = rng.choice(
        ["def area(r):\n    return 3.14 * r", "for i in range(3):\n    print(i)", "SELECT name FROM users", "x = [1, 2"]
    )
    return with_answer(row, f"{answer(row)}\n\n```{rng.choice(['python', '', 'sql'])}\n{code}")


def open_bracket(rng, row):
    lead = rng.choice(["(see the part about ", "(which is to say, ", "[compare ", "(for instance "])
    return with_answer(row, f"{answer(row)} {lead}{' '.join(answer(row).split()[:4])}")


def repeated_phrase(rng, row):
    parts = answer(row).split()
    start = rng.randrange(max(1, len(parts) - 6))
    return with_answer(row, answer(row) + (" " + " ".join(parts[start : start + 6])) * rng.randint(4, 9))


def repeated_line(rng, row):
    line = rng.choice(sentences(answer(row)))
    return with_answer(row, "\n".join([answer(row), *[line] * rng.randint(4, 12)]))


def wrong_language(rng, row):
    pool = words.FOREIGN[rng.choice(sorted(words.FOREIGN))]
    return with_answer(row, " ".join(rng.sample(pool, k=rng.randint(3, 5))))


def mixed_script(rng, row):
    """Foreign words in the middle of sentences, as sampled from a model that slips."""
    pool = [s for code in ("ru", "zh", "ja", "ar", "hi") for s in words.FOREIGN[code]]
    parts = answer(row).split(" ")
    for _ in range(rng.randint(2, 4)):
        parts.insert(rng.randint(1, len(parts)), rng.choice(pool)[: rng.randint(6, 14)])
    return with_answer(row, " ".join(parts))


def mojibake(rng, row):
    """UTF-8 read as Latin-1 or Windows-1252, or characters that were lost."""
    damage = rng.choice(["â€™", "â€œ", "Ã©", "Ã¼", "â€“", "Â\u00a0", "\ufffd", "ï»¿", "Ð¿Ñ€"])
    parts = answer(row).split(" ")
    for _ in range(rng.randint(2, 6)):
        at = rng.randrange(len(parts))
        parts[at] = parts[at][: len(parts[at]) // 2] + damage + parts[at][len(parts[at]) // 2 :]
    return with_answer(row, " ".join(parts))


def url_only(rng, row):
    sites = [f"https://example.{end}/{rng.randint(1, 9999)}/page" for end in ("com", "org", "net")]
    lead = rng.choice(["", "See ", "Here: ", "Source: "])
    return with_answer(row, lead + " ".join(rng.sample(sites, k=rng.randint(1, 3))))


def symbol_heavy(rng, row):
    marks = rng.choice(["#", "*", "=", "~", "|", "@@", "$%&"])
    return with_answer(row, " ".join(f"{marks * rng.randint(2, 7)} {word}" for word in answer(row).split()[:40]))


def prompt_echo(rng, row):
    tail = rng.choice(["", " " + answer(row), "\n\n" + answer(row)])
    return with_answer(row, prompt(row) + tail)


def listed_word(rng, row):
    parts = answer(row).split(" ")
    parts.insert(rng.randint(0, len(parts)), rng.choice(words.SLURS_STAND_INS) + rng.choice(["", ",", "!", "s"]))
    return with_answer(row, " ".join(parts))


# --- personal data ----------------------------------------------------------------------------------------------------


def _digits(rng, count):
    return "".join(rng.choice("0123456789") for _ in range(count))


def _letters(rng, count, alphabet="abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"):
    return "".join(rng.choice(alphabet) for _ in range(count))


def _into(rng, row, text):
    parts = answer(row).split(" ")
    parts.insert(rng.randint(0, len(parts)), text)
    return with_answer(row, " ".join(parts))


def personal_email(rng, row):
    name = rng.choice(["jane.doe", "m_schmidt", "info+shop", "k.t.li", "ana-maria"])
    return _into(
        rng,
        row,
        f"{name}{rng.randint(1, 99)}@{rng.choice(['mail', 'uni-koeln', 'corp'])}.{rng.choice(['com', 'de', 'co.uk'])}",
    )


def personal_phone(rng, row):
    shapes = [
        "+1 (###) 555-####",
        "(###) 555-####",
        "+44 20 7### ####",
        "+49 30 #######",
        "###-555-####",
        "+33 1 ## ## ## ##",
    ]
    text = re.sub("#", lambda _: rng.choice("23456789"), rng.choice(shapes))
    return _into(rng, row, f"{rng.choice(['call', 'phone:', 'ring me on'])} {text}")


def personal_card(rng, row):
    digits = rng.choice(["4", "51", "37"])
    size = 15 if digits == "37" else 16
    digits += _digits(rng, size - 1 - len(digits))
    total = sum(d if i % 2 else (2 * d - 9 if d > 4 else 2 * d) for i, d in enumerate(map(int, reversed(digits))))
    digits += str(-total % 10)
    if size == 16 and rng.random() < 0.6:
        digits = rng.choice([" ", "-"]).join(digits[i : i + 4] for i in range(0, 16, 4))
    return _into(rng, row, digits)


def personal_iban(rng, row):
    account = _digits(rng, 18)
    check = 98 - int(account + "131400") % 97  # DE
    text = f"DE{check:02d}{account}"
    return _into(rng, row, text if rng.random() < 0.5 else " ".join(text[i : i + 4] for i in range(0, 22, 4)))


def personal_ip(rng, row):
    return _into(rng, row, ".".join(str(rng.randint(11, 250)) for _ in range(4)))


def secret_key(rng, row):
    keys = [
        "AKIA" + _letters(rng, 16, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"), "ghp_" + _letters(rng, 36),
        "sk-" + _letters(rng, 48), "xoxb-" + _digits(rng, 11) + "-" + _letters(rng, 24), "AIza" + _letters(rng, 35),
        "eyJ" + _letters(rng, 30) + ".eyJ" + _letters(rng, 40) + "." + _letters(rng, 43),
        "-----BEGIN RSA PRIVATE KEY-----\n" + _letters(rng, 64) + "\n-----END RSA PRIVATE KEY-----",
        f'api_key = "{_letters(rng, 32)}"', f"password: {_letters(rng, 14)}", "hf_" + _letters(rng, 34),
    ]  # fmt: skip
    return _into(rng, row, rng.choice(keys))


# --- duplicates -------------------------------------------------------------------------------------------------------


def _everywhere(row: Row, change: Callable[[str], str]) -> Row:
    return {**row, "messages": [{**message, "content": change(message["content"])} for message in row["messages"]]}


def exact_copy(rng, row):
    """The same words: other case, blanks, or Unicode forms."""
    change = rng.choice(
        [str, str.upper, str.lower, lambda t: "  " + t.replace(" ", "  ") + "\n", lambda t: t.replace(" ", "\u00a0")]
    )
    return _everywhere(row, change)


def near_copy(rng, row):
    """A few words changed, dropped or added: one in forty, and a word at the end."""

    def change(text):
        parts = text.split(" ")
        for _ in range(max(1, len(parts) // 40) if len(parts) > 12 else 0):
            at = rng.randrange(len(parts))
            kind = rng.randrange(3)
            if kind == 0:
                parts[at] = rng.choice(["therefore", "something", "green", "other", "seven"])
            elif kind == 1:
                parts.insert(at, rng.choice(["really", "quite", "then", "now"]))
            else:
                del parts[at]
        return " ".join(parts) + rng.choice(["", "", "!", " Thanks."])

    return _everywhere(row, change)


def paraphrase(rng, row):
    """Other words for a good part of those that have some, other sentence order, framed prompt, fillers."""

    def reword(text):
        def swap(match):
            word = match[0]
            other = words.SYNONYMS.get(word.lower())
            if other is None or rng.random() < 0.15:
                return word
            return other.capitalize() if word[0].isupper() else other

        parts = [re.sub(r"[A-Za-z]+", swap, part) for part in sentences(text)]
        for at in range(len(parts) - 1):
            if rng.random() < 0.3:
                parts[at], parts[at + 1] = parts[at + 1], parts[at]
        parts = [rng.choice(words.FILLERS) + part if rng.random() < 0.4 else part for part in parts]
        return " ".join(parts)

    row = _everywhere(row, reword)
    return with_prompt(row, rng.choice(words.PROMPT_FRAMES).format(prompt(row)))


# --- contamination ----------------------------------------------------------------------------------------------------


def leak_prompt(rng, row, item):
    frame = rng.choice(["{}", "{}", "Question: {}", "Please answer.\n{}\nThink first.", "{} Explain briefly."])
    return with_prompt(row, frame.format(item))


def leak_answer(rng, row, item):
    return with_answer(row, rng.choice(["Here is an example: {}", "{}\n\nAnd so on.", "{}"]).format(item))


def leak_changed(rng, row, item):
    """Case, punctuation and line breaks changed."""
    change = rng.choice([str.upper, str.lower, lambda t: re.sub(r"[,.?!]", "", t), lambda t: t.replace(" ", "\n", 3)])
    return with_prompt(row, change(item))


QUALITY = (
    empty_response, short_response, long_response, stock_opener, wider_opener, citation_mark, early_belief, refusal,
    boilerplate, placeholder, cut_sentence, open_fence, open_bracket, repeated_phrase, repeated_line, wrong_language,
    mixed_script, mojibake, url_only, symbol_heavy, prompt_echo, listed_word,
)  # fmt: skip
PERSONAL = (personal_email, personal_phone, personal_card, personal_iban, personal_ip, secret_key)
DUPLICATES = (exact_copy, near_copy, paraphrase)
LEAKS = (leak_prompt, leak_answer, leak_changed)
KINDS = tuple(fault.__name__ for fault in (*QUALITY, *PERSONAL, *DUPLICATES, *LEAKS))


def _can_be_damaged(question: str, text: str) -> bool:
    return len(text.split()) >= 15 and len(question.split()) >= 4 and bool(re.search(r"[a-z]{2,} [a-z]{2,}", text))


def plant(
    rows: Sequence[Row], *, benchmark: Sequence[str] = (), per_kind: int = 25, seed: int = 0
) -> tuple[list[Row], list[Fault]]:
    """The rows with `per_kind` faults of each kind (of leaks only when there is a benchmark), in random places.

    Faults go into rows whose last answer has 15 words or more and whose last prompt has four, so that there is
    something to damage; each row gets one fault at most.
    """
    rng = random.Random(seed)
    long = [
        i
        for i, row in enumerate(rows)
        if len(answer(row).split()) >= 15
        and len(prompt(row).split()) >= 4
        and re.search(r"[a-z]{2,} [a-z]{2,}", answer(row))
    ]
    chosen = iter(rng.sample(long, k=min(len(long), per_kind * len(KINDS))))
    out: list[tuple[Row, str, int | None]] = [(row, "", None) for row in rows]
    for fault in (*QUALITY, *PERSONAL):
        for _ in range(per_kind):
            at = next(chosen)
            out[at] = (fault(rng, rows[at]), fault.__name__, None)
    for fault in DUPLICATES:
        for _ in range(per_kind):
            at = next(chosen)
            out.append((fault(rng, rows[at]), fault.__name__, at))
    if benchmark:
        for fault in LEAKS:
            for _ in range(per_kind):
                at = next(chosen)
                out[at] = (fault(rng, rows[at], rng.choice(benchmark)), fault.__name__, None)
    order = list(range(len(out)))
    rng.shuffle(order)
    place = {old: new for new, old in enumerate(order)}
    truth = [Fault(place[i], kind, None if of is None else place[of]) for i, (_, kind, of) in enumerate(out) if kind]
    return [out[i][0] for i in order], sorted(truth)
