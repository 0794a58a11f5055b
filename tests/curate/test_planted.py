"""The generator itself: counts, places, and that each fault is really there."""

from __future__ import annotations

from collections import Counter

from tests.curate import planted


def rows(count):
    text = "The {} box holds {} red marbles, and the other one holds twice as many of them as we found last year."
    return [
        {
            "messages": [
                {"role": "user", "content": f"How many marbles are in box number {i}?"},
                {"role": "assistant", "content": text.format(i, 3 * i) + " " + text.format(i + 7, i)},
            ]
        }
        for i in range(count)
    ]


def test_every_kind_is_planted_once_in_a_row():
    base = rows(1000)
    made, truth = planted.plant(base, benchmark=["What is the boiling point of water at sea level in kelvin?"], seed=3)
    counts = Counter(fault.kind for fault in truth)
    assert set(counts) == set(planted.KINDS) and set(counts.values()) == {25}
    assert len({fault.index for fault in truth}) == len(truth)
    assert len(made) == len(base) + 25 * len(planted.DUPLICATES)
    clean = [row for i, row in enumerate(made) if i not in {fault.index for fault in truth}]
    assert all(row in base for row in clean)
    assert all(made[fault.index] not in base for fault in truth if fault.kind != "exact_copy")


def test_originals_of_duplicates_stay_whole_and_seeds_decide():
    base = rows(1000)
    made, truth = planted.plant(base, seed=1)
    assert all(made[fault.of] in base for fault in truth if fault.of is not None)
    assert planted.plant(base, seed=1) == (made, truth)
    assert planted.plant(base, seed=2)[0] != made
