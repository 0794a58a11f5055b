import random

import pytest

from sftjax.synth import text


def by_table(first, second):
    """The longest common subsequence as textbooks have it."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_the_common_subsequence_is_that_of_the_table():
    draws = random.Random(0)
    for _ in range(300):
        first, second = (draws.choices("abcde", k=draws.randrange(0, 90)) for _ in range(2))
        assert text.common_subsequence(first, second) == by_table(first, second)


def test_rouge_l_by_hand():
    # police the gunman | the cat: "police ... the gunman" of 4 and 4 words, 3 in common
    assert text.rouge_l(["police", "killed", "the", "gunman"], ["police", "kill", "the", "gunman"]) == 0.75
    assert text.rouge_l(["a", "b", "c", "d"], ["a", "b"]) == pytest.approx(2 * 2 / 6)
    assert text.rouge_l([], ["a"]) == 0


def test_novelty_grows_and_refuses_what_is_alike():
    pool = text.Novelty(["Write a poem about the sea."])
    assert not pool.add("Write a poem about the SEA!")
    assert not pool.add("Write a long poem about the sea.")  # 2 * 6 / 13
    assert pool.add("Write a poem about a red house.")  # 4 in common: 2 * 4 / 13
    assert not pool.add("Write a poem about a big red house.")
    assert text.Novelty(["a b c d"], limit=1.0).add("a b c e")


def test_the_quick_bound_never_hides_a_likeness():
    draws = random.Random(1)
    texts = [" ".join(draws.choices("abcdef", k=draws.randrange(1, 12))) for _ in range(60)]
    pool = text.Novelty(texts[:40])
    for new in texts[40:]:
        true = max(text.rouge_l(text.words(new), text.words(old)) for old in texts[:40])
        assert (pool.nearest(new) >= 0.7) == (true >= 0.7)


def test_refusals_and_empty_answers():
    assert text.is_refusal("I'm sorry, but that is not something I do.")
    assert text.is_refusal("I can’t help with that.")
    assert not text.is_refusal("The word sorry, and then " + "more " * 90)
    assert not text.is_refusal("Paris.")
    assert not text.is_refusal("I'm sorry to hear that! Rest, and drink a lot.")
    assert not text.is_refusal("She went home. " * 8 + "Sorry, he said.")
    assert text.says_nothing("... it is the, and!")
    assert not text.says_nothing("It is Paris.")


def test_keys_leave_case_and_punctuation_out_but_not_signs_alone():
    assert text.key("What is it?") == text.key("what  is it")
    assert text.key("+") != text.key("-")
