"""A multimodal model tuned on text, as a user runs it: the whole comes out, its tower untouched."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA around a tiny Llama."""
    path = tiny_run.model(tmp_path_factory.mktemp("wrapped") / "model")
    tensors = load_file(path / "model.safetensors")
    stored = {f"language_model.{name}": value for name, value in tensors.items()}
    stored["vision_tower.patch.weight"] = np.arange(6, dtype=np.float16).reshape(2, 3)
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((path / "config.json").read_text())
    vision = {"model_type": "clip_vision_model", "hidden_size": 16}
    whole = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "vision_config": vision}
    (path / "config.json").write_text(json.dumps(whole | {"text_config": text, "tie_word_embeddings": False}))
    return path


@pytest.mark.parametrize("text_only", [False, True])
def test_text_is_tuned_and_the_tower_comes_out(folder, tmp_path, text_only):
    data = tiny_run.conversations(tmp_path / "data.jsonl", 30)
    settings = dict(train__max_steps=2, eval__num_samples=1, export__text_only=text_only, export__dtype="float32")
    tiny_run.run(tiny_run.command(folder, data, tmp_path / "run", **settings))
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "run/export/model.safetensors")
    written = json.loads((tmp_path / "run/export/config.json").read_text())
    if text_only:
        assert written["model_type"] == "llama" and not any("language_model" in name for name in after)
        return
    assert set(after) == set(before) and written["model_type"] == "llava"
    assert after["vision_tower.patch.weight"].tobytes() == before["vision_tower.patch.weight"].tobytes()
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(after[name], before[name])
    verified = json.loads((tmp_path / "run/export/verification.json").read_text())
    assert verified["passed"]


def test_an_adapter_is_refused_before_the_first_step(folder, tmp_path):
    data = tiny_run.conversations(tmp_path / "data.jsonl", 8)
    done = tiny_run.run(tiny_run.command(folder, data, tmp_path / "run", peft__method="lora"), code=78)
    assert "export.merge=True" in done.stderr
