"""The ledger before the first step, and what it refuses to start on."""

from __future__ import annotations

import io
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from sftjax.data import formats, preflight
from sftjax.data.mixture import Ingredient, Mixture
from sftjax.data.pipeline import build
from sftjax.data.subsets import Subset, first_rows, hold_out
from sftjax.data.types import Sample
from sftjax.errors import ConfigError, DataError
from tests.data.pipe_toys import Rows, encode, lognormal_rows, toy

TOKENIZER = SimpleNamespace(stop_ids=(7,), bos_id=1)


class ChatEncoder:
    """Rows of messages whose ids and weights stand beside them."""

    def examples(self, row):
        return [*formats.parse(row, "messages")]

    def __call__(self, row, index=0, source=0):
        tokens = np.array(row["tokens"], np.int32)
        return [Sample(tokens, np.array(row["weights"], np.float32), source, index, flags=tuple(row.get("flags", ())))]


def chat(tokens, weights, **more):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    return {"messages": messages, "tokens": tokens, "weights": weights, **more}


def chats(rows, **options):
    return Ingredient(Rows(rows, "chats"), ChatEncoder(), **options)


def look(*ingredients, tokenizer=TOKENIZER, mixture=None, **options):
    return preflight.run(
        mixture or Mixture(ingredients), tokenizer, **{"length": 128, "batch_size": 2, "packing_bins": 8, **options}
    )


def test_the_ledger():
    rows = [{"n": 100, "prompt": 40}] * 6 + [{"error": "empty_answer"}] + [{"n": [200, 50], "prompt": 40}]
    report = look(toy(rows), toy([{"n": 20}] * 2, "b"))
    assert report.complete and (report.rows_read, report.rows_dropped, report.samples) == (10, 1, 10)
    assert report.dropped == {"empty_answer": {"count": 1, "rows": {"toy": ["toy.jsonl:7"]}}}
    assert report.tokens == 600 + 250 + 40 and report.trained_tokens == 6 * 60 + 160 + 10 + 2 * 19
    assert report.trained_share == pytest.approx(report.trained_tokens / report.tokens)
    assert (report.truncated, report.lost_tokens, report.lost_trained_tokens) == (1, 72, 72)
    assert report.length["p50"] == 100 and report.length["max"] == 200
    assert report.coverage == 0.9 and report.proposed_length == 256
    assert any("128 holds 90.0% of the samples: 256" in w for w in report.warnings)
    assert {name: s["rows"] for name, s in report.per_source.items()} == {"toy": 8, "b": 2}
    json.dumps(report.to_dict())
    report.check()
    console = Console(record=True, width=100, file=io.StringIO())
    report.print(console)
    text = console.export_text()
    assert "empty_answer" in text and "toy.jsonl:7" in text and "warning: max_length=128" in text


@pytest.mark.parametrize("strategy", ["best_fit", "first_fit", "none", "padding_free"])
@pytest.mark.parametrize("epochs", [1, 2.5])
def test_steps_and_tokens_are_exact_where_every_row_is_read(strategy, epochs):
    rows = lognormal_rows(80)
    rows[7] = {"error": "bad"}
    mixture = Mixture([toy(rows), toy(lognormal_rows(15, seed=2), "b", weight=2)], epochs=epochs, seed=4)
    options = {"packing_strategy": strategy, "accumulation": 2}
    if strategy == "padding_free":
        options["static_lengths"] = 2
    report = look(mixture=mixture, **options)
    with build(mixture, length=128, batch_size=2, packing_bins=8, **options) as pipeline:
        infos = [item.info for item in pipeline]
    real = sum(info.real_tokens for info in infos)
    assert (report.steps, report.tokens_to_come) == (len(infos), real)
    assert report.packing_efficiency == pytest.approx(real / (real + sum(info.padding_tokens for info in infos)))


def test_large_data_is_sampled_and_finished_in_the_background():
    rows = lognormal_rows(5000)
    rows[1] = {"error": "bad"}
    mixture = Mixture([toy(rows)], epochs=2, shuffle=False)
    report = look(mixture=mixture, sample_rows=500, batch_size=8)
    assert not report.complete and report.rows_read == 500 and report.rows_dropped == 0
    assert any("sample of 500 of 5,000 rows" in w for w in report.warnings)
    exact = look(mixture=mixture, batch_size=8, sample_rows=5000)
    assert exact.complete and report.steps == pytest.approx(exact.steps, rel=0.05)
    done = []
    report.finish(done.append).join(timeout=60)
    (finished,) = done
    assert finished.complete and finished.steps == report.steps
    assert (finished.rows_read, finished.tokens, finished.length) == (5000, exact.tokens, exact.length)
    assert finished.dropped["bad"] == {"count": 1, "rows": {"toy": ["toy.jsonl:2"]}}
    assert exact.finish() is None


def test_a_closed_finish_leaves_the_sample_as_it_is():
    mixture, done = Mixture([toy([{"n": 60}] * 100_000)], shuffle=False), []
    report = look(mixture=mixture, sample_rows=100)
    finishing = report.finish(done.append)
    finishing.close()
    assert not finishing.is_alive() and not done


def test_the_first_step_does_not_wait_for_the_file():
    began = time.monotonic()
    look(toy([{"n": 60}] * 2_000_000), sample_rows=200)
    assert time.monotonic() - began < 5


def test_given_steps_are_kept():
    report = look(mixture=Mixture([toy(lognormal_rows(50))], epochs=None), max_steps=77)
    assert report.steps == 77 and report.tokens_to_come == pytest.approx(77 * 256, rel=0.3)


def test_conversations_are_looked_at_closely():
    rows = [chat([1, 1, 5, 6, 7], [0, 0, 0, 1, 1], flags=["straddle"]), chat([1, 5, 6, 8], [0, 0, 1, 1])]
    report = look(chats(rows))
    assert report.stop_trained == 0.5 and report.double_bos == 1 and report.flags == {"straddle": 1}
    assert any("50.0% of the conversations train a stop token" in w for w in report.warnings)
    assert any("1 samples begin with two BOS" in w for w in report.warnings)
    report.check()


def test_refuses_when_nothing_is_trained():
    report = look(toy([{"error": "no_assistant_turn"}] * 3 + [{"n": 4, "prompt": 4}]))
    with pytest.raises(DataError, match=r"nothing would be trained.*no_assistant_turn \(3; toy.jsonl:.*data.format"):
        report.check()
    assert report.steps == 0


def test_refuses_when_everything_is_trained_in_a_chat_format():
    with pytest.raises(DataError, match=r"chats: every token would be trained.*chat template"):
        look(chats([chat([1, 5, 6, 7], [0, 1, 1, 1])] * 3)).check()
    look(toy([{"n": 9}] * 3)).check()  # plain text is trained whole


def test_refuses_when_no_stop_token_is_trained():
    rows = [chat([1, 5, 6, 8], [0, 0, 1, 1]), chat([1, 7, 6, 8], [0, 0, 1, 1])]
    with pytest.raises(DataError, match=r"chats: no stop token \(ids \[7\]\).*tools/preview.py"):
        look(chats(rows)).check()
    look(chats(rows), tokenizer=None).check()


def test_refuses_losses_above_the_threshold():
    rows = [{"n": 50}] * 7 + [{"error": "bad"}] * 3
    look(toy(rows), max_dropped=0.3).check()
    with pytest.raises(DataError, match=r"3 of 10 rows gave no sample.*0.2 .*bad \(3; toy.jsonl:"):
        look(toy(rows), max_dropped=0.2).check()


def test_over_long_samples_stop_it_where_the_policy_says_so():
    with pytest.raises(DataError, match=r"toy.jsonl:1: a sample of 300 tokens"):
        look(toy([{"n": 300}]), overlong="error")
    with pytest.raises(ConfigError, match="multiple of 128"):
        look(toy([{"n": 300}]), length=100)


def test_hold_out_splits_rows_without_overlap_and_keeps_replay():
    first, text = toy([{"n": n} for n in range(5, 55)]), toy([{"n": 5}] * 10, "text", replay=True)
    train, held = hold_out([first, text], 0.1, seed=3)
    assert [len(i.source) for i in train] == [45, 10] and [len(i.source) for i in held] == [5]
    rows = [[part[0].source[k]["n"] for k in range(len(part[0].source))] for part in (train, held)]
    assert sorted(rows[0] + rows[1]) == list(range(5, 55))
    assert held[0].source.location(0) == f"toy.jsonl:{held[0].source[0]['n'] - 4}"
    assert [i.source.rows.tolist() for i in hold_out([first], 0.1, seed=3)[1]] == [held[0].source.rows.tolist()]
    with pytest.raises(DataError, match="1 rows can't give"):
        hold_out([toy([{"n": 5}])], 0.1)
    assert [len(i.source) for i in first_rows([first, toy([{"n": 5}] * 10, "b")], 12)] == [10, 2]


def test_a_subset_goes_through_the_pipeline():
    subset = Subset(Rows([{"n": n} for n in range(10, 40)]), np.array([3, 8]))
    with build(Mixture([Ingredient(subset, encode)]), length=128, batch_size=1) as pipeline:
        assert next(pipeline).info.real_tokens == 13 + 18
