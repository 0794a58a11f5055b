"""A checkpoint quantised tensor by tensor while it is read."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sftjax import tree
from sftjax.kernels import nf4
from sftjax.parallel import mesh as mesh_lib
from sftjax.parallel import partition
from sftjax.weights import hf

SETTINGS = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    hidden_act="silu",
    tie_word_embeddings=True,
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (96, 64), "model.norm.weight": (64,)}
    for layer in range(3):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{name}.weight": (64,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (64, 64) for name in ("q", "o")}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (32, 64) for name in ("k", "v")}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (128, 64) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (64, 128)}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("sharded", [False, True])
def test_quantised_while_loading(folder, kind, sharded):
    files = hf.open_model(folder)
    whole = tree.flatten(hf.load_params(files, files.config, jnp.float32))
    expected = {
        path.rpartition("/")[0]: nf4.quantise(leaf, kind)
        for path, leaf in whole.items()
        if path.endswith("_proj/weight")
    }
    shardings = quant_shardings = None
    if sharded:
        mesh = mesh_lib.make({"data": 1, "fsdp": 4, "tensor": 2})
        shardings = partition.shardings(tree.unflatten(whole), mesh)
        quant_shardings = partition.shardings(tree.unflatten(expected), mesh)
    transform = nf4.make_transform(kind, nf4.is_projection)
    kept, quant = hf.load_params(files, files.config, jnp.float32, shardings, transform, quant_shardings)
    assert not any(path.endswith("_proj/weight") for path in tree.flatten(kept))
    flat = tree.flatten(quant)
    for module, stored in expected.items():
        for name, leaf in stored.items():
            np.testing.assert_array_equal(flat[f"{module}/{name}"], leaf, err_msg=f"{module}/{name}")
    if sharded:
        codes = flat["layers_0/0/mlp/up_proj/codes"]
        assert codes.addressable_shards[0].data.size == codes.size // 8
