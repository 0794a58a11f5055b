"""The stream of rows: shares, caps, epochs, replay, curriculum, and that a place is a pure function of the seed."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest

from sftjax.data.mixture import ENDLESS, Mixture
from sftjax.errors import ConfigError, DataError
from tests.data.pipe_toys import toy


def rows(n, **more):
    return [{"n": 5, **more} for _ in range(n)]


def drawn(mixture, start=0, stop=None):
    return [mixture.locate(k) for k in range(start, len(mixture) if stop is None else stop)]


def test_each_row_once_an_epoch_in_a_new_order():
    mixture = Mixture([toy(rows(7)), toy(rows(5), "b")], epochs=3, seed=1)
    everything = {(0, r) for r in range(7)} | {(1, r) for r in range(5)}
    epochs = [[d[1:] for d in drawn(mixture, e * 12, e * 12 + 12)] for e in range(3)]
    assert len(mixture) == 36
    assert all(set(epoch) == everything and len(epoch) == 12 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [d[0] for d in drawn(mixture)] == [0] * 12 + [1] * 12 + [2] * 12


def test_the_sources_are_interleaved_over_the_whole_epoch():
    sources = [d[1] for d in drawn(Mixture([toy(rows(500)), toy(rows(500), "b")]))]
    assert all(30 < sum(sources[i : i + 100]) < 70 for i in range(0, 1000, 100))


def test_same_seed_same_stream_also_after_pickling_and_from_the_middle():
    def make(seed):
        return Mixture([toy(rows(50)), toy(rows(9), "b", weight=2)], epochs=None, seed=seed)

    first = drawn(make(4), 0, 300)
    assert drawn(pickle.loads(pickle.dumps(make(4))), 137, 300) == first[137:]
    assert [make(4).locate(k) for k in (250, 3, 299)] == [first[k] for k in (250, 3, 299)]
    assert drawn(make(5), 0, 300) != first


def test_without_shuffle_the_order_is_that_of_the_files():
    mixture = Mixture([toy(rows(3)), toy(rows(2), "b")], shuffle=False, epochs=2)
    assert [d[1:] for d in drawn(mixture)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)] * 2


def test_weight_is_how_often_an_epoch_shows_a_row():
    mixture = Mixture([toy(rows(10)), toy(rows(4), "b", weight=3), toy(rows(10), "c", weight=0.5)], epochs=2)
    assert mixture.counts == (10, 12, 5) and len(mixture) == 54
    first = Counter(d[1:] for d in drawn(mixture, 0, 27))
    assert all(first[1, r] == 3 for r in range(4))
    both = Counter(d[1:] for d in drawn(mixture))
    assert all(both[2, r] == 1 for r in range(10))  # the other half came in the second epoch


def test_proportions_and_temperature():
    assert Mixture([toy(rows(90), proportion=1), toy(rows(10), "b", proportion=3)]).counts == (25, 75)
    assert Mixture([toy(rows(90)), toy(rows(10), "b")], temperature=2).counts == (75, 25)  # 3 : 1 = sqrt(9 : 1)


def test_proportions_of_tokens():
    mixture = Mixture(
        [toy([{"n": 30}] * 100, proportion=1), toy([{"n": 10}] * 100, "b", proportion=1)], shares_of="tokens"
    )
    assert mixture.counts == (67, 200)  # 4,000 tokens, 2,000 of each


def test_replay_share():
    by_rows = Mixture([toy(rows(95)), toy(rows(1000), "text", replay=True)], replay_share=0.05)
    assert by_rows.counts == (95, 5)
    assert {d[1:] for d in drawn(by_rows) if d[1] == 0} == {(0, r) for r in range(95)}
    by_tokens = Mixture(
        [toy([{"n": 10}] * 900), toy([{"n": 100}] * 50, "text", replay=True)], replay_share=0.1, shares_of="tokens"
    )
    assert by_tokens.counts == (900, 10)


def test_max_epochs_caps_a_source_and_the_epochs_get_shorter():
    mixture = Mixture([toy(rows(10)), toy(rows(4), "b", max_epochs=1.5)], epochs=4)
    assert [sum(mixture.epoch_counts(e)) for e in range(4)] == [14, 12, 10, 10]
    assert len(mixture) == 46
    seen = Counter(d[1:] for d in drawn(mixture))
    assert sum(n for (source, _), n in seen.items() if source == 1) == 6
    assert all(seen[0, r] == 4 for r in range(10))
    assert [mixture.epoch_at(r) for r in (0, 7, 14, 20, 26, 46)] == [0, 0.5, 1, 1.5, 2, 4]


def test_a_stream_of_capped_sources_ends():
    mixture = Mixture([toy(rows(10), max_epochs=2)], epochs=None)
    assert len(mixture) == 20 and mixture.epoch_at(20) == 2
    assert len(Mixture([toy(rows(10), max_epochs=2)], epochs=5)) == 20
    assert len(Mixture([toy(rows(10))], epochs=None)) == ENDLESS


def test_fractions_of_an_epoch():
    mixture = Mixture([toy(rows(10))], epochs=1.5)
    assert len(mixture) == 15 and mixture.epoch_at(15) == 1.5


def test_curriculum_by_score_and_by_length():
    scored = [{"n": 5, "score": s} for s in (3, 1, 2)]
    other = [{"n": 5, "score": s} for s in (2.5, 0)]
    mixture = Mixture([toy(scored), toy(other, "b")], curriculum="score", epochs=2)
    ascending = [(1, 1), (0, 1), (0, 2), (1, 0), (0, 0)]
    assert [d[1:] for d in drawn(mixture)] == ascending * 2
    down = Mixture([toy(scored), toy(other, "b")], curriculum="score", descending=True)
    assert [d[1:] for d in drawn(down)] == ascending[::-1]
    texts = [{"n": 5, "messages": [{"content": "x" * k}]} for k in (9, 2, 30)]
    assert [d[2] for d in drawn(Mixture([toy(texts)], curriculum="length"))] == [1, 0, 2]
    assert [d[2] for d in drawn(pickle.loads(pickle.dumps(Mixture([toy(texts)], curriculum="length"))))] == [1, 0, 2]


def test_curriculum_needs_its_field_in_every_row():
    with pytest.raises(DataError, match=r"toy.jsonl:2: no number in the field 'score'"):
        Mixture([toy([{"n": 1, "score": 1}, {"n": 1}])], curriculum="score")


def test_two_sources_of_one_name_are_told_apart():
    assert Mixture([toy(rows(1)), toy(rows(1)), toy(rows(1))]).names == ("toy", "toy#2", "toy#3")


@pytest.mark.parametrize(
    "ingredients, options, message",
    [
        ([], {}, "no source to train on"),
        ([{}, {"proportion": 1}], {}, "proportion"),
        ([{}, {"replay": True}], {}, "replay_share"),
        ([{}], {"replay_share": 0.1}, "replay_share"),
        ([{}, {"replay": True}], {"replay_share": 1.0}, "must lie in"),
        ([{"weight": 0}], {}, "weight"),
        ([{"max_epochs": 0}], {}, "max_epochs"),
        ([{}], {"temperature": 0}, "temperature"),
        ([{}], {"epochs": 0}, "epochs"),
        ([{}], {"shares_of": "bytes"}, "shares_of"),
    ],
)
def test_settings_that_cannot_work(ingredients, options, message):
    with pytest.raises(ConfigError, match=message):
        Mixture([toy(rows(3), **more) for more in ingredients], **options)


def test_an_empty_source_is_named():
    with pytest.raises(DataError, match="toy: no rows"):
        Mixture([toy([])])
