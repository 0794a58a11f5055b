"""What a run would export, held against what PEFT looks for: every family, without torch."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from sftjax import tree
from sftjax.errors import ConfigError
from sftjax.models import decoder
from sftjax.peft import lora
from sftjax.peft.spec import AdapterSpec
from sftjax.weights import families, peft_format, peft_units, peft_write
from tests.weights import tiny

LAYOUTS = {name: families.FAMILIES[families.family_of(tiny.config_dict(name))].layout for name in tiny.FAMILIES}


def model(name: str):
    return families.read_config(tiny.config_dict(name)), LAYOUTS[name]


abstract_params = functools.cache(decoder.abstract_params)


@functools.cache
def shapes(config, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    adapter = jax.eval_shape(lambda base: lora.init(jax.random.key(0), base, spec), abstract_params(config))
    return {path: leaf.shape for path, leaf in tree.flatten(adapter).items()}


def adapter_of(config, spec: AdapterSpec) -> dict:
    """One that isn't at its start."""
    rng = np.random.default_rng(0)
    flat = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes(config, spec).items()}
    return tree.unflatten({path: np.full_like(x, 2) if path.endswith("/scale") else x for path, x in flat.items()})


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_default_targets_of_every_family_have_a_place_in_peft(name, tmp_path):
    config, layout = model(name)
    spec = AdapterSpec(rank=4, alpha=8)
    assert peft_write.check(spec, shapes(config, spec), config, layout) in peft_units.FORMS
    adapter = adapter_of(config, spec)
    versions = peft_format.save_adapter(tmp_path, adapter, spec, config, layout=layout)
    mixed = name in ("qwen2_moe", "qwen3_moe", "gpt_oss")  # dense and routed layers in one, or experts in one
    assert versions == (["5"] if mixed else ["4", "5"])
    again, _ = peft_format.load_adapter(tmp_path, config, layout=layout)
    for path in tree.flatten(adapter):
        if path.endswith("/lora_A"):  # fused parts come back as one adapter of the sum of their ranks
            made, read = (change_of(one, path.removesuffix("/lora_A")) for one in (adapter, again))
            np.testing.assert_allclose(read, made, rtol=1e-4, atol=1e-4, err_msg=path)


def change_of(adapter: dict, module: str):
    """What it adds to the module's weight."""
    flat = tree.flatten(adapter)
    return lora.delta_weight({name: flat[f"{module}/{name}"] for name in ("lora_A", "lora_B", "scale")})


def test_a_layout_that_is_not_the_bases_is_told_module_by_module(tmp_path):
    config, layout = model("phi3")
    spec = AdapterSpec(rank=4)
    peft_format.save_adapter(tmp_path, adapter_of(config, spec), spec, config, layout="plain")  # as sftjax once did
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj: PEFT finds no place .*q_proj.* drop it"):
        peft_format.verify_folder(tmp_path, config, layout=layout)
    with pytest.raises(ConfigError, match="fit nothing in this model"):
        peft_format.load_adapter(tmp_path, config, layout=layout)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("phi3", dict(use_dora=True, target_modules=("q_proj",)), "DoRA on a part of the fused .*qkv_proj"),
        ("phi3", dict(modules_to_save=("q_proj",)), "qkv_proj.weight is one tensor .* whole"),
        ("mixtral", dict(modules_to_save=("gate_proj",)), "gate_up_proj is one tensor .* whole"),
        ("qwen3_moe", dict(use_dora=True, exclude_modules=r".*mlp\.experts\..*"), "can't adapt .*mlp.* with use_dora"),
        ("mixtral", dict(lora_bias=True, target_modules=("router",)), "can't adapt .*gate.* with lora_bias"),
    ],
)
def test_what_has_no_form_is_refused_before_it_is_trained(name, settings, message):
    config, layout = model(name)
    spec = AdapterSpec(rank=4, **settings)
    with pytest.raises(ConfigError, match=message):
        peft_write.check(spec, shapes(config, spec), config, layout)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "phi3", "gemma", "qwen2"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(use_rslora=True),
        dict(rank_pattern={"down_proj": 6}, alpha_pattern={"layers.1.*": 3}),
        dict(target_modules=("down_proj",)),
        dict(target_modules=("up_proj", "q_proj"), layers_to_transform=(1,)),
        dict(target_modules=("embed_tokens", "lm_head", "o_proj")),
        dict(modules_to_save=("norm", "embed_tokens")),
        dict(bias="all"),
        dict(trainable_token_indices=(3, 4)),
    ],
    ids=str,
)
def test_whatever_can_be_trained_keeps_the_contract(name, settings, tmp_path):
    config, layout = model(name)
    if "embed_tokens" in settings.get("target_modules", ()):
        config = config.replace(tie_word_embeddings=False)
    spec = AdapterSpec(rank=4, alpha=8, **settings)
    if name == "qwen2_moe" and settings.get("bias"):
        pytest.skip("biases of some layers only")
    peft_write.check(spec, shapes(config, spec), config, layout)
    adapter = adapter_of(config, spec)
    for module, rows in spec.trainable_token_indices:
        adapter[module]["token_indices"] = np.asarray(rows, np.int32)
    assert "5" in peft_format.save_adapter(tmp_path, adapter, spec, config, layout=layout)
    peft_format.load_adapter(tmp_path, config, layout=layout)
