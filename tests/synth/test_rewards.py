"""Rewards of a tiny model: a scalar head over it, and its log-likelihood."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax import inference, loading
from sftjax.errors import ConfigError
from sftjax.generate.sample import encode_conversation
from sftjax.models import decoder
from sftjax.synth.rewards import make_reward
from sftjax.weights import hf, safetensors
from tests import tiny_run

ROW = {"prompt": "the cat sees a", "answer": "red house"}
ANSWERS = ["red house", "old tree and then a new river", "the"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_run.model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def reward_model(model, tmp_path_factory):
    """The same decoder with a head of one label, as transformers writes it."""
    return classifier(model, tmp_path_factory.mktemp("reward") / "m", labels=1)


def classifier(model, folder, labels):
    folder.mkdir()
    config = json.loads((model / "config.json").read_text())
    names = {str(number): f"LABEL_{number}" for number in range(labels)}
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": names}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    tensors = {name: read(stored) for name, stored in safetensors.open_folder(hf.Folder(str(model))).items()}
    del tensors["lm_head.weight"]
    tensors["score.weight"] = np.random.default_rng(0).normal(size=(labels, 64)).astype(np.float32)
    write(folder / "model.safetensors", tensors)
    return folder


def read(stored):
    out = np.empty(stored.shape, np.float32)
    stored.read((), out)
    return out


def write(path, tensors):
    from safetensors.numpy import save_file

    save_file(tensors, str(path), {"format": "pt"})


def test_a_reward_model_is_the_decoder_and_its_head_at_the_last_token(model, reward_model):
    reward = make_reward(f"reward_model:{reward_model}")
    loaded = loading.load_model(str(model))
    (head,) = read(safetensors.open_folder(hf.Folder(str(reward_model)))["score.weight"])
    messages = [{"role": "user", "content": ROW["prompt"]}, {"role": "assistant", "content": ANSWERS[1]}]
    ids = jnp.asarray([encode_conversation(loaded.tokenizer, messages, generation=False)])
    run = jax.jit(lambda *inputs: decoder.hidden_states(loaded.config, loaded.runtime, loaded.variables, *inputs)[0])
    hidden = run(ids, jnp.arange(ids.shape[1])[None], jnp.ones_like(ids))
    found = reward.score([(ROW, answer) for answer in ANSWERS])
    assert found[1] == pytest.approx(float(hidden[0, -1] @ head), rel=1e-4, abs=1e-4)
    alone = [reward.score([(ROW, answer)])[0] for answer in ANSWERS]
    np.testing.assert_allclose(found, alone, rtol=1e-5)


def test_a_language_model_is_no_reward_model(model, tmp_path):
    with pytest.raises(ConfigError, match="not a sequence classifier"):
        make_reward(f"reward_model:{model}")
    with pytest.raises(ConfigError, match="3 labels"):
        make_reward(f"reward_model:{classifier(model, tmp_path / 'three', labels=3)}")


def test_a_reward_model_is_no_language_model(reward_model):
    with pytest.raises(ConfigError, match=r"lm_head\.weight .* is missing"):
        hf.open_source(hf.open_model(reward_model))


def test_another_head_is_another_reward_model(model, reward_model, tmp_path):
    other = classifier(model, tmp_path / "other", labels=1)
    tensors = {name: read(stored) for name, stored in safetensors.open_folder(hf.Folder(str(other))).items()}
    write(other / "model.safetensors", tensors | {"score.weight": -tensors["score.weight"]})
    first, second = make_reward(f"reward_model:{reward_model}"), make_reward(f"reward_model:{other}")
    assert first.fingerprint != second.fingerprint
    pairs = [(ROW, answer) for answer in ANSWERS]
    np.testing.assert_allclose(first.score(pairs), -np.array(second.score(pairs)), rtol=1e-5)


def test_the_log_likelihood_is_that_of_the_scoring_tool(model, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": ROW["prompt"]}, {"role": "assistant", "content": answer}]}
        for answer in ANSWERS
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    inference.score_file(model=str(model), data=str(data), out=str(tmp_path / "out.jsonl"))
    wanted = [-line["nll"] / line["num_trained_tokens"] for line in tiny_run.lines(tmp_path / "out.jsonl")]
    found = make_reward(f"loglik:{model}").score([(ROW, answer) for answer in ANSWERS])
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_functions_and_scorers(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def by_length(row, answer):\n    return len(answer) if answer else float('nan')\n")
    reward = make_reward(f"{file}:by_length")
    assert reward.score([(ROW, "four"), (ROW, "")]) == [4.0, None]
    first = reward.fingerprint
    file.write_text(file.read_text() + "\n")
    assert make_reward(f"{file}:by_length").fingerprint != first
    assert make_reward("exact").score([(ROW, "red house"), (ROW, "house")]) == [1.0, 0.0]
    with pytest.raises(ConfigError, match="unknown"):
        make_reward("nonsense")
