"""The whole evaluation on a tiny model and a changed copy of it as its base."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sftjax import divergence, loading
from sftjax.assess import items as items_lib
from sftjax.assess import run as runs
from sftjax.assess.answering import Model
from sftjax.errors import ConfigError, DataError
from sftjax.generate import sample
from sftjax.models import decoder
from tests import tiny_run

ROWS = [
    {"question": "the red cat sees", "answer": "a dog #### 7", "source": "a"},
    {"question": "a blue house and the river", "answer": "old tree #### 8", "source": "b"},
    {"instruction": "likes", "input": "a small dog", "output": "the cat"},
    {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "dog finds a tree"}]},
    {"prompt": "what then", "answer": ["new", "old"]},
    {"turns": ["a cat", "and the dog"], "question_id": 81},
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def changed_copy(folder, copy):
    """The same architecture with other weights, so that programs are compiled once."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    noise = np.random.default_rng(0)
    save_file(
        {name: w + 0.05 * noise.standard_normal(w.shape, np.float32) for name, w in weights.items()},
        copy / "model.safetensors",
        {"format": "pt"},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assess")
    tiny_run.model(folder / "model")
    changed_copy(folder / "model", folder / "base")
    write_rows(folder / "rows.jsonl", ROWS)
    (folder / "mine.py").write_text("def length(row, answer):\n    return len(answer)\n")
    return folder


@pytest.fixture(scope="module")
def done(folder):
    """(lines, summary) of the tool's function with everything that needs no endpoint."""
    out = folder / "out" / "answers.jsonl"
    summary = runs.evaluate(
        runs.Which(str(folder / "model")),
        [str(folder / "rows.jsonl")],
        str(out),
        base=runs.Which(str(folder / "base")),
        scorers=[f"{folder}/mine.py:length", "length:0-3words"],
        wanted=runs.Wanted(alpaca_eval=str(folder / "alpaca.json"), mt_bench=str(folder / "mt.jsonl")),
        max_new_tokens=6,
    )
    return tiny_run.lines(out), summary


def test_lines_have_the_documented_fields(done):
    lines, _ = done
    names = {"generated", "finish_reason", "num_tokens", "mean_logprob", "expected_nll", "expected_tokens", "scores"}
    documented = {"index", "source", "instruction", "expected"} | names | {f"base_{name}" for name in names}
    for number, line in enumerate(lines):
        assert set(line) - {"turns", "base_turns"} == documented and line["index"] == number
    assert [line["source"] for line in lines] == ["a", "b"] + ["rows.jsonl"] * 4
    assert [line["expected"] for line in lines] == [
        "a dog #### 7", "old tree #### 8", "the cat", "dog finds a tree", "new", None
    ]  # fmt: skip
    assert lines[2]["instruction"] == "likes\n\na small dog"
    assert len(lines[5]["turns"]) == 2 and lines[5]["turns"][1] == lines[5]["generated"]
    assert lines[5]["expected_nll"] is None and lines[5]["expected_tokens"] == 0
    assert all(line["scores"]["mine.py:length"] == len(line["generated"]) for line in lines)
    assert all(line["base_scores"]["mine.py:length"] == len(line["base_generated"]) for line in lines)
    assert any(line["generated"] != line["base_generated"] for line in lines)


def test_answers_and_losses_are_the_models_own(done, folder):
    """Against the generator and a plain forward pass, one row at a time."""
    lines, summary = done
    model = loading.load_model(str(folder / "model"))
    tokenizer = model.tokenizer
    question = [{"role": "user", "content": ROWS[0]["question"]}]
    (alone,) = sample.generate(model.config, model.runtime, model.variables, tokenizer, [question], max_new_tokens=6)
    assert lines[0]["generated"] == alone.text
    np.testing.assert_allclose(lines[0]["mean_logprob"], np.mean(alone.logprobs), rtol=1e-5)

    prompt = sample.encode_prompt(tokenizer, question)
    ids = [*prompt, *tokenizer.encode(ROWS[0]["answer"]), *tokenizer.stop_ids[:1]]
    tokens = np.array([ids], np.int32)
    hidden, _ = jax.jit(decoder.hidden_states, static_argnums=(0, 1))(
        model.config, model.runtime, model.variables, tokens, np.arange(len(ids))[None], np.ones_like(tokens)
    )
    logprobs = np.asarray(jax.nn.log_softmax(decoder.logits(model.config, model.runtime, model.variables, hidden)))[0]
    nll = -sum(logprobs[place - 1, ids[place]] for place in range(len(prompt), len(ids)))
    np.testing.assert_allclose(lines[0]["expected_nll"], nll, rtol=1e-4)
    assert lines[0]["expected_tokens"] == len(ids) - len(prompt)
    assert summary["model"]["loss"]["a"]["loss"] == lines[0]["expected_nll"] / lines[0]["expected_tokens"]


def test_the_summary_adds_up(done):
    lines, summary = done
    for part, prefix in (("model", ""), ("base", "base_")):
        losses = summary[part]["loss"]
        nll = sum(line[f"{prefix}expected_nll"] or 0 for line in lines)
        tokens = sum(line[f"{prefix}expected_tokens"] for line in lines)
        np.testing.assert_allclose(losses["all"]["loss"], nll / tokens)
        np.testing.assert_allclose(losses["all"]["perplexity"], np.exp(nll / tokens))
        assert set(losses) == {"all", "a", "b", "rows.jsonl"} and losses["all"]["rows"] == 5
        lengths = [line[f"{prefix}scores"]["mine.py:length"] for line in lines]
        score = summary[part]["scores"]["mine.py:length"]
        np.testing.assert_allclose(score["mean"], np.mean(lengths))
        assert score["low"] <= score["mean"] <= score["high"]
        assert summary[part]["answers"]["count"] == 7  # one row has two turns
    change = summary["difference"]["scores"]["mine.py:length"]["mean"]
    means = [summary[part]["scores"]["mine.py:length"]["mean"] for part in ("model", "base")]
    np.testing.assert_allclose(change, means[0] - means[1], atol=1e-9)
    assert summary["kl_to_base"] > 0
    runs.print_summary(summary)


def test_kl_is_that_of_the_whole_vocabulary_and_0_to_itself(folder):
    items = items_lib.read([str(folder / "rows.jsonl")], limit=3)
    models = [Model(str(folder / name)) for name in ("model", "base")]
    samples = [models[0].sample_of(item, item.expected) for item in items]
    first, second = (model.log_probabilities(samples, 7) for model in models)
    assert first.shape == (7, models[0].loaded.config.vocab_size)
    np.testing.assert_allclose(np.exp(first).sum(-1), 1, rtol=1e-5)
    by_hand = np.mean(np.sum(np.exp(first) * (first - second), axis=-1))
    np.testing.assert_allclose(divergence.kl(first, second), by_hand, rtol=1e-4)
    assert divergence.kl(first, first) == 0 and np.isnan(divergence.kl(first[:0], first[:0]))
    grown = np.concatenate([first - np.log(2), np.full((7, 1), -np.log(2))], axis=1)  # half of it on a new token
    np.testing.assert_allclose(divergence.kl(first, grown), 0, atol=1e-6)
    # the first trained token of the second sample, predicted from what stands before it
    (first_sample, _), (number, where) = divergence.places(samples, 40)[:2]
    assert (
        (first_sample, number) == (0, 1) and samples[1].weights[where[0] + 1] > 0 and samples[1].weights[where[0]] == 0
    )


def test_files_of_other_evaluations(done, folder):
    lines, _ = done
    rows = json.loads((folder / "alpaca.json").read_text())
    assert [row["output"] for row in rows] == [line["generated"] for line in lines]
    assert rows[0] == {"instruction": "the red cat sees", "output": lines[0]["generated"], "generator": "model",
                       "dataset": "a"}  # fmt: skip
    (answer,) = tiny_run.lines(folder / "mt.jsonl")
    assert answer["question_id"] == 81 and answer["model_id"] == "model" and len(answer["answer_id"]) == 22
    assert answer["choices"] == [{"index": 0, "turns": lines[5]["turns"]}]


def test_bad_requests_are_known_before_a_model_is_loaded(folder, tmp_path):
    def evaluate(rows, **options):
        runs.evaluate(runs.Which("no such model"), [rows], str(tmp_path / "out.jsonl"), **options)

    rows = str(folder / "rows.jsonl")
    with pytest.raises(DataError, match=r"odd.jsonl:2: a row has nothing to answer"):
        evaluate(write_rows(tmp_path / "odd.jsonl", [ROWS[0], {"text": "x"}]))
    with pytest.raises(DataError, match="is empty"):
        evaluate(write_rows(tmp_path / "empty.jsonl", []))
    with pytest.raises(DataError, match="no right answer"):
        evaluate(write_rows(tmp_path / "asks.jsonl", [{"question": "?"}]), scorers=["exact"])
    with pytest.raises(ConfigError, match="give --base"):
        evaluate(rows, wanted=runs.Wanted(contradictions="c.jsonl"))
    with pytest.raises(ConfigError, match="question_id"):
        evaluate(write_rows(tmp_path / "plain.jsonl", ROWS[:2]), wanted=runs.Wanted(mt_bench="m.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()
