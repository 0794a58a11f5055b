"""PEFT folders, against arrays that peft and transformers made (tests/golden/make_peft.py)."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sftjax import tree
from sftjax.errors import ConfigError, StorageError
from sftjax.models import decoder
from sftjax.peft import merge
from sftjax.weights import hf, peft_format

GOLDEN = Path(__file__).parent.parent / "golden"
VARIANTS = ("lora", "rslora", "dora")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(ModelFiles, params) of the golden base model."""
    folder = tmp_path_factory.mktemp("base")
    arrays = np.load(GOLDEN / "peft_lora.npz")
    tensors = {name.removeprefix("base/"): arrays[name] for name in arrays.files if name.startswith("base/")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(str(arrays["config"]))
    files = hf.open_model(folder)
    return files, hf.load_params(files, files.config, jnp.float32)


def write_golden(folder: Path, variant: str) -> dict[str, np.ndarray]:
    """The adapter as peft wrote it; returns all arrays of the golden set."""
    arrays = np.load(GOLDEN / f"peft_{variant}.npz")
    tensors = {name.removeprefix("adapter/"): arrays[name] for name in arrays.files if name.startswith("adapter/")}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(str(arrays["settings"]))
    return arrays


def logits(config, variables, tokens):
    runtime = decoder.Runtime(compute_dtype="float32", remat="none")
    tokens = jnp.asarray(tokens, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = decoder.hidden_states(config, runtime, variables, tokens, positions, jnp.ones_like(tokens))
    return decoder.logits(config, runtime, variables, hidden)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_pefts_beside_the_base_and_merged(base, tmp_path, variant):
    files, params = base
    arrays = write_golden(tmp_path, variant)
    adapter, _ = peft_format.load_adapter(tmp_path, files.config)
    beside = logits(files.config, {"params": params, "adapter": adapter}, arrays["tokens"])
    np.testing.assert_allclose(beside, arrays["logits"], rtol=2e-5, atol=2e-5)
    merged = merge.merge(params, jax.tree.map(jnp.asarray, adapter))
    assert tree.flatten(merged).keys() == tree.flatten(params).keys()
    np.testing.assert_allclose(
        logits(files.config, {"params": merged}, arrays["tokens"]), arrays["logits"], rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_keeps_every_byte_and_every_setting(base, tmp_path, variant):
    files, _ = base
    arrays = write_golden(tmp_path / "peft", variant)
    adapter, spec = peft_format.load_adapter(tmp_path / "peft", files.config)
    peft_format.save_adapter(tmp_path / "ours", adapter, spec, files.config, layout="plain")
    names = ("adapter_model.safetensors", "adapter_config.json")
    peft_bytes, our_bytes = ((tmp_path / folder / names[0]).read_bytes() for folder in ("peft", "ours"))
    assert peft_bytes == our_bytes
    settings = json.loads((tmp_path / "ours" / names[1]).read_text())
    expected = json.loads(str(arrays["settings"]))
    if variant == "lora":  # peft lists all modules one by one where "all-linear" was asked for
        assert settings["target_modules"] == sorted({name.rpartition(".")[2] for name in expected["target_modules"]})
        expected["target_modules"] = settings["target_modules"]
    assert settings == expected


def test_ranks_are_those_of_the_patterns(base, tmp_path):
    files, _ = base
    write_golden(tmp_path, "rslora")
    adapter, spec = peft_format.load_adapter(tmp_path, files.config)
    q_proj = adapter["layers_0"]["0"]["self_attn"]["q_proj"]
    assert q_proj["lora_A"].shape == (2, 4, 32)
    assert np.all(q_proj["lora_A"][1, 3] == 0) and np.all(q_proj["lora_B"][1, :, 3] == 0)
    np.testing.assert_allclose(q_proj["scale"], [5 / 2, 12 / 3**0.5], rtol=1e-6)
    assert spec.rank_of("model.layers.0.self_attn.v_proj") == 6


def change(folder: Path, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(peft_type="IA3"), "only LORA"),
        (dict(init_lora_weights="pissa"), "changes the base"),
        (dict(lora_bias=True), r"no tensor.*lora_B\.bias"),
        (dict(trainable_token_indices=[3]), "trainable_tokens_delta"),
        (dict(alora_invocation_tokens=[3]), "alora_invocation_tokens"),
        (dict(a_field_of_tomorrow=1), "a_field_of_tomorrow"),
        (dict(target_modules=["q_proj"]), "doesn't target"),
        (dict(exclude_modules=["q_proj"]), "doesn't target"),
        (dict(init_lora_weights="fourier"), "isn't known"),
        (dict(r=5), "rank 4, its configuration says 5"),
        (dict(target_modules=None), "target_modules is missing"),
    ],
)
def test_settings_that_would_change_the_maths_are_refused(base, tmp_path, settings, message):
    files, _ = base
    write_golden(tmp_path, "lora")
    change(tmp_path, **settings)
    with pytest.raises(ConfigError, match=message):
        peft_format.load_adapter(tmp_path, files.config)


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    files, _ = base
    write_golden(tmp_path, "lora")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {name: tensors[name][:, :16].copy()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"q_proj is \[32, 32\]"):
        peft_format.load_adapter(tmp_path, files.config)
    save_file(tensors | {name.replace("layers.0", "layers.7"): tensors[name]}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"fit nothing.*layers\.7"):
        peft_format.load_adapter(tmp_path, files.config)


def test_missing_and_damaged_files(base, tmp_path):
    files, _ = base
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        peft_format.load_adapter(tmp_path, files.config)
    write_golden(tmp_path, "lora")
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(StorageError, match="adapter_model"):
        peft_format.load_adapter(tmp_path, files.config)
    path.unlink()
    with pytest.raises(ConfigError, match=r"no adapter_model\.safetensors"):
        peft_format.load_adapter(tmp_path, files.config)
