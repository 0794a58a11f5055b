"""Multimodal models around a language model that is known: its text in and out, the rest byte for byte."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from sftjax import convert, tree
from sftjax.errors import ConfigError
from sftjax.weights import families, hf

TOWER = {
    "vision_tower.patch.weight": np.arange(12, dtype=np.float16).reshape(3, 4),
    "multi_modal_projector.linear.weight": np.full((2, 2), np.nan, np.float32),
}
PLACES = {
    "as transformers 4 saved it": ("language_model.model.", "language_model.lm_head."),
    "as in memory": ("model.language_model.", "lm_head."),
}


def wrapped(folder, model_type, family, place, **outside):
    """(folder, config.json, the text model's tensors): a wrapper whose text_config leaves out the class's defaults."""
    raw = tiny.config_dict(family)
    tensors = tiny.random_tensors(raw)
    defaults = {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "attention_bias": False}
    text = {
        key: value for key, value in raw.items() if defaults.get(key, ...) != value and key != "tie_word_embeddings"
    }
    whole = {
        "model_type": model_type,
        "architectures": ["TheWrapper"],
        "text_config": text,
        "vision_config": {"hidden_size": 16, "model_type": "siglip_vision_model"},
        "image_token_index": 95,
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        **outside,
    }
    names = {name: name.replace("lm_head.", place[1], 1) for name in tensors if name.startswith("lm_head.")}
    names |= {name: name.replace("model.", place[0], 1) for name in tensors if name.startswith("model.")}
    stored = {names[name]: value for name, value in tensors.items()} | TOWER
    tiny.write_model(folder, whole, stored, files=2)
    (folder / "preprocessor_config.json").write_text('{"size": 28}')
    return whole, tensors, stored


def read_all(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("model_type", "family"), [("gemma3", "gemma3"), ("mistral3", "mistral"), ("qwen3_vl", "qwen3")]
)
def test_the_whole_goes_out_as_it_came(tmp_path, model_type, family, place):
    whole, tensors, stored = wrapped(tmp_path / "in", model_type, family, PLACES[place])
    files = hf.open_model(tmp_path / "in")
    assert files.config == families.read_config(tiny.config_dict(family))
    loaded = tree.flatten(hf.load_params(files, files.config, "float32"))
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(loaded["layers_0/0/mlp/up_proj/weight"][1], tensors[name].astype(np.float32))
    convert.convert(str(tmp_path / "in"), str(tmp_path / "out"))
    after = read_all(tmp_path / "out")
    assert {name: (value.dtype, value.tobytes()) for name, value in after.items()} == {
        name: (value.dtype, value.tobytes()) for name, value in stored.items()
    }
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert {key: written[key] for key in whole if key != "text_config"} == {
        key: whole[key] for key in whole if key != "text_config"
    }
    assert families.read_config(written) == files.config
    assert (tmp_path / "out/preprocessor_config.json").read_text() == '{"size": 28}'
    convert.convert(str(tmp_path / "in"), str(tmp_path / "text"), text_only=True)
    assert set(read_all(tmp_path / "text")) == set(tensors)
    alone = json.loads((tmp_path / "text/config.json").read_text())
    assert alone["model_type"] == tiny.config_dict(family)["model_type"] and "vision_config" not in alone
    assert families.read_config(alone) == files.config


def test_a_head_that_is_in_the_file_is_not_tied_where_nothing_says_so(tmp_path):
    whole, *_ = wrapped(tmp_path, "mistral3", "mistral", PLACES["as in memory"])
    del whole["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert not hf.open_model(tmp_path).config.tie_word_embeddings


def test_fields_at_the_top_are_those_of_the_first_qwen_vl():
    raw = tiny.config_dict("qwen2") | {
        "model_type": "qwen2_5_vl",
        "vision_config": {"depth": 2},
        "rope_parameters": None,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    config = families.read_config(raw)
    assert config.layers[0].rope.theta == 1e6 and config.layers[0].rope.scaling is None and config.qkv_bias
    written = families.write_config(config, dtype="bfloat16", like=raw)
    assert families.read_config(written) == config and written["rope_scaling"] == raw["rope_scaling"]
    assert families.write_config(config, dtype="bfloat16", like=raw, text_only=True)["model_type"] == "qwen2"


def test_a_wrapper_around_something_else_is_refused_by_name():
    raw = {"model_type": "mistral3", "text_config": {"model_type": "ministral3"}, "vision_config": {}}
    with pytest.raises(ConfigError, match=r"'mistral3' around 'ministral3'.* isn't supported.*new_family"):
        families.read_config(raw)
