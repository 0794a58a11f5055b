"""What training does to what it doesn't train: plain text's loss, KL to the base, and stopping by either."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from sftjax import config as config_lib
from sftjax import divergence, job_data, loading, samples
from sftjax.data.encode import RowEncoder
from sftjax.data.mixture import Ingredient, Mixture
from sftjax.data.sources import open_source
from sftjax.errors import ConfigError
from sftjax.score import encode_rows, score_samples
from tests import tiny_run

TEXTS = [
    "The capital of France is Paris. How are you today?",
    "Hello there, what is it? Yes. No. Four.",
    "import json\nimport re\nfrom pathlib import Path",
    "x = {'a': 1, 'b': [2, 3]}",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that forgets: stopped by its plain text's loss, after two evaluations."""
    folder = tmp_path_factory.mktemp("forgetting")
    tiny_run.model(folder / "model")
    tiny_run.conversations(folder / "chats.jsonl", 24)
    tiny_run.conversations(folder / "held_out.jsonl", 4, seed=1)
    (folder / "plain.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    done = tiny_run.run(command(folder, folder / "run"))
    return folder, done.stdout


def command(folder, run_dir, **fields):
    settings = {
        "data__eval_fraction": 0.0,
        "data__eval": f"('{folder}/held_out.jsonl',)",
        "data__max_length": 256,
        "train__max_steps": 12,
        "train__learning_rate": 0.02,
        "train__warmup_ratio": 0.0,
        "eval__forgetting": f"('{folder}/plain.jsonl',)",
        "eval__kl_tokens": 40,
        "eval__eval_steps": 3,
        "eval__early_stopping_patience": 1,
        "eval__metric_for_best_model": "plain_text_loss",
        "eval__num_samples": 0,
        "export__dtype": "float32",
    }
    return tiny_run.command(folder / "model", folder / "chats.jsonl", run_dir, **{**settings, **fields})


def test_plain_text_is_followed_from_the_start(run):
    folder, said = run
    evals = [line for line in tiny_run.lines(folder / "run" / "metrics.jsonl") if "plain_text_loss" in line]
    assert evals[0]["step"] == 0 and evals[-1]["plain_text_loss"] > evals[0]["plain_text_loss"] + 0.5
    assert all(line["plain_text_perplexity"] == pytest.approx(np.exp(line["plain_text_loss"])) for line in evals)

    model = loading.load_model(str(folder / "model"))
    source = open_source({"path": str(folder / "plain.jsonl")})
    made, errors = encode_rows(source, RowEncoder(model.tokenizer, format="text"))
    lines = [line for _, line in score_samples(model.config, model.runtime, model.variables, made)]
    nll, tokens = (sum(line[name] for line in lines) for name in ("nll", "num_trained_tokens"))
    assert not errors and evals[0]["plain_text_loss"] == pytest.approx(nll / tokens, rel=1e-4)

    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["plain_text_loss_before"] == evals[0]["plain_text_loss"]
    low, high = summary["plain_text_difference_95"]
    assert 0 < low <= summary["plain_text_difference"] <= high
    assert "above 0 is what was forgotten" in said
    assert "Forgetting" in (folder / "run" / "report.html").read_text()


def test_any_metric_stops_and_says_which_checkpoint_is_exported(run):
    folder, said = run
    evals = {
        line["step"]: line["plain_text_loss"]
        for line in tiny_run.lines(folder / "run" / "metrics.jsonl")
        if "plain_text_loss" in line
    }
    assert list(evals) == [0, 3, 6]  # of 12 steps: the second was no better than the first
    assert evals[6] > evals[3]
    assert json.loads((folder / "run" / "summary.json").read_text())["exported_step"] == 3
    assert "step 3 had the best plain_text_loss" in said


def test_kl_is_that_of_the_export_to_the_base(run):
    folder, _ = run
    moved = {
        line["step"]: line["kl_to_base"]
        for line in tiny_run.lines(folder / "run" / "metrics.jsonl")
        if "kl_to_base" in line
    }
    assert moved[0] == 0 and moved[6] > 0.1
    values = []
    for path in (folder / "model", folder / "run" / "export"):
        model = loading.load_model(str(path))
        source = open_source({"path": str(folder / "held_out.jsonl")})
        mixture = Mixture([Ingredient(source, RowEncoder(model.tokenizer))], shuffle=False, epochs=1)
        chosen = samples.first_samples(mixture, 40)
        values.append(divergence.log_probabilities(model.config, model.runtime, model.variables, chosen, 40))
    assert len(values[0]) == 40 and divergence.kl(*values) == pytest.approx(moved[3], rel=1e-3)


def test_a_metric_that_is_not_measured_is_refused():
    config = config_lib.defaults()
    held_out, plain_text = SimpleNamespace(names=("a", "b")), SimpleNamespace(names=("c",))
    job_data.check_metric(config, held_out, None)
    job_data.check_metric(config, None, None)  # nothing is measured, and nothing chosen
    for metric in ("eval_loss/b", "plain_text_loss"):
        config.eval.metric_for_best_model = metric
        job_data.check_metric(config, held_out, plain_text)
    config.eval.metric_for_best_model = "kl_to_base"
    with pytest.raises(ConfigError, match="'kl_to_base' is not measured in this run; measured are eval_loss,"):
        job_data.check_metric(config, held_out, plain_text)
    config.eval.kl_tokens = 64
    job_data.check_metric(config, held_out, plain_text)
