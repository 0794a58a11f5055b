"""The packed layout, the over-length policies, and that no token goes astray."""

from __future__ import annotations

import grain
import numpy as np
import pytest
from grain import experimental

from sftjax.data import packing
from sftjax.data.bins import Bins, lay_out
from sftjax.data.ledger import Ledger
from sftjax.data.mixture import Mixture
from sftjax.data.packing import fit_to_length
from sftjax.data.pipeline import build
from sftjax.data.stream import PackedRows
from sftjax.data.types import Sample
from sftjax.errors import ConfigError, DataError
from tests.data.pipe_toys import lognormal_rows, toy

a, b, c, d, e = 11, 12, 13, 14, 15


def sample(tokens, weights, **more):
    return Sample(np.array(tokens, np.int32), np.array(weights, np.float32), **more)


def test_a_row_as_drawn():
    shape = packing.Shape(rows=1, lengths=(8,), max_examples=3)
    elements = [
        packing.Element(sample([a, b, c], [0, 1, 1])),
        packing.Element(sample([d, e], [0, 0.5], source=2, index=7), loss_weight=2.0),
    ]
    assert list(lay_out(map(len, elements), packing.open_bins("first_fit", shape, 2))) == [[0, 1]]
    arrays = packing.assemble([elements], 2, shape.lengths, pad_id=9)
    drawn = {
        "tokens": [a, b, c, d, e, 9, 9, 9],
        "targets": [b, c, 0, e, 0, 9, 9, 9],
        "weights": [1, 1, 0, 1, 0, 0, 0, 0],
        "segment_ids": [1, 1, 1, 2, 2, 3, 3, 3],
        "positions": [0, 1, 2, 0, 1, 0, 1, 2],
        "source_ids": [0, 0, 0, 2, 2, -1, -1, -1],
    }
    empty = {
        "tokens": [9] * 8,
        "targets": [9] * 8,
        "weights": [0] * 8,
        "segment_ids": [1] * 8,
        "positions": list(range(8)),
        "source_ids": [-1] * 8,
    }
    assert set(arrays) == set(drawn)
    for name, array in arrays.items():
        assert array.tolist() == [drawn[name], empty[name]], name
        assert array.dtype == (np.float32 if name == "weights" else np.int32)


def test_truncate_keeps_whole_turns():
    #                 user     turn 1   user  turn 2
    long = sample(range(12), [0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1])
    fit = fit_to_length(long, 9, "truncate")
    assert [len(piece.tokens) for piece in fit.pieces] == [4]
    assert (fit.lost_tokens, fit.lost_trained, fit.reason) == (8, 5, None)
    assert [len(piece.tokens) for piece in fit_to_length(long, 10, "truncate").pieces] == [10]


def test_truncate_in_the_middle_of_a_turn_only_where_none_is_whole():
    fit = fit_to_length(sample(range(10), [0, 0] + [1] * 8), 6, "truncate")
    assert [len(piece.tokens) for piece in fit.pieces] == [6]
    assert (fit.lost_tokens, fit.lost_trained) == (4, 4)


def test_truncate_never_leaves_a_sample_without_trained_tokens():
    fit = fit_to_length(sample(range(10), [0] * 8 + [1, 1]), 6, "truncate")
    assert fit.pieces == () and fit.reason == "truncated_to_nothing"
    assert (fit.lost_tokens, fit.lost_trained) == (10, 2)


def test_the_first_token_is_never_trained_even_with_a_weight():
    assert fit_to_length(sample([a, b], [1, 0]), 8, "truncate").reason == "nothing_trained"


def test_split_loses_no_trained_token():
    #   a b c d e f g h        a b c d | (d) e f g | (g) h
    fit = fit_to_length(sample(range(8), [0, 1, 1, 1, 1, 1, 1, 1]), 4, "split")
    assert [piece.tokens.tolist() for piece in fit.pieces] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]
    targets = [t for piece in fit.pieces for t, w in zip(piece.tokens[1:], piece.weights[1:], strict=True) if w]
    assert targets == list(range(1, 8))
    assert (fit.lost_tokens, fit.lost_trained, fit.repeated) == (0, 0, 2)


def test_split_leaves_out_pieces_with_nothing_to_learn():
    fit = fit_to_length(sample(range(8), [0, 0, 0, 0, 0, 1, 1, 1]), 4, "split")
    assert [piece.tokens.tolist() for piece in fit.pieces] == [[3, 4, 5, 6], [6, 7]]
    assert (fit.lost_tokens, fit.repeated) == (4, 2)  # 8 + 2 = 6 packed + 4 lost


def test_drop_and_error():
    long = sample(range(8), [0] + [1] * 7)
    for policy in ("drop", "error"):
        fit = fit_to_length(long, 4, policy)
        assert (fit.pieces, fit.reason, fit.lost_tokens, fit.lost_trained) == ((), "too_long", 8, 7)
    with pytest.raises(DataError, match=r"toy.jsonl:2: a sample of 200 tokens .* max_length=128"):
        list(build(Mixture([toy([{"n": 5}, {"n": 200}])], shuffle=False), length=128, batch_size=1, overlong="error"))


@pytest.mark.parametrize("strategy", packing.STRATEGIES)
@pytest.mark.parametrize("overlong", ["drop", "truncate", "split"])
def test_every_token_is_accounted_for(strategy, overlong):
    rows = lognormal_rows(300, mean=100, prompt=3)
    rows[5] = {"error": "broken_json"}
    rows[6] = {"n": [30, 200, 3], "prompt": 3}  # three samples, the last without a trained token
    mixture = Mixture([toy(rows), toy(rows[:50], name="more", loss_weight=0.5)], seed=3)
    options = {"static_lengths": 3} if strategy in ("none", "padding_free") else {}
    with build(
        mixture, length=128, batch_size=4, packing_strategy=strategy, overlong=overlong, packing_bins=8, **options
    ) as pipeline:
        items = list(pipeline)
        ledger = Ledger(mixture.names)
        ledger.restore(pipeline.ledger())
    packed = sum(item.info.real_tokens for item in items)
    trained = sum(item.info.trained_tokens for item in items)
    assert ledger.total("tokens") + ledger.total("repeated") == packed + ledger.total("lost_tokens")
    assert ledger.total("trained") == trained + ledger.total("lost_trained")
    assert ledger.total("rows") == len(mixture) == 350
    assert items[-1].info.epoch == 1.0
    assert ledger.reasons("{}:{}".format)["broken_json"]["rows"] == {"toy": ["0:5"], "more": ["1:5"]}
    for item in items:
        _check_layout(item, pipeline.shape, strategy)
    examples = [e for item in items for micro in item.info.examples for row in micro for e in row]
    if overlong != "split":
        assert len(examples) == len(set(examples))
        reasons = ledger.reasons("{}:{}".format)
        assert len(examples) + sum(reasons.get(r, {"count": 0})["count"] for r in _SAMPLE_REASONS) == (
            ledger.total("samples")
        )


_SAMPLE_REASONS = ("too_long", "nothing_trained", "truncated_to_nothing")


def _check_layout(item, shape, strategy):
    """Segments are contiguous from 1, positions restart, targets are the next token of the same segment."""
    for name, array in item.batch.items():
        assert array.shape[:2] == (1, shape.rows) and array.shape[2] in shape.lengths, name
        assert array.flags.c_contiguous
    for row in range(shape.rows):
        tokens, targets, weights, segments, positions, sources = (
            item.batch[name][0, row]
            for name in ("tokens", "targets", "weights", "segment_ids", "positions", "source_ids")
        )
        assert segments[0] == 1 and set(np.diff(segments)) <= {0, 1} and segments[-1] <= shape.max_segments
        starts = np.flatnonzero(np.append(True, np.diff(segments) > 0))
        assert (positions == np.arange(len(segments)) - starts[segments - 1]).all()
        inside = np.append(segments[1:] == segments[:-1], False) & (sources >= 0)
        assert (targets[:-1][inside[:-1]] == tokens[1:][inside[:-1]]).all()
        assert (weights[~inside] == 0).all()
        examples = item.info.examples[0][row]
        if strategy == "none":
            assert len(examples) <= 1
        for number, (source, index, _) in enumerate(examples, start=1):
            of_segment = segments == number
            assert (sources[of_segment] == source).all()
            assert (tokens[of_segment] // 1000 == index + 1).all()
            assert set(weights[of_segment]) <= {0.0, 1.0 if source == 0 else 0.5}
        assert (segments == len(examples) + 1).sum() == (sources == -1).sum()


@pytest.mark.parametrize("strategy", ["none", "padding_free"])
def test_without_bins_the_order_stays(strategy):
    rows = lognormal_rows(40)
    with build(
        Mixture([toy(rows)], shuffle=False), length=512, batch_size=4, packing_strategy=strategy, static_lengths=4
    ) as pipeline:
        items = list(pipeline)
    order = [e[1] for item in items for row in item.info.examples[0] for e in row]
    assert order == list(range(40))
    assert [sum(len(row) for row in item.info.examples[0]) for item in items] == [4] * 10
    if strategy == "padding_free":
        assert all(item.batch["tokens"].shape[:2] == (1, 1) for item in items)


def test_padding_free_filled_by_tokens():
    rows = lognormal_rows(300, mean=60)
    mixture = Mixture([toy(rows)], shuffle=False)
    with build(
        mixture,
        length=256,
        batch_size=8,
        packing_strategy="padding_free",
        fill="tokens",
        static_lengths=4,
        flat_rows=2,
    ) as pipeline:
        items = list(pipeline)
    assert pipeline.shape.lengths == (256, 512, 768, 1024) and pipeline.shape.rows == 2
    real = sum(item.info.real_tokens for item in items[:-1])
    assert real / sum(item.batch["tokens"].size for item in items[:-1]) > 0.85


def test_max_segments_counts_the_tail():
    mixture = Mixture([toy([{"n": 4}] * 30)])
    with build(mixture, length=128, batch_size=2, max_segments=5) as pipeline:
        items = list(pipeline)
    assert max(item.batch["segment_ids"].max() for item in items) == 5
    assert max(len(row) for item in items for row in item.info.examples[0]) == 4


@pytest.mark.parametrize(
    "strategy, sigma, goal", [("best_fit", 0.8, 0.985), ("best_fit", 1.0, 0.99), ("first_fit", 1.0, 0.985)]
)
def test_real_tokens_in_a_stream(strategy, sigma, goal):
    mixture = Mixture([toy(lognormal_rows(8000, mean=500, sigma=sigma))])
    with build(mixture, length=2048, batch_size=16, packing_strategy=strategy) as pipeline:
        infos = [item.info for item in pipeline][:-17]  # the end of the file leaves bins half empty
    real = sum(info.real_tokens for info in infos)
    assert real / (real + sum(info.padding_tokens for info in infos)) >= goal


@pytest.mark.parametrize(
    "options, message",
    [
        ({"length": 100}, "max_length=100 must be a multiple of 128: use 128"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"packing_strategy": "best"}, "packing='best' is unknown"),
        ({"max_segments": 1}, "max_segments=1"),
        ({"packing_strategy": "padding_free", "flat_rows": 3}, "multiple of 3"),
        ({"overlong": "cut"}, r"data\.over_length='cut'"),
        ({"rows": [4]}, r"rows \(4,\)"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        build(Mixture([toy([{"n": 5}])]), **{"length": 128, "batch_size": 4, **options})


@pytest.mark.parametrize("strategy", ["best_fit", "first_fit"])
@pytest.mark.parametrize("bins, capacity, most", [(1, 64, 5), (7, 100, 3), (64, 256, 4), (100, 1000, 64)])
def test_rows_are_those_of_grains_packers(strategy, bins, capacity, most):
    lengths = [min(row["n"], capacity) for row in lognormal_rows(1500, mean=capacity / 5, seed=bins)]
    packer = {"best_fit": experimental.BestFitPackIterDataset, "first_fit": experimental.FirstFitPackIterDataset}
    elements = [{"data": np.zeros(n, np.uint8), "example": number} for number, n in enumerate(lengths)]
    for shuffle in (False, True):
        reference = packer[strategy](
            _dataset(elements),
            length_struct={"data": capacity},
            num_packing_bins=bins,
            meta_features=["example"],
            max_sequences_per_bin=most,
            shuffle_bins=shuffle,
            seed=5,
        )
        expected = [[int(number) for number in row["example"]] for row in reference]
        ours = Bins(strategy, count=bins, capacity=capacity, most=most)
        rows = PackedRows(
            _dataset([range(number, number + n) for number, n in enumerate(lengths)]), ours, shuffle=shuffle, seed=5
        )
        assert [[element[0] for element in row] for row in rows] == expected
        if not shuffle:
            assert list(lay_out(lengths, ours)) == expected


def test_a_sample_that_fits_into_no_empty_bin():
    with pytest.raises(ValueError, match="a sample of 9 tokens for bins of 8"):
        Bins("best_fit", count=2, capacity=8, most=3).place(9)


def _dataset(elements):
    return grain.MapDataset.source(elements).to_iter_dataset(grain.ReadOptions(num_threads=0))
