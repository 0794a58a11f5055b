"""Instructions that can be checked: for each, an answer that follows it and one that doesn't."""

import pytest

from sftjax.errors import DataError
from sftjax.scorers import make_scorer
from sftjax.scorers.ifeval import _CHECKS, followed

CASES = {
    "keywords:existence": ({"keywords": ["Cat", "dog"]}, "The CAT and the dogs.", "The cat."),
    "keywords:frequency": ({"keyword": "cat", "frequency": 2, "relation": "at least"}, "Cat, cats.", "A cat."),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, "Concatenate!", "A Cat!"),
    "keywords:letter_frequency": (
        {"letter": "e", "let_frequency": 3, "let_relation": "less than"},
        "Every.",
        "Eleven.",
    ),
    "language:response_language": ({"language": "hi"}, "यह एक अच्छा दिन है।", "It is a good day."),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": "at least"},
        "One. Two!",
        "One, and two.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "A\n***\nB", "A\n\nB"),
    "length_constraints:number_words": ({"num_words": 3, "relation": "less than"}, "Two words.", "Now three words."),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        "A day.\n\nWeekend, at last.",
        "Weekend.\n\nA day.",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name] of [place]", "[name]"),
    "detectable_content:postscript": ({"postscript_marker": "P.P.S"}, "Bye.\np. p. s more", "Bye.\nP.S. more"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "Now:\n* a\n  - b", "* a\n**b**"),
    "detectable_format:constrained_response": ({}, "My answer is maybe.", "Maybe."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*a* and **b**", "*a* and ** **"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1\na",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "a: 1"),
    "detectable_format:title": ({}, "<<Joy>>\nText", "<< >>\nText"),
    "combination:two_responses": ({}, "One\n******\nTwo", "One\n******\nOne"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it. "}, " say it. Yes.", "Yes. Say it."),
    "startend:end_checker": ({"end_phrase": "Any questions?"}, 'So. "any questions?"', "Any questions? No."),
    "startend:quotation": ({}, ' "All of it." ', '"Some" of it.'),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        "A VERY big DOG",
        "a BIG dog",
    ),
    "change_case:english_capital": ({}, "THIS IS WHAT THE DOG HAS.", "This is what the dog has."),
    "change_case:english_lowercase": ({}, "this is what the dog has.", "das ist der Hund, und die Katze ist es nicht."),
    "punctuation:no_comma": ({}, "Red; blue.", "Red, blue."),
}


def test_every_instruction_has_a_case():
    assert set(CASES) == set(_CHECKS)


@pytest.mark.parametrize("name", CASES)
def test_instructions(name):
    kwargs, right, wrong = CASES[name]
    row = {"instruction_id_list": [name], "kwargs": [kwargs | {"unused": None}]}
    assert (followed(row, right), followed(row, wrong), followed(row, " ")) == ([True], [False], [False])


def test_all_a_share_or_loosely():
    row = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
    strict, loose, share = (make_scorer(name) for name in ("ifeval", "ifeval_loose", "ifeval_instructions"))
    assert (strict(row, '"a"'), strict(row, '"a, b"'), share(row, '"a, b"')) == (1.0, 0.0, 0.5)
    # what a chat model likes to put in front, and asterisks
    assert (strict(row, 'Sure, here:\n*"a"*'), loose(row, 'Sure, here:\n*"a"*')) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("de", "Das ist der Hund und er hat die Katze nicht gesehen."),
        ("vi", "Đây là con chó của tôi và nó không thể được như vậy."),
        ("sw", "Hii ni habari ya watu wa Kenya na mji mkuu wa nchi kwa ujumla."),
        ("ko", "오늘은 날씨가 좋습니다."),
        ("ru", "Сегодня хорошая погода."),
    ],
)
def test_languages(code, text):
    row = {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": code}]}
    assert followed(row, text) == [True]
    assert followed(row, "The weather is good and this is what we have got.") == [False]


def test_what_is_not_known_is_refused():
    with pytest.raises(DataError, match="'new:thing' isn't known"):
        followed({"instruction_id_list": ["new:thing"], "kwargs": [{}]}, "x")
    with pytest.raises(DataError, match=r"kwargs .* don't fit"):
        followed({"instruction_id_list": ["startend:quotation"], "kwargs": [{"color": "red"}]}, "x")
    with pytest.raises(DataError, match="instruction_id_list"):
        make_scorer("ifeval")({"prompt": "?"}, "x")
