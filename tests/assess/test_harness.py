"""lm-evaluation-harness on a tiny model and a local task."""

import copy
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from lm_eval.api.instance import Instance

from sftjax import loading
from sftjax.assess import harness
from sftjax.errors import ConfigError
from sftjax.models import decoder
from tests import tiny_run
from tests.assess.test_recorded import a_run

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/docs.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""
WRITE = """
task: tiny_write
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/docs.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    tiny_run.model(folder / "model")
    docs = [{"question": f"the {one} cat", "choices": ["sees a dog", "likes"], "label": 1} for one in ("red", "old")]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "tasks").mkdir()
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        (folder / "tasks" / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    return harness.SftjaxLM(str(folder / "model"), max_length=24, max_gen_toks=5)


@pytest.fixture(scope="module")
def logprobs(folder):
    """Log-probabilities [L, V] of a plain forward pass over some ids."""
    model = loading.load_model(str(folder / "model"))

    @jax.jit
    def forward(variables, ids):
        positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        hidden, _ = decoder.hidden_states(model.config, model.runtime, variables, ids, positions, jnp.ones_like(ids))
        return jax.nn.log_softmax(decoder.logits(model.config, model.runtime, variables, hidden))

    def compute(ids):
        return np.asarray(forward(model.variables, np.pad(np.array([ids], np.int32), [(0, 0), (0, 32 - len(ids))])))[0]

    return compute


def ask(kind, *arguments):
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def test_log_likelihoods_are_the_models(lm, logprobs):
    context, continuation = "the red cat", " sees a dog"
    (ours, greedy), (empty, _) = lm.loglikelihood(ask("loglikelihood", (context, continuation), ("", "a dog")))
    ids, start = lm.tok_encode(context + continuation), len(lm.tok_encode(context))
    table = logprobs(ids)
    np.testing.assert_allclose(ours, sum(table[at - 1, ids[at]] for at in range(start, len(ids))), rtol=1e-4)
    assert greedy == all(table[at - 1].argmax() == ids[at] for at in range(start, len(ids)))
    ids = [lm.prefix_token_id, *lm.tok_encode("a dog")]
    table = logprobs(ids)
    np.testing.assert_allclose(empty, sum(table[at - 1, ids[at]] for at in range(1, len(ids))), rtol=1e-4)


def test_what_it_would_say_is_greedy(lm):
    (text,) = lm.generate_until(ask("generate_until", ("the red cat", {"until": [], "max_gen_toks": 3})))
    ids = lm.tok_encode("the red cat")
    said = lm._ours.encode(text)
    ((_, greedy),) = lm._loglikelihood_tokens([(("", ""), ids, said[:1])])
    assert text and greedy
    ((_, greedy),) = lm._loglikelihood_tokens([(("", ""), ids, [said[0] + 1])])
    assert not greedy


def test_rolling_counts_every_token_once(lm, logprobs):
    text = "the red cat sees a small dog and then the old river finds a new tree with the house of a cat"
    ids = lm.tok_encode(text)
    assert 24 < len(ids) <= 48  # two windows
    (ours,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
    first = [lm.prefix_token_id, *ids[:24]]
    expected = sum(logprobs(first)[at, ids[at]] for at in range(24))
    rest = ids[-25:]  # the last window sees as much as fits
    count = len(ids) - 24
    expected += sum(logprobs(rest)[at - 1, rest[at]] for at in range(25 - count, 25))
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_a_text_is_conditioned_on_bos_else_on_eos(folder, lm):
    """The harness's rule; that the numbers are its own is in tests/parity/test_harness.py."""
    assert lm.prefix_token_id == lm._ours.eos_id  # this tokenizer has no BOS
    with_bos = copy.copy(lm)
    with_bos._ours = copy.copy(lm._ours)
    with_bos._ours.bos_id = 0  # which it doesn't put in front by itself
    assert with_bos.prefix_token_id == 0
    (first,), (second,) = (
        one.loglikelihood_rolling(ask("loglikelihood_rolling", ("a dog",))) for one in (lm, with_bos)
    )
    assert first != second


def test_stop_strings_and_settings(lm):
    (whole,) = lm.generate_until(ask("generate_until", ("a dog", {"max_gen_toks": 5})))
    stop = whole[2:4]
    (cut,) = lm.generate_until(ask("generate_until", ("a dog", {"max_gen_toks": 5, "until": [stop]})))
    assert cut == whole[: whole.index(stop)]
    assert harness.generation_settings({"temperature": 0.7, "do_sample": False, "until": "x"}, 9) == {
        "stop": ["x"], "max_new_tokens": 9, "temperature": 0.0
    }  # fmt: skip
    assert harness.generation_settings({"do_sample": True, "top_p": 0.5}, 9)["temperature"] == 1.0
    with pytest.raises(ConfigError, match="num_beams"):
        harness.generation_settings({"num_beams": 4}, 9)


def test_conversations(lm):
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    asked = lm.apply_chat_template(history[:1])
    assert asked.endswith("<|im_start|>assistant\n") and lm.apply_chat_template(history, False) == asked + "b"
    assert lm._ours.hf.convert_tokens_to_ids("<|im_start|>") in lm.tok_encode(asked)


def test_tasks_on_the_base_and_the_tuned_model_get_into_the_report(folder, tmp_path, capsys):
    run = a_run(tmp_path / "run")
    (tmp_path / "run" / "export" / "config.json").unlink()
    (tmp_path / "run" / "export").rmdir()
    (tmp_path / "run" / "export").symlink_to(folder / "model")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": {"path": str(folder / "model")}}))
    results = harness.run(
        ["tiny_choice", "tiny_write"],
        str(tmp_path / "out.json"),
        run_folder=run,
        include_path=str(folder / "tasks"),
        max_length=64,
    )
    assert results["base"] == results["model"]  # it is the same model
    model = harness.SftjaxLM(str(folder / "model"), max_length=64)
    right = 0
    for one in ("red", "old"):
        choices = [(f"the {one} cat", f" {choice}") for choice in ("sees a dog", "likes")]
        first, second = (logprob for logprob, _ in model.loglikelihood(ask("loglikelihood", *choices)))
        right += second > first
    assert results["model"]["tiny_choice"]["acc,none"] == right / 2
    assert json.loads((tmp_path / "out.json").read_text())["model"] == results["model"]
    assert "tiny_choice: acc" in (tmp_path / "run" / "report.html").read_text()
    assert "tiny_write" in capsys.readouterr().out
    assert "torch" not in sys.modules
    with pytest.raises(ConfigError, match="knows no task nothing_such"):
        harness.run(["nothing_such"], str(tmp_path / "x.json"), model="m", include_path=str(folder / "tasks"))
