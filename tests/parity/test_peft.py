"""PEFT folders in and out, against peft itself."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import tiny_models as tiny  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from sftjax import tree  # noqa: E402
from sftjax.peft import lora, merge  # noqa: E402
from sftjax.peft.spec import AdapterSpec  # noqa: E402
from sftjax.weights import hf, peft_format  # noqa: E402

VARIANTS = {
    "lora": dict(),
    "all_linear": dict(target_modules="all-linear"),
    "rslora": dict(use_rslora=True, target_modules=["q_proj", "down_proj"]),
    "dora": dict(use_dora=True, target_modules=["q_proj", "v_proj", "up_proj"]),
    "patterns": dict(
        target_modules=["q_proj", "k_proj", "o_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 3, "k_proj": 6},
        alpha_pattern={r"layers\.[02]\.self_attn\.q_proj": 5},
    ),
    "some_layers": dict(target_modules=["v_proj"], layers_to_transform=[1]),
    "regex": dict(target_modules=r".*\.(0|2)\.mlp\.(gate|up)_proj"),
    "saved": dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "bias": dict(target_modules=["q_proj", "v_proj"], bias="lora_only"),
    "bias_all": dict(target_modules=["q_proj", "v_proj"], bias="all"),
}
CASES = [("llama", name) for name in VARIANTS if not name.startswith("bias")] + [
    ("qwen2", "lora"),
    ("qwen2", "dora"),
    ("qwen2", "bias"),
    ("qwen2", "bias_all"),
    ("gemma", "all_linear"),
    ("gemma", "dora"),
]


def make_peft(model, seed: int = 1, **settings):
    """A PEFT model whose adapter is random in every part."""
    torch.manual_seed(seed)
    settings.setdefault("target_modules", ["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", lora_dropout=0.0, **settings)
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return wrapped.eval()


@pytest.fixture
def folders(tmp_path):
    """(base folder, adapter folder, peft model) for a family and a variant."""

    def make(family, **settings):
        model = tiny.make(family)
        model.save_pretrained(tmp_path / "base")
        wrapped = make_peft(model, **settings)
        wrapped.save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter", wrapped

    return make


def load_base(path):
    files = hf.open_model(path)
    return files, hf.load_params(files, files.config, jnp.float32)


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_merged_weights_equal_pefts(folders, family, variant, tmp_path):
    base, adapter_path, wrapped = folders(family, **VARIANTS[variant])
    files, params = load_base(base)
    adapter, _ = peft_format.load_adapter(adapter_path, files.config)
    merged = tree.flatten(merge.merge(params, adapter))
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    _, expected = load_base(tmp_path / "merged")
    for path, leaf in tree.flatten(expected).items():
        np.testing.assert_allclose(merged[path], leaf, rtol=2e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(("family", "variant"), [*CASES, ("phi3", "fused"), ("phi3", "all_linear")])
def test_folder_survives_a_round_trip_to_the_byte(folders, family, variant, tmp_path):
    settings = VARIANTS.get(variant, dict(target_modules=["qkv_proj", "down_proj"]))
    base, adapter_path, wrapped = folders(family, **settings)
    files, _ = load_base(base)
    adapter, spec = peft_format.load_adapter(adapter_path, files.config)
    peft_format.save_adapter(tmp_path / "again", adapter, spec, files.config, layout=files.family.layout)
    before = load_file(adapter_path / "adapter_model.safetensors")
    after = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].tobytes() == after[name].tobytes(), name
    raw = [path.joinpath("adapter_model.safetensors").read_bytes() for path in (adapter_path, tmp_path / "again")]
    assert raw[0] == raw[1]
    old, new = (json.loads((path / "adapter_config.json").read_text()) for path in (adapter_path, tmp_path / "again"))
    assert old.keys() == new.keys()
    same_logits(base, adapter_path, tmp_path / "again")


def same_logits(base, *adapters, tolerance=0.0):
    """Loads each adapter with peft and compares logits with the first one's."""
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(1, 49).reshape(2, 24)
    logits = []
    for path in adapters:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            logits.append(peft.PeftModel.from_pretrained(model, path).eval()(tokens).logits.numpy())
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize(
    "settings", [dict(init="pissa"), dict(init="pissa", use_rslora=True), dict(), dict(use_dora=True)]
)
def test_own_adapters_load_in_peft(tmp_path, family, settings):
    """An adapter made and changed here gives peft the logits of our merged weights."""
    model = tiny.make(family)
    model.save_pretrained(tmp_path / "base")
    files, params = load_base(tmp_path / "base")
    spec = AdapterSpec(rank=4, alpha=8, rank_pattern={"layers.1.mlp.down_proj": 2}, **settings)
    adapter = lora.init(jax.random.key(0), params, spec)
    rng = np.random.default_rng(0)
    change = {}
    for path, leaf in tree.flatten(adapter).items():
        if path.endswith(("lora_A", "lora_B", "magnitude")) and "initial" not in path:
            noise = 0.05 * rng.standard_normal(leaf.shape).astype(np.float32)
            if "layers_0/0/mlp/down_proj" in path and "lora" in path:  # padding stays zero
                index = (1, slice(2, None)) if path.endswith("A") else (1, slice(None), slice(2, None))
                noise[index] = 0
            leaf = leaf + noise
        change[path] = leaf
    adapter = tree.unflatten(change)
    peft_format.save_adapter(tmp_path / "adapter", adapter, spec, files.config, layout=files.family.layout)
    from sftjax.weights import export

    merged = merge.merge(params, adapter)
    export.export_model(tmp_path / "merged", files.config, merged, dtype=jnp.float32, source=files)
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(1, 49).reshape(2, 24)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(tokens).logits
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").eval()
        np.testing.assert_allclose(wrapped(tokens).logits.numpy(), expected.numpy(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_embedding_trained_in_full(folders, family):
    """Tied: peft's copy of the embedding, with weight tying ensured, serves the head too."""
    settings = dict(modules_to_save=["embed_tokens"])
    if family == "qwen2":
        settings["ensure_weight_tying"] = True
    base, adapter_path, wrapped = folders(family, **settings)
    files, params = load_base(base)
    adapter, spec = peft_format.load_adapter(adapter_path, files.config)
    again = adapter_path.with_name("again")
    peft_format.save_adapter(again, adapter, spec, files.config)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter_path, again))
    assert before.keys() == after.keys()
    same_logits(base, adapter_path, again)
