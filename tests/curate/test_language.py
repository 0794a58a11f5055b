"""Languages by script and function words: sure only where there is enough to go by."""

from __future__ import annotations

import pytest

from sftjax.curate.language import language, scripts
from tests.curate.fault_words import FOREIGN


@pytest.mark.parametrize("code", sorted(FOREIGN))
def test_sentences_in_ten_languages(code):
    expected = {"ru": "cyrillic", "ar": "arabic", "hi": "devanagari"}.get(code, code)
    assert language(" ".join(FOREIGN[code])) == expected


@pytest.mark.parametrize(
    "text",
    ["", "12 * 3 = 36", "Paris, London, Tokyo", "x = y + z", "Mel's m is Brenda's 3*m", "OK", "def f(a, b): pass"],
)
def test_too_little_is_no_language(text):
    assert language(text) is None


def test_a_guess_and_the_script_where_that_is_all():
    assert language("How to categorize credit card payments?", sure=False) in ("en", "latin")
    assert language("Selling mutual funds", sure=False) == "latin"
    assert language("12345", sure=False) is None


def test_scripts():
    assert scripts("abc") == {"latin": 3}
    assert scripts("abc где 面包") == {"latin": 3, "cyrillic": 3, "cjk": 2}
    assert scripts("naïve") == {"latin": 5}
