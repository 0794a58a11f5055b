import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from sftjax import tree
from sftjax.errors import ConfigError, StorageError
from sftjax.parallel import mesh as meshes
from sftjax.parallel import partition
from sftjax.weights import export, hf, safetensors, vocab
from sftjax.weights.files import Folder


def stored_bytes(folder):
    """{name: (dtype, shape, bytes)} of a checkpoint."""
    found = {}
    for name, stored in safetensors.open_folder(Folder(folder)).items():
        count = int(np.prod(stored.shape)) * stored.dtype.itemsize
        found[name] = (stored.dtype.name, stored.shape, stored.file.read(stored.start, count))
    return found


def make(tmp_path, name="llama", **options):
    raw = tiny.config_dict(name, **options)
    return hf.open_model(tiny.write_model(tmp_path / "in", raw, tiny.random_tensors(raw)))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_an_untouched_model_leaves_as_it_came(tmp_path, name):
    model = make(tmp_path, name)
    params = hf.load_params(model, model.config, "bfloat16")
    export.export_model(tmp_path / "out", model.config, params, dtype="bfloat16", source=model)
    assert stored_bytes(tmp_path / "out") == stored_bytes(tmp_path / "in")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    came = {key: value for key, value in model.raw_config.items() if key != "transformers_version"}
    assert {key: value for key, value in written.items() if key in came} == came
    for_transformers_4 = {"torch_dtype", "rope_theta", "rope_scaling"}
    assert for_transformers_4 <= set(written)
    assert set(written) - set(came) - for_transformers_4 <= {
        "transformers_version", "rope_local_base_freq", "partial_rotary_factor", "original_max_position_embeddings"
    }  # fmt: skip


def test_sharded_arrays_and_sharded_files(tmp_path):
    model = make(tmp_path, "qwen3_moe")
    mesh = meshes.make({"data": 1, "fsdp": 2, "tensor": 2, "context": 1, "expert": 2})
    plain = hf.load_params(model, model.config, "bfloat16")
    shardings = partition.shardings({"params": plain}, mesh)["params"]
    params = hf.load_params(model, model.config, "bfloat16", shardings)
    names = export.export_model(
        tmp_path / "out", model.config, params, dtype="bfloat16", source=model, shard_bytes=20_000
    )
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((tmp_path / "out" / name).stat().st_size < 30_000 for name in shards)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(entry[2]) for entry in stored_bytes(tmp_path / "in").values())
    assert stored_bytes(tmp_path / "out") == stored_bytes(tmp_path / "in")


def test_mixed_dtypes_are_kept(tmp_path):
    raw = tiny.config_dict("llama")
    tensors = tiny.random_tensors(raw)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    model = hf.open_model(tiny.write_model(tmp_path / "in", raw, tensors))
    params = hf.load_params(model, model.config, "float32")
    export.export_model(tmp_path / "out", model.config, params, dtype=hf.stored_dtypes(model), source=model)
    assert stored_bytes(tmp_path / "out") == stored_bytes(tmp_path / "in")


def test_stop_tokens_and_settings(tmp_path):
    model = make(tmp_path)
    Path(model.path, "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [2, 5], "_x": 1}')
    model = hf.open_model(model.path)
    params = hf.load_params(model, model.config, "float32")
    beside = {"tokenizer.json": b"{}", "additional_chat_templates/rag.jinja": b"{{ documents }}"}
    export.export_model(
        tmp_path / "out", model.config, params, dtype="float16", source=model, tokenizer=beside, stop_ids=[7]
    )
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [7, 2, 5] and generation["temperature"] == 0.6 and "_x" not in generation
    assert all((tmp_path / "out" / name).read_bytes() == text for name, text in beside.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_all_or_nothing(tmp_path, monkeypatch):
    """A failure in the middle leaves what was there before."""
    model = make(tmp_path)
    params = hf.load_params(model, model.config, "float32")
    out = tmp_path / "out"
    export.export_model(out, model.config, params, dtype="float32", source=model)
    before = stored_bytes(out)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "assemble", fail)
        with pytest.raises(StorageError, match="No space left"):
            export.export_model(out, model.config, params, dtype="bfloat16", source=model)
        with pytest.raises(StorageError):
            export.export_model(tmp_path / "new", model.config, params, dtype="bfloat16", source=model)
    assert stored_bytes(out) == before and not (tmp_path / "new").exists()
    export.export_model(out, model.config, params, dtype="bfloat16", source=model)
    assert {entry[0] for entry in stored_bytes(out).values()} == {"bfloat16"}
    assert sorted(path.name for path in tmp_path.iterdir() if "new" not in path.name) == ["in", "out"]


def test_what_isn_t_ours_is_not_replaced(tmp_path):
    model = make(tmp_path)
    params = hf.load_params(model, model.config, "float32")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    (tmp_path / "file").write_text("x")
    for name in ("in", "link", "file"):
        with pytest.raises(ConfigError, match=name):
            export.export_model(tmp_path / name, model.config, params, dtype="float32", source=model)
    (tmp_path / "empty").mkdir()
    export.export_model(tmp_path / "empty", model.config, params, dtype="float32", source=model)


def test_parameters_that_don_t_fit(tmp_path):
    model = make(tmp_path)
    params = hf.load_params(model, model.config, "float32")
    flat = tree.flatten(params)
    flat["norm/weight"] = flat["norm/weight"][:3]
    flat["extra"] = flat.pop("lm_head/weight")
    with pytest.raises(ConfigError, match=r"lm_head/weight is missing; extra is unexpected; norm/weight is \[3\]"):
        export.export_model(tmp_path / "out", model.config, tree.unflatten(flat), dtype="float32", source=model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_grown_vocabulary(tmp_path, tied):
    """[96, D] -> 98 tokens, 128 rows in memory: mean rows, then zeros that are never exported."""
    model = make(tmp_path, tie_word_embeddings=tied)
    params = hf.load_params(model, model.config, "float32")
    grown, config = vocab.resize_vocab(params, model.config, 98, pad_multiple=64)
    assert (config.vocab_size, config.valid_vocab) == (128, 98)
    for path in ("embed_tokens", *([] if tied else ["lm_head"])):
        weight, was = np.asarray(grown[path]["weight"]), np.asarray(params[path]["weight"])
        np.testing.assert_array_equal(weight[:96], was)
        np.testing.assert_allclose(weight[96:98], np.stack([was.mean(0)] * 2), rtol=1e-5, atol=1e-6)
        assert not weight[98:].any()
    assert ("lm_head" in grown) is not tied
    export.export_model(tmp_path / "out", config, grown, dtype="float32", source=model)
    again = hf.open_model(tmp_path / "out")
    assert again.config.vocab_size == 98 and again.config.tie_word_embeddings is tied
    loaded = hf.load_params(again, again.config, "float32")
    np.testing.assert_array_equal(loaded["embed_tokens"]["weight"], grown["embed_tokens"]["weight"][:98])
    with pytest.raises(ConfigError, match="shrink"):
        vocab.resize_vocab(params, model.config, 10)
    more, config = vocab.resize_vocab(grown, config, 100)
    assert more["embed_tokens"]["weight"].shape == (100, 32) and config.valid_vocab is None


def test_without_a_source(tmp_path):
    model = make(tmp_path, "gemma3")
    params = jax.tree.map(np.asarray, hf.load_params(model, model.config, "float32"))
    export.export_model(tmp_path / "out", model.config, params, dtype="float32")
    assert hf.load_config(tmp_path / "out") == model.config


def test_to_a_remote_folder(tmp_path):
    model = make(tmp_path)
    params = hf.load_params(model, model.config, "float32")
    export.export_model("memory://bucket/out", model.config, params, dtype="float32", source=model)
    again = hf.open_model("memory://bucket/out")
    loaded = hf.load_params(again, again.config, "float32")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
