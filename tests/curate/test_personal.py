"""Personal data and secrets: shapes that count, and those that only look so."""

from __future__ import annotations

import pytest

from sftjax.curate import personal

YES = [
    ("email", "write to jane.doe+x@mail.example.co.uk today", "write to [EMAIL] today"),
    ("phone", "call +49 30 1234567 or so", "call [PHONE] or so"),
    ("phone", "call (212) 555-0187.", "call [PHONE]."),
    ("phone", "212-555-0187", "[PHONE]"),
    ("card", "card 4111 1111 1111 1111, thanks", "card [CARD], thanks"),
    ("iban", "to DE89 3704 0044 0532 0130 00 please", "to [IBAN] please"),
    ("iban", "GB29NWBK60161331926819", "[IBAN]"),
    ("ip", "from 203.0.113.77 at noon", "from [IP] at noon"),
    ("key", "AKIAIOSFODNN7EXAMPLE", "[SECRET]"),
    ("key", "token ghp_" + "a1B2" * 9, "token [SECRET]"),
    ("key", "x -----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY----- y", "x [SECRET] y"),
    ("password", "password: hunter2hunter2", "password: [SECRET]"),
    ("password", 'api_key = "0123456789abcdef0123"', 'api_key = "[SECRET]"'),
]
NO = [
    "an @mention, a@b, and x = y @ z", "4111 1111 1111 1112", "0000 0000 0000 0000", "order 1234567890123456",
    "DE00 3704 0044 0532 0130 00", "version 1.2.3.4 and 10.0.0.1 and 999.1.1.1", "in 2021-2022, 48 + 24 = 72",
    "1,234,567,890 people", "the password is important", "sk-learn", "3.141592653589793238", "pages 212-555",
    "<<48/2=24>>24 clips, 0.30*70=21", "2024-01-15 10:20:30", "ISBN 978-3-16-148410-0",
]  # fmt: skip


@pytest.mark.parametrize("kind, text, masked", YES)
def test_what_is_personal_is_found_and_masked(kind, text, masked):
    assert personal.count([text]) == {kind: 1}
    assert personal.mask(text) == masked
    assert personal.count([masked]) == {}


@pytest.mark.parametrize("text", NO)
def test_what_only_looks_so_stays(text):
    assert personal.mask(text) == text


def test_all_of_a_row_is_masked():
    row = {"messages": [{"role": "user", "content": "I am a@example.com"}], "n": 3, "tags": ("b@example.com",)}
    assert personal.masked(row) == {
        "messages": [{"role": "user", "content": "I am [EMAIL]"}], "n": 3, "tags": ["[EMAIL]"],
    }  # fmt: skip
