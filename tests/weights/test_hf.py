import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from sftjax import bench_loading, tree
from sftjax.errors import ConfigError, StorageError
from sftjax.models.config import layer_address
from sftjax.parallel import mesh as meshes
from sftjax.parallel import partition
from sftjax.weights import hf, load, mxfp4, rules, safetensors

ROOT = str(Path(hf.__file__).parents[2])


def expected_leaves(raw, tensors, layout="plain"):
    """By the table, read plainly."""
    config = hf.families.read_config(raw)
    leaves = {path: np.zeros(shape, np.float32) for path, shape in rules.leaf_shapes(config).items()}
    for tensor in rules.tensors(config, layout):
        for part in tensor.parts:
            piece = tensors[tensor.name].astype(np.float32)[part.select]
            leaves[part.path][part.index] = piece.T if part.transpose else piece
    return leaves


def shardings_on_eight(config, **axes):
    shape = {"data": 1, "fsdp": 4, "tensor": 2, "context": 1, "expert": 1} | axes
    mesh = meshes.make(shape)
    abstract = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in rules.leaf_shapes(config).items()}
    return partition.shardings({"params": tree.unflatten(abstract)}, mesh)["params"]


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_loads_every_family_sharded_or_not(tmp_path, name, files):
    raw = tiny.config_dict(name)
    tensors = tiny.random_tensors(raw)
    model = hf.open_model(tiny.write_model(tmp_path / name, raw, tensors, files))
    expected = expected_leaves(raw, tensors, model.family.layout)
    for shardings in (None, shardings_on_eight(model.config)):
        flat = tree.flatten(hf.load_params(model, model.config, "float32", shardings))
        assert set(flat) == set(expected)
        for path, leaf in flat.items():
            np.testing.assert_array_equal(np.asarray(leaf), expected[path])
            if shardings is not None:
                assert leaf.sharding == tree.flatten(shardings)[path]


def test_layer_by_layer_gives_the_same(tmp_path, monkeypatch):
    """The route for accelerators, on the CPU."""
    raw = tiny.config_dict("qwen3_moe")
    model = hf.open_model(tiny.write_model(tmp_path, raw, tiny.random_tensors(raw)))
    for shardings in (None, shardings_on_eight(model.config, fsdp=2, expert=2)):
        plain = hf.load_params(model, model.config, "bfloat16", shardings)
        with monkeypatch.context() as patch:
            patch.setattr(load, "_fills_in_place", lambda sharding: False)
            layered = hf.load_params(model, model.config, "bfloat16", shardings)
        jax.tree.map(np.testing.assert_array_equal, layered, plain)
        jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail("sharding"), layered, plain)


def test_loaded_arrays_may_be_donated(tmp_path):
    raw = tiny.config_dict("llama")
    model = hf.open_model(tiny.write_model(tmp_path, raw, tiny.random_tensors(raw)))
    params = hf.load_params(model, model.config, "float32")
    before = jax.tree.map(lambda leaf: np.array(leaf), params)
    doubled = jax.jit(lambda p: jax.tree.map(lambda leaf: leaf * 2, p), donate_argnums=0)(params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b * 2), doubled, before)


def test_transform_takes_the_place_of_weights(tmp_path):
    raw = tiny.config_dict("llama")
    tensors = tiny.random_tensors(raw)
    model = hf.open_model(tiny.write_model(tmp_path, raw, tensors))

    def halve(path, weight):
        return {"codes": weight * 2, "mean": weight.mean()} if path.endswith("q_proj/weight") else None

    kept, made = hf.load_params(model, model.config, "float32", transform=halve)
    whole = hf.load_params(model, model.config, "float32")
    weight = whole["layers_0"]["0"]["self_attn"]["q_proj"]["weight"]
    assert "weight" not in kept["layers_0"]["0"]["self_attn"]["q_proj"]
    assert set(tree.flatten(kept)) | {"layers_0/0/self_attn/q_proj/weight"} == set(tree.flatten(whole))
    quant = made["layers_0"]["0"]["self_attn"]["q_proj"]
    np.testing.assert_array_equal(quant["codes"], weight * 2)
    np.testing.assert_allclose(quant["mean"], weight.mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_each_process_reads_its_share(tmp_path):
    """Half of the devices need at most 0.55 of the bytes."""
    raw = tiny.config_dict("llama", hidden_size=256, intermediate_size=512, vocab_size=512)
    model = hf.open_model(tiny.write_model(tmp_path, raw, tiny.random_tensors(raw)))
    shardings = tree.flatten(shardings_on_eight(model.config, fsdp=8, tensor=1))
    source, table = hf.open_source(model)
    total = sum(int(np.prod(tensor.shape)) * 2 for tensor in table)
    half = set(jax.devices()[:4])
    before = source.bytes_read
    by_path = {path: [] for path in shardings}
    for tensor in table:
        for part in tensor.parts:
            by_path[part.path].append((tensor.name, tensor.shape, part))
    with load.ThreadPoolExecutor(1) as pool:
        for path, pieces in by_path.items():
            shape = rules.leaf_shapes(model.config)[path]
            leaf = load._Leaf(source, pieces, shape, np.dtype("float32"), pool)
            indices = shardings[path].devices_indices_map(shape)
            spans = {
                tuple(s.indices(n)[:2] for s, n in zip(i, shape, strict=True)) for d, i in indices.items() if d in half
            }
            for span in spans:
                leaf.fill(tuple(slice(*s) for s in span))
    assert source.bytes_read - before <= 0.55 * total


def test_fused_experts_of_transformers_5(tmp_path):
    for name in ("mixtral", "qwen3_moe", "qwen2_moe"):
        raw = tiny.config_dict(name)
        tensors = tiny.random_tensors(raw, layout="fused_experts")
        model = hf.open_model(tiny.write_model(tmp_path / name, raw, tensors))
        flat = tree.flatten(hf.load_params(model, model.config, "float32"))
        for path, expected in expected_leaves(raw, tensors, "fused_experts").items():
            np.testing.assert_array_equal(np.asarray(flat[path]), expected)


def test_mxfp4_experts(tmp_path):
    """Values E2M1, low nibble first, one exponent for 32."""
    blocks = np.array([[[0x21] + [0xF7] * 15]], np.uint8)
    values = mxfp4.dequantise(blocks, np.array([[128]], np.uint8))
    assert values[0, :4].tolist() == [1.0, 2.0, 12.0, -12.0]  # (0.5, 1, 6, -6) x 2
    raw = tiny.config_dict("gpt_oss", hidden_size=64, intermediate_size=64)
    raw["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    tensors = tiny.random_tensors(raw, layout="mxfp4")
    rng = np.random.default_rng(0)
    stored = dict(tensors)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, rows, columns = stored.pop(name).shape
        stored[f"{name}_blocks"] = rng.integers(0, 256, (count, rows, columns // 32, 16), np.uint8)
        stored[f"{name}_scales"] = rng.integers(120, 130, (count, rows, columns // 32), np.uint8)
        pairs = zip(stored[f"{name}_blocks"], stored[f"{name}_scales"], strict=True)
        tensors[name] = np.stack([mxfp4.dequantise(*pair) for pair in pairs])
    model = hf.open_model(tiny.write_model(tmp_path, raw, stored))
    flat = tree.flatten(hf.load_params(model, model.config, "float32"))
    for path, expected in expected_leaves(raw, tensors, "mxfp4").items():
        np.testing.assert_array_equal(np.asarray(flat[path]), expected)


def test_all_differences_are_listed_at_once(tmp_path):
    raw = tiny.config_dict("llama", tie_word_embeddings=False, attention_bias=False, mlp_bias=False)
    tensors = tiny.random_tensors(raw)
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 3), np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 32), np.int32)
    tensors["model.layers.9.extra"] = np.zeros(2, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    model = hf.open_model(tiny.write_model(tmp_path, raw, tensors))
    with pytest.raises(ConfigError) as caught:
        hf.load_params(model, model.config, "float32")
    message = str(caught.value)
    for text in ("5 differences", "model.norm.weight", "lm_head.weight", "[3, 3]", "int32", "layers.9.extra"):
        assert text in message
    assert "inv_freq" not in message


def test_tied_models_may_repeat_the_embedding_but_not_another_head(tmp_path):
    raw = tiny.config_dict("qwen2", tie_word_embeddings=True)
    tensors = tiny.random_tensors(raw)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    model = hf.open_model(tiny.write_model(tmp_path / "same", raw, tensors))
    assert "lm_head" not in hf.load_params(model, model.config, "float32")
    tensors["lm_head.weight"][3, 3] += 1
    model = hf.open_model(tiny.write_model(tmp_path / "other", raw, tensors))
    with pytest.raises(ConfigError, match="tie_word_embeddings"):
        hf.load_params(model, model.config, "float32")


def test_bad_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file.txt").write_text("x")
    for path in (tmp_path / "gone", tmp_path / "file.txt", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            hf.open_model(path)
    with pytest.raises(ConfigError, match="without a network"):
        hf.open_model("someone/some-model")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        hf.open_model(tmp_path)


def test_truncated_shard(tmp_path):
    raw = tiny.config_dict("llama")
    folder = tiny.write_model(tmp_path, raw, tiny.random_tensors(raw), files=2)
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])
    model = hf.open_model(folder)
    with pytest.raises(StorageError, match=path.name):
        hf.load_params(model, model.config, "float32")


def test_fingerprint_follows_weights_and_config(tmp_path):
    raw = tiny.config_dict("llama")
    one = hf.fingerprint(tiny.write_model(tmp_path / "a", raw, tiny.random_tensors(raw)))
    assert one == hf.fingerprint(tiny.write_model(tmp_path / "b", raw, tiny.random_tensors(raw), files=2))
    assert one != hf.fingerprint(tiny.write_model(tmp_path / "c", raw, tiny.random_tensors(raw, seed=1)))


def test_layer_address_matches_names(tmp_path):
    raw = tiny.config_dict("gemma3")
    config = hf.families.read_config(raw)
    tensor = next(t for t in rules.tensors(config) if t.name == "model.layers.6.mlp.up_proj.weight")
    run, position, repeat = layer_address(config.layers, 6)
    assert tensor.parts[0].path == f"layers_{run}/{position}/mlp/up_proj/weight"
    assert tensor.parts[0].index == (repeat,)


def test_import_starts_no_torch():
    code = (
        "import sys; import sftjax.weights.hf; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(Path(hf.__file__).parents[2])}
    )


def write_large(folder, raw):
    """Two files, streamed: the same numbers in each tensor, so nothing large is ever in memory."""
    (folder / "config.json").write_text(json.dumps(raw))
    block = np.random.default_rng(0).integers(0, 2**14, 2**24, np.uint16).view(np.dtype("bfloat16"))
    table = rules.tensors(hf.families.read_config(raw))
    weight_map = {}
    for number in range(2):
        chosen, name = table[number::2], f"model-{number + 1:05d}-of-00002.safetensors"
        with open(folder / name, "wb") as out:
            entries = [(tensor.name, block.dtype, tensor.shape) for tensor in chosen]
            out.write(safetensors.header_bytes(entries, {"format": "pt"}))
            for tensor in chosen:
                count = int(np.prod(tensor.shape))
                for first in range(0, count, block.size):
                    safetensors.write_array(out, block[: min(block.size, count - first)])
        weight_map |= {tensor.name: name for tensor in chosen}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.nightly
def test_memory_and_speed_of_a_large_model(tmp_path, monkeypatch):
    """4 GB: peak resident memory beyond the arrays' own bytes is at most 1 GB; time within 1.3x of reading."""
    raw = tiny.config_dict(
        "llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=30, num_attention_heads=16,
        num_key_value_heads=8, vocab_size=32000, attention_bias=False, mlp_bias=False,
    )  # fmt: skip
    write_large(tmp_path, raw)
    monkeypatch.setenv("XLA_FLAGS", "")
    result = bench_loading.compare(model=str(tmp_path))
    print(result)
    assert result["load"]["bytes"] >= 4e9
    assert result["load"]["peak_bytes"] - result["load"]["bytes"] <= 1e9
    assert result["ratio"] <= 1.3
