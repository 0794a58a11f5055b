"""Batches and positions: resume from any batch, workers, row subsets, the last window, bad rows, clean ends."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from sftjax.data.mixture import Mixture
from sftjax.data.pipeline import build, build_eval, sum_per_example
from sftjax.errors import ConfigError, DataError
from tests.data.pipe_toys import (
    encode,
    encode_and_die_once,
    encode_unless_jax_started,
    lognormal_rows,
    toy,
)

HERE = os.path.dirname(__file__)


def mixed(**options):
    """Two sources, dropped rows, rows of several samples, samples that are too long."""
    rows = lognormal_rows(150, mean=60)
    rows[3] = rows[77] = {"error": "broken_json"}
    rows[10] = {"n": [20, 150, 7]}
    return Mixture([toy(rows), toy(lognormal_rows(20, seed=1), "b", weight=1.5, loss_weight=0.25)], **options)


def opened(mixture=None, **options):
    return build(
        mixture or mixed(epochs=2, seed=5),
        **{"length": 128, "batch_size": 3, "accumulation": 2, "packing_bins": 8, "overlong": "split", **options},
    )


def same(one, other):
    assert one.batch.keys() == other.batch.keys()
    for name in one.batch:
        np.testing.assert_array_equal(one.batch[name], other.batch[name], err_msg=name)
    assert one.position == other.position
    assert one.info == other.info


@pytest.mark.parametrize("strategy", ["best_fit", "first_fit", "none", "padding_free"])
def test_goes_on_bit_for_bit_from_any_batch(strategy):
    with opened(packing_strategy=strategy) as pipeline:
        items = list(pipeline)
    assert len(items) > 10
    for k in range(0, len(items), 1 if strategy == "best_fit" else 7):
        position = json.loads(json.dumps(items[k].position))
        with opened(packing_strategy=strategy, position=position, prefetch=k % 3) as pipeline:
            rest = list(pipeline)
        assert len(rest) == len(items) - k - 1
        for one, other in zip(items[k + 1 :], rest, strict=True):
            same(one, other)


def test_endless_stream_crosses_epochs_and_resumes():
    mixture = mixed(epochs=None, seed=5)
    with opened(mixture) as pipeline:
        items = [next(pipeline) for _ in range(60)]
    assert items[-1].info.epoch > 2.5
    assert all(a.info.epoch <= b.info.epoch for a, b in itertools.pairwise(items))
    with opened(mixture, position=items[40].position) as pipeline:
        for one in items[41:]:
            same(one, next(pipeline))


def test_the_same_with_0_1_and_2_workers_and_resume_with_another_number():
    with opened() as pipeline:
        items = list(pipeline)
    with opened(workers=1) as pipeline:
        for one, other in zip(items, pipeline, strict=True):
            same(one, other)
    with opened(workers=2, position=items[6].position) as pipeline:
        for one, other in zip(items[7:], pipeline, strict=True):
            same(one, other)


def test_row_subsets_are_the_global_batch_and_info_is_global():
    with opened() as whole, opened(rows=[2, 0]) as some, opened(rows=[1], prefetch=0) as other:
        for one, two, three in zip(whole, some, other, strict=True):
            for name in one.batch:
                np.testing.assert_array_equal(one.batch[name][:, [2, 0]], two.batch[name])
                np.testing.assert_array_equal(one.batch[name][:, [1]], three.batch[name])
            assert one.position == two.position == three.position
            assert one.info.examples == two.info.examples == three.info.examples
            assert (one.info.rows, two.info.rows, three.info.rows) == ((0, 1, 2), (2, 0), (1,))


def test_by_example_the_pieces_of_a_split_sample_count_as_one():
    rows = [{"n": 300}, {"n": [20, 50], "prompt": 5}, {"n": 90}]
    weight: dict = {}
    with opened(Mixture([toy(rows)], shuffle=False), reduction="example") as pipeline:
        for item in pipeline:
            for key, total in sum_per_example(item.batch["weights"], item.batch, item.info).items():
                weight[key] = weight.get(key, 0.0) + total
            assert item.info.trained_tokens == np.count_nonzero(item.batch["weights"])
    assert weight == pytest.approx({(0, 0, 0): 1, (0, 1, 0): 1, (0, 1, 1): 1, (0, 2, 0): 1}, rel=1e-6)


def test_a_padding_free_position_holds_on_another_number_of_devices():
    options = {"packing_strategy": "padding_free", "batch_size": 4, "static_lengths": 2}
    with opened(flat_rows=1, **options) as pipeline:
        items = list(pipeline)
    with opened(flat_rows=4, position=items[2].position, **options) as pipeline:
        rest = list(pipeline)

    def examples(item):
        return [example for micro in item.info.examples for row in micro for example in row]

    assert [examples(item) for item in rest] == [examples(item) for item in items[3:]]
    with pytest.raises(ConfigError, match="max_examples"):
        opened(flat_rows=4, fill="tokens", position=items[2].position, **options)


@pytest.mark.parametrize("strategy", ["best_fit", "none", "padding_free"])
def test_one_epoch_covers_each_sample_once_with_the_last_window_filled_up(strategy):
    rows = [{"n": 40}] * 17
    with build(Mixture([toy(rows)]), length=128, batch_size=2, accumulation=2, packing_strategy=strategy) as pipeline:
        items = list(pipeline)
    examples = [e for item in items for micro in item.info.examples for row in micro for e in row]
    assert sorted(examples) == [(0, r, 0) for r in range(17)]
    assert sum(float(item.batch["weights"].sum()) for item in items) == 17 * 39
    assert len({item.batch["tokens"].shape for item in items}) == 1
    last = items[-1]
    assert last.info.epoch == 1.0 and last.info.examples[-1][-1] == []
    assert last.batch["weights"][-1, -1].sum() == 0 and (last.batch["segment_ids"][-1, -1] == 1).all()


def test_epoch_counts_dropped_rows():
    mixture = Mixture([toy([{"error": "bad"}] * 3 + [{"n": 100}] * 5)], shuffle=False)
    with build(mixture, length=128, batch_size=1) as pipeline:
        epochs = [item.info.epoch for item in pipeline]
    assert epochs == [0.5, 0.625, 0.75, 0.875, 1.0]


def test_counts_by_source_and_loss_weight():
    mixture = Mixture([toy([{"n": 10}] * 4), toy([{"n": 20}] * 2, "b", loss_weight=0.5)])
    with build(mixture, length=128, batch_size=1) as pipeline:
        item = next(pipeline)
    assert item.info.tokens_by_source == {
        "toy": {"tokens": 40, "trained": 36, "examples": 4},
        "b": {"tokens": 40, "trained": 38, "examples": 2},
    }
    assert (item.info.real_tokens, item.info.padding_tokens, item.info.trained_tokens) == (80, 48, 74)
    assert item.batch["weights"].sum() == 36 + 0.5 * 38


def test_the_ledger_resumes_with_the_position():
    def losses(pipeline):
        for _ in pipeline:
            pass
        return pipeline.ledger()

    with opened() as pipeline:
        items = [next(pipeline) for _ in range(12)]
        whole = losses(pipeline)
    assert whole["toy"]["dropped"]["broken_json"] == {"count": 4, "rows": [77, 3]}  # two epochs
    for k in (2, 11):
        with opened(position=items[k].position) as pipeline:
            assert losses(pipeline) == whole


def test_eval_has_each_example_once_and_sums_per_example():
    mixture = Mixture([toy([{"n": n} for n in (50, 60, 70, 30, 100)])], shuffle=False)
    for strategy in ("best_fit", "none"):
        sums = {}
        with build_eval(mixture, length=128, batch_size=2, packing_strategy=strategy) as pipeline:
            for item in pipeline:
                assert item.batch["tokens"].shape == (1, 2, 128)
                for key, value in sum_per_example(item.batch["weights"], item.batch, item.info).items():
                    assert key not in sums
                    sums[key] = value
        assert sums == {(0, r, 0): n - 1 for r, n in enumerate((50, 60, 70, 30, 100))}
    with pytest.raises(ConfigError, match="shuffle=False"):
        build_eval(Mixture([toy([{"n": 5}])]), length=128, batch_size=2)


def test_a_position_of_other_settings_is_refused_naming_them():
    with opened() as pipeline:
        position = next(pipeline).position
    with pytest.raises(ConfigError, match=r"packing best_fit -> none"):
        opened(packing_strategy="none", position=position)
    with pytest.raises(ConfigError, match=r"mixture.seed 5 -> 6"):
        opened(mixed(epochs=2, seed=6), position=position)
    opened(workers=1, prefetch=0, rows=[0], position=position).close()  # none of these decides the order


def test_too_many_dropped_rows():
    rows = [{"n": 50}] * 2000
    for r in range(0, 2000, 3):
        rows[r] = {"error": "no_assistant_turn"}
    with (
        pytest.raises(
            DataError, match=r"no sample.*data\.max_dropped_fraction=0\.2.*no_assistant_turn \(\d+; toy.jsonl:"
        ),
        build(Mixture([toy(rows)]), length=128, batch_size=2, max_dropped=0.2) as pipeline,
    ):
        list(pipeline)


@pytest.mark.parametrize("epochs", [1, None])
def test_no_usable_row_ends_at_once(epochs):
    with (
        pytest.raises(DataError, match="a whole epoch gave no training sample: bad"),
        build(Mixture([toy([{"error": "bad"}] * 9)], epochs=epochs), length=128, batch_size=2) as pipeline,
    ):
        next(pipeline)


def test_fewer_samples_than_a_batch():
    with build(Mixture([toy([{"n": 9}])]), length=128, batch_size=8, accumulation=2) as pipeline:
        items = list(pipeline)
    assert len(items) == 1 and items[0].batch["weights"].sum() == 8


def test_a_killed_worker_is_replaced_without_a_trace(tmp_path):
    def rows(name):
        return [{"n": 30, "marker": str(tmp_path / name)} for _ in range(60)]

    (tmp_path / "never").touch()
    with build(Mixture([toy(rows("never"))], shuffle=False), length=128, batch_size=2) as pipeline:
        items = list(pipeline)
    mixture = Mixture([toy(rows("died"), encode=encode_and_die_once)], shuffle=False)
    with build(mixture, length=128, batch_size=2, workers=1) as pipeline:
        for one, other in zip(items, pipeline, strict=True):
            same(one, other)
    assert (tmp_path / "died").exists()


def test_no_jax_backend_in_workers():
    mixture = Mixture([toy([{"n": 30}] * 20, encode=encode_unless_jax_started)])
    with build(mixture, length=128, batch_size=2, workers=1) as pipeline:
        assert len(list(pipeline)) > 0


def test_what_a_worker_imports_brings_no_jax_along():
    code = "import sys, sftjax.data.encode, sftjax.data.sources, sftjax.data.workers; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert "sftjax.data.tokenizer" in loaded
    assert not {"jax", "grain", "transformers"} & set(loaded)


def test_an_encoder_that_cannot_go_to_another_process_is_an_error():
    mixture = Mixture([toy([{"n": 30}] * 20, encode=lambda row, index, source: encode(row, index, source))])
    said = r"a source or its encoder can't go to another process: .*a lambda.*; data\.workers=0 encodes in this one"
    with build(mixture, length=128, batch_size=2, workers=2) as pipeline, pytest.raises(ConfigError, match=said):
        next(pipeline)


def test_an_error_in_a_worker_arrives_as_itself():
    mixture = Mixture([toy([{"n": "five"}] * 20)])
    with (
        pytest.raises(TypeError),
        build(mixture, length=128, batch_size=2, workers=1) as pipeline,
    ):
        next(pipeline)


def test_no_worker_outlives_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing, os, sys
        from pipe_toys import toy
        from sftjax.data.mixture import Mixture
        from sftjax.data.pipeline import build
        if __name__ == "__main__":
            pipeline = build(Mixture([toy([{"n": 30}] * 500)], epochs=None), length=128, batch_size=2, workers=1)
            next(pipeline)
            print(*[child.pid for child in multiprocessing.active_children()], flush=True)
            os._exit(1)
        """)
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([HERE, os.path.dirname(os.path.dirname(HERE))])}
    done = subprocess.run([sys.executable, script], env=env, stdout=subprocess.PIPE, text=True, timeout=120)
    children = [int(pid) for pid in done.stdout.split()]
    assert children
    deadline = time.monotonic() + 5
    while any(_alive(pid) for pid in children):
        assert time.monotonic() < deadline, "a worker is still there 5 s after its parent"
        time.sleep(0.2)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_first_batch_does_not_wait_for_the_file():
    read = []

    class Counting(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    ingredient = toy(Counting([{"n": 60}] * 100_000))
    with build(Mixture([ingredient]), length=128, batch_size=2, prefetch=0) as pipeline:
        next(pipeline)
    assert len(read) < 600  # the open bins, and one chunk
