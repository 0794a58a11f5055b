"""Exact, near and semantic duplicates: small cases, planted copies in real rows, and datasketch as a reference."""

from __future__ import annotations

import numpy as np
import pytest

from sftjax.curate import dedup, semantic, text
from tests.curate import planted, real_data


def dialogue(question, answer="Yes."):
    return text.read(real_data.chat(question, answer))


def signed(texts, n=3):
    sets = [dedup.shingles(text.word_hashes(one), n) for one in texts]
    return dedup.signatures(sets), np.concatenate(sets), np.concatenate([[0], np.cumsum([len(one) for one in sets])])


def test_exact_is_by_words_and_punctuation_without_case_blanks_and_unicode_form():
    key = text.exact_key
    base = key(dialogue("Let's eat, Grandma! Caf\u00e9"))
    assert key(dialogue("  let's EAT,\n grandma!   Cafe\u0301 ")) == base
    assert key(dialogue("Let's eat Grandma! Caf\u00e9")) != base
    assert key(
        text.read({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]})
    ) != key(text.read({"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}))


def test_the_first_in_order_stays():
    keys = [b"a", b"b", b"a", b"a"]
    assert dedup.exact_duplicates(keys, [3, 0, 1, 2]) == [(0, 3, 1.0), (2, 3, 1.0)]


def test_near_is_never_passed_on_from_row_to_row():
    """a ~ b ~ c, but a and c differ: with a first, b goes and c stays."""
    words = [f"w{i}" for i in range(60)]
    changed = [*words[:-6], *(f"x{i}" for i in range(6))]
    more = [*(f"y{i}" for i in range(6)), *changed[6:]]
    rows = [" ".join(one) for one in (words, changed, more)]
    found = dedup.near_duplicates(*signed(rows), [0, 1, 2], 0.75)
    assert [(one.row, one.of) for one in found] == [(1, 0)] and found[0].similarity == round(52 / 64, 4)
    assert [(one.row, one.of) for one in dedup.near_duplicates(*signed(rows), [1, 0, 2], 0.75)] == [(0, 1), (2, 1)]


def test_bands_miss_one_in_a_hundred_at_most_at_the_threshold():
    for threshold in (0.3, 0.5, 0.7, 0.9):
        size = dedup.rows_in_band(threshold)
        assert (1 - threshold**size) ** (dedup.PERMUTATIONS // size) <= 0.01


def test_short_and_empty_texts():
    found = dedup.near_duplicates(*signed(["Hello there", "hello there!", "", "Good bye", "😀", "?"]), range(6), 0.7)
    assert [(one.row, one.of) for one in found] == [(1, 0)]


def test_the_same_duplicates_as_datasketch():
    datasketch = pytest.importorskip("datasketch")
    rng = np.random.default_rng(0)
    rows = [" ".join(f"w{word}" for word in rng.integers(0, 300, size=40)) for _ in range(600)]
    rows += [row.replace(" w2", " x", int(rng.integers(0, 5))) for row in rows[:200]]
    signs, flat, offsets = signed(rows)
    ours = {(one.row, one.of) for one in dedup.near_duplicates(signs, flat, offsets, range(len(rows)), 0.7)}
    index, theirs = datasketch.MinHashLSH(threshold=0.4, num_perm=128), set()
    for number in range(len(rows)):
        mine = flat[offsets[number] : offsets[number + 1]]
        sketch = datasketch.MinHash(num_perm=128)
        sketch.update_batch([one.tobytes() for one in mine])
        near = {other: dedup.jaccard(mine, flat[offsets[other] : offsets[other + 1]]) for other in index.query(sketch)}
        if near and max(near.values()) >= 0.7:
            theirs.add((number, max(sorted(near), key=near.__getitem__)))
        else:
            index.insert(number, sketch)
    assert 120 <= len(ours) <= 200 and ours == theirs


def found_pairs(rows):
    """Pairs by each step, each on what the one before left, as a curation goes."""
    dialogues = [text.read(row) for row in rows]
    texts = ["\n".join(part for _, part in one.messages) for one in dialogues]
    order = list(range(len(rows)))
    exact = dedup.exact_duplicates([text.exact_key(one) for one in dialogues], order)
    order = sorted(set(order) - {one.row for one in exact})
    near = dedup.near_duplicates(*signed(texts), order, 0.7)
    order = sorted(set(order) - {one.row for one in near})
    vectors = semantic.normalised(semantic.Tfidf(texts).encode(texts))
    return {"exact_copy": exact, "near_copy": near, "paraphrase": semantic.similar(vectors, order, 0.55)}


def test_planted_copies_are_found_and_next_to_nothing_else():
    made, truth = planted.plant(real_data.conversations(), seed=11)
    damaged = {fault.index for fault in truth if fault.of is None}
    steps = found_pairs(made)
    removed = {one.row for found in steps.values() for one in found}
    pairs = {frozenset((fault.index, fault.of)) for fault in truth if fault.of is not None}
    copies = {row for pair in pairs for row in pair}
    for kind, least in (("exact_copy", 0.99), ("near_copy", 0.95), ("paraphrase", 0.8)):
        wanted = [fault for fault in truth if fault.kind == kind]
        hit = sum(fault.index in removed or fault.of in removed for fault in wanted)
        assert hit >= least * len(wanted), (kind, hit, len(wanted))
    clean = len(made) - len(copies) - len(damaged)
    assert len(removed - copies - damaged) <= 0.01 * clean


BY_HAND = [  # question, answer, and both in other words; written without an eye on which words are shared
    (
        "What is the capital of France?",
        "The capital of France is Paris.",
        "Which city is France's capital?",
        "Paris is the capital city of France.",
    ),
    (
        "How do I boil an egg?",
        "Place the egg in boiling water for eight minutes, then cool it in cold water.",
        "What's the way to cook a boiled egg?",
        "Put your egg into boiling water, wait around eight minutes, and chill it with cold water.",
    ),
    (
        "Give me three tips for staying healthy.",
        "Eat a balanced diet with plenty of vegetables, exercise regularly, and get enough sleep every night.",
        "What are three pieces of advice for good health?",
        "Sleep enough each night, do regular exercise, and have a balanced diet that has lots of vegetables.",
    ),
    (
        "Explain photosynthesis simply.",
        "Photosynthesis is how plants use sunlight, water and carbon dioxide to make sugar and release oxygen.",
        "Can you describe photosynthesis in simple terms?",
        "Plants turn sunlight, carbon dioxide and water into sugar, giving off oxygen; this is photosynthesis.",
    ),
    (
        "Why do cats purr?",
        "Cats purr when they are content, but also to calm themselves when hurt or stressed.",
        "What makes a cat purr?",
        "A cat may purr because it is happy, or to soothe itself when it is injured or under stress.",
    ),
    (
        "Write a short email asking my boss for a day off on Friday.",
        "Dear Ms Hill, I would like to take this Friday off for a family matter. Kind regards, Tom",
        "Draft a brief message to my manager requesting leave on Friday.",
        "Hello Ms Hill, could I please have this Friday off? I have a family matter to attend to. Best, Tom",
    ),
    (
        "Who wrote Pride and Prejudice?",
        "Pride and Prejudice was written by Jane Austen and published in 1813.",
        "Name the author of Pride and Prejudice.",
        "Jane Austen is the author; the novel came out in 1813.",
    ),
    (
        "Translate 'good morning' to Spanish.",
        "Good morning in Spanish is buenos dias.",
        "How do you say good morning in Spanish?",
        "You say buenos dias.",
    ),
]


def test_paraphrases_by_hand_among_real_rows():
    pairs = [(real_data.chat(*one[:2]), real_data.chat(*one[2:])) for one in BY_HAND]
    rows = [*real_data.conversations()[:1500], *(row for pair in pairs for row in pair)]
    texts = ["\n".join(message["content"] for message in row["messages"]) for row in rows]
    vectors = semantic.normalised(semantic.Tfidf(texts).encode(texts))
    found = {frozenset((one.row, one.of)) for one in semantic.similar(vectors, range(len(rows)), 0.55)}
    start = len(rows) - 2 * len(pairs)
    hits = sum(frozenset((start + 2 * i, start + 2 * i + 1)) in found for i in range(len(pairs)))
    assert hits >= 5 and len(found) - hits <= 0.01 * len(rows)


def test_real_duplicates_of_chatterbot():
    rows = real_data.chatterbot(real_data.wheel("chatterbot_corpus"))
    keys = [text.exact_key(text.read(row)) for row in rows]
    assert (len(rows), len(rows) - len(dedup.exact_duplicates(keys, range(len(keys))))) == (2026, 899)


def test_any_encoder_and_the_search_is_exact():
    rng = np.random.default_rng(0)
    vectors = semantic.normalised(rng.standard_normal((3000, 8)))
    order = rng.permutation(3000)
    found = {one.row: one for one in semantic.similar(vectors, order, 0.95)}
    staying: list[int] = []
    for row in order.tolist():
        cosine = vectors[staying] @ vectors[row] if staying else np.zeros(0)
        if len(cosine) and cosine.max() >= 0.95:
            assert found[row].of == staying[int(cosine.argmax())]
        else:
            assert row not in found
            staying.append(row)
    assert semantic.normalised(np.zeros((2, 3))).tolist() == [[0, 0, 0]] * 2
