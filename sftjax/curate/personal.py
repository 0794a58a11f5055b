"""Personal data and secrets in rows: found by shape and by check digits, reported, and masked if wanted.

Shapes alone would take order numbers for cards, so cards are checked by Luhn's digit and IBANs by theirs (ISO 7064).
What is masked becomes a word in brackets: jane@corp.com -> [EMAIL].
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A kind of personal data: its mark, its shape, what has to hold beside, and what a text must have to be looked at.

    Where the shape has a group `secret`, only that is masked.
    """

    mark: str
    shape: re.Pattern[str]
    holds: Callable[[str], bool] = bool
    hint: str = ""


def _luhn(text: str) -> bool:
    digits = [int(char) for char in text if char.isdigit()]
    total = sum(d if i % 2 == 0 else (2 * d - 9 if d > 4 else 2 * d) for i, d in enumerate(reversed(digits)))
    return 13 <= len(digits) <= 19 and total % 10 == 0 and len(set(digits)) > 1


def _iban(text: str) -> bool:
    text = text.replace(" ", "")
    return 15 <= len(text) <= 34 and int("".join(str(int(char, 36)) for char in text[4:] + text[:4])) % 97 == 1


def _phone(text: str) -> bool:
    digits = [char for char in text if char.isdigit()]
    return 8 <= len(digits) <= 15 and len(set(digits)) > 2


def _address(text: str) -> bool:
    parts = [int(part) for part in text.split(".")]
    public = parts[0] not in (0, 10, 127, 255) and parts[:2] not in ([192, 168], [169, 254])
    return (
        all(part < 256 for part in parts) and public and not (parts[0] < 10 and max(parts) < 20)
    )  # 1.2.3.4: a version


def _password(text: str) -> bool:
    return len(text) >= 8 and any(map(str.isdigit, text)) and any(map(str.isalpha, text))


_KEY_SHAPES = (
    r"AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|sk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{35}|hf_[A-Za-z0-9]{30,}|glpat-[A-Za-z0-9_-]{20,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}|[rs]k_live_[A-Za-z0-9]{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)

# In this order: an IBAN's digits could otherwise pass for a card, and a card's for a telephone number.
KINDS = {
    "key": Kind("[SECRET]", re.compile(rf"(?<![A-Za-z0-9])(?:{_KEY_SHAPES})")),
    "password": Kind(
        "[SECRET]",
        re.compile(
            r"(?i)\b(?:pass(?:word|wd|phrase)|pwd|api[_ -]?key|secret(?:[_ -]?key)?|access[_ -]?token)\b"
            r"[\"']?\s*(?:[:=]|\bis\b)\s*[\"']?(?P<secret>[^\s\"',;]{8,})"
        ),
        _password,
    ),
    "email": Kind("[EMAIL]", re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]+\.)+[A-Za-z]{2,24}\b"), hint="@"),
    "iban": Kind("[IBAN]", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b"), _iban),
    "card": Kind(
        "[CARD]",
        re.compile(r"(?<![\w.])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}|\d{4}[ -]\d{6}[ -]\d{5})(?![\w]|\.\d)"),
        _luhn,
    ),
    "ip": Kind("[IP]", re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)"), _address, hint="."),
    "phone": Kind(
        "[PHONE]",
        re.compile(
            r"(?<![\w.+(])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,5}"
            r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w]|[.-]\d)"
        ),
        _phone,
    ),
}


def find(text: str) -> Iterator[tuple[str, int, int]]:
    """(kind, start, end) of each piece of personal data; none overlap."""
    taken: list[tuple[int, int]] = []
    digits = any(char in text for char in "0123456789")
    for name, kind in KINDS.items():
        if (kind.hint and kind.hint not in text) or (not digits and name not in ("email", "key", "password")):
            continue
        for match in kind.shape.finditer(text):
            start, end = match.span("secret" if "secret" in kind.shape.groupindex else 0)
            if kind.holds(text[start:end]) and not any(start < b and a < end for a, b in taken):
                taken.append((start, end))
                yield name, start, end


def count(texts: Iterator[str] | list[str]) -> dict[str, int]:
    """How many pieces of each kind."""
    return dict(Counter(name for text in texts for name, _, _ in find(text)))


def mask(text: str) -> str:
    """The text with personal data replaced by what it was: [EMAIL]."""
    for name, start, end in sorted(find(text), key=lambda found: -found[1]):
        text = text[:start] + KINDS[name].mark + text[end:]
    return text


def masked(value: Any) -> Any:
    """A row with all of its texts masked, at every depth; keys stay as they are."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {key: masked(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(one) for one in value]
    return value
