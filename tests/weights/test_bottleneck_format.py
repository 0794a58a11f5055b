"""Folders of the `adapters` library. Its own reading of ours (1.3 on transformers 4.57) was compared by hand: 3e-6."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sftjax import tree
from sftjax.errors import ConfigError
from sftjax.models import decoder
from sftjax.peft import lora
from sftjax.peft.spec import AdapterSpec
from sftjax.weights import bottleneck_format, families
from tests.weights import tiny


@pytest.fixture
def made():
    config = families.read_config(tiny.config_dict("gemma3"))  # runs of layers, one of them with six positions
    spec = AdapterSpec(method="houlsby", bottleneck_size=5, bottleneck_activation="gelu")
    adapter = lora.init(jax.random.key(0), decoder.init_params(jax.random.key(0), config), spec)
    rng = np.random.default_rng(0)
    return config, spec, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), adapter)


def save(folder, made, **changes):
    config, spec, adapter = made
    bottleneck_format.save_adapter(folder, adapter, spec, config, model_type="llama", model_class="LlamaForCausalLM")
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["config"] |= changes
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def test_names_and_shapes_are_the_librarys_and_it_is_read_back(tmp_path, made):
    config, _, adapter = made
    save(tmp_path, made)
    tensors = load_file(tmp_path / "adapter.safetensors")
    name = "model.layers.6.{}_adapters.adapters.sftjax.{}"
    assert tensors[name.format("attention", "adapter_down.0.weight")].shape == (5, config.hidden_size)
    assert tensors[name.format("output", "adapter_up.bias")].shape == (config.hidden_size,)
    assert len(tensors) == config.num_layers * 8
    settings = json.loads((tmp_path / "adapter_config.json").read_text())["config"]
    assert int(config.hidden_size // settings["reduction_factor"]) == 5  # as the library rounds it
    assert bottleneck_format.is_bottleneck(tmp_path)
    again, read = bottleneck_format.load_adapter(tmp_path, config)
    assert (read.method, read.bottleneck_size, read.bottleneck_activation) == ("houlsby", 5, "gelu")
    assert tree.flatten(again).keys() == tree.flatten(adapter).keys()
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scaling=2.0), "scaling=2.0"),
        (dict(original_ln_before=True), "original_ln_before"),
        (dict(non_linearity="swish_of_tomorrow"), "non_linearity"),
        (dict(leave_out=[1]), "leave_out"),
        (dict(a_field_of_tomorrow=1), "a_field_of_tomorrow"),
        (dict(mh_adapter=False), "adapter_attn"),
    ],
)
def test_another_adapter_is_refused(tmp_path, made, changes, message):
    save(tmp_path, made, **changes)
    with pytest.raises(ConfigError, match=message):
        bottleneck_format.load_adapter(tmp_path, made[0])


def test_an_adapter_of_another_model_is_refused(tmp_path, made):
    save(tmp_path, made)
    tensors = load_file(tmp_path / "adapter.safetensors")
    save_file(
        {name.replace("layers.6", "layers.9"): value for name, value in tensors.items()},
        tmp_path / "adapter.safetensors",
    )
    with pytest.raises(ConfigError, match=r"layers\.9.*fits nothing"):
        bottleneck_format.load_adapter(tmp_path, made[0])
