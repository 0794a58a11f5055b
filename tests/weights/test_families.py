import dataclasses
import json
import sys
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from sftjax.errors import ConfigError
from sftjax.models.config import LayerSpec, Rope
from sftjax.weights import families


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_config_survives_the_round_trip(name):
    raw = tiny.config_dict(name)
    written = families.write_config(families.read_config(raw), dtype="bfloat16", like=raw)
    came = {key: value for key, value in raw.items() if key != "transformers_version"}
    assert {key: value for key, value in written.items() if key not in ONLY_IN_4 - set(came)} == came


ONLY_IN_4 = {
    "torch_dtype", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor",
    "original_max_position_embeddings",
}  # fmt: skip


@pytest.mark.parametrize("with_source", [True, False])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_each_form_alone_is_the_whole_model(name, with_source):
    """What transformers 5 reads, and what 4 reads, which knows no `rope_parameters` and has other defaults."""
    raw = tiny.config_dict(name)
    config = families.read_config(raw)
    written = families.write_config(config, dtype="bfloat16", like=raw if with_source else None)
    old = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    both = {"original_max_position_embeddings"} if name.startswith("phi3") else set()  # a field of the class in 5 too
    new = {key: value for key, value in written.items() if key not in ONLY_IN_4 - both}
    assert families.read_config(old) == families.read_config(new) == config
    assert old["torch_dtype"] == new["dtype"] == "bfloat16"
    # with a shift of the base frequency both say so
    layers = tuple(
        layer if layer.rope is None else dataclasses.replace(layer, rope=dataclasses.replace(layer.rope, theta=3e5))
        for layer in config.layers
    )
    written = families.write_config(config.replace(layers=layers), dtype="float32", like=raw)
    assert written["rope_theta"] == written.get("rope_local_base_freq", 3e5) == 3e5


def test_scaling_for_transformers_4_is_spelled_as_its_classes_want_it():
    """Phi-3 takes exactly three fields there, OLMo 2 two, both under "type"."""
    written = {
        name: families.write_config(families.read_config(raw), dtype="float32", like=raw)
        for name, raw in {
            "phi3_long": tiny.config_dict("phi3_long"),
            "olmo2": tiny.config_dict("olmo2", rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
            "llama3": tiny.config_dict("llama3"),
            "gemma": tiny.config_dict("gemma") | {"hidden_act": "gelu", "hidden_activation": None},
        }.items()
    }
    assert written["phi3_long"]["rope_scaling"] == {
        "type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 3.0, 4.0]
    }  # fmt: skip
    assert written["phi3_long"]["original_max_position_embeddings"] == 128
    assert written["phi3_long"]["partial_rotary_factor"] == 0.75
    assert written["olmo2"]["rope_scaling"] == {"type": "linear", "factor": 4.0}
    assert written["llama3"]["rope_scaling"] == {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }  # fmt: skip
    assert written["gemma"]["hidden_act"] == "gelu_pytorch_tanh"  # transformers 4 would take "gelu" at its word


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_transformers_reads_what_is_written_without_a_source(name):
    raw = tiny.config_dict(name)
    config = families.read_config(raw)
    written = families.write_config(config, dtype="bfloat16")
    theirs = transformers.AutoConfig.for_model(**written)
    again = families.read_config(json.loads(theirs.to_json_string()))
    assert again == config


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_absent_optional_fields_mean_what_they_mean_in_transformers(name):
    kind, _ = tiny.FAMILIES[name]
    sizes = {key: value for key, value in tiny.SIZES.items() if key != "max_position_embeddings"}
    moe = dict(moe_intermediate_size=16, num_experts_per_tok=2, shared_expert_intermediate_size=24)
    needed = sizes | ({key: moe[key] for key in moe} if name in ("qwen2_moe",) else {})
    if name == "qwen3_moe":
        needed |= dict(moe_intermediate_size=16, num_experts_per_tok=2, head_dim=8)
    theirs = getattr(transformers, kind)(**needed)
    complete = families.read_config(json.loads(theirs.to_json_string()))
    assert families.read_config(needed | {"model_type": theirs.model_type}) == complete


def old_form(raw: dict) -> dict:
    """As transformers 4 wrote it."""
    old = {key: value for key, value in raw.items() if key not in ("rope_parameters", "dtype")}
    rope = dict(raw["rope_parameters"])
    if "full_attention" in rope:
        old |= dict(rope_theta=rope["full_attention"]["rope_theta"], rope_scaling=None)
        old |= dict(rope_local_base_freq=rope["sliding_attention"]["rope_theta"])
    else:
        old["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        kind = rope.pop("rope_type")
        old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    return old | {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_transformers_4_form_reads_the_same(name):
    raw = tiny.config_dict(name)
    config = families.read_config(raw)
    assert families.read_config(old_form(raw)) == config
    written = families.write_config(config, dtype="bfloat16", like=old_form(raw))
    assert families.read_config(written) == config
    assert "rope_parameters" in written and written["rope_theta"] == old_form(raw)["rope_theta"]


def test_gemma3_layers():
    config = families.read_config(tiny.config_dict("gemma3"))
    near, far = LayerSpec(16, Rope(1e4, 16)), LayerSpec(None, Rope(1e6, 16))
    assert config.layers == (near, near, near, near, near, far, near)
    assert config.norm_plus_one and config.qk_norm == "head" and config.embedding_scale == 32**0.5


def test_llama_2_of_2023():
    raw = json.loads(
        '{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",'
        '"hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,'
        '"model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,'
        '"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false,'
        '"torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000}'
    )
    config = families.read_config(raw)
    assert config.layers == (LayerSpec(None, Rope(10_000.0, 128)),) * 32
    assert config.num_kv_heads == 32 and not config.tie_word_embeddings


def test_aliases_leave_as_llama():
    raw = tiny.config_dict("llama") | {"model_type": "Yi", "auto_map": {"AutoModel": "modeling_yi.Yi"}}
    written = families.write_config(families.read_config(raw), dtype="float32", like=raw)
    assert (written["model_type"], written["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert "auto_map" not in written


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama", {"model_type": "mamba"}, "mamba"),
        ("llama", {"vision_config": {"hidden_size": 3}}, "vision_config"),
        ("gemma3", {"model_type": "gemma4", "vision_config": {"hidden_size": 3}}, "vision_config"),
        ("llama", {"_attn_implementation_internal": "evil/kernel"}, "_attn_implementation_internal"),
        ("llama", {"model_file": "evil.py"}, "model_file"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "proportional"),
        ("llama", {"hidden_act": "relu2"}, "relu2"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"hidden_size": "big"}, "hidden_size"),
        ("llama", {"num_attention_heads": 5}, "num_attention_heads"),
        ("llama", {"layer_types": ["full_attention", "linear_attention"] * 2}, "layer_types"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha"),
        ("phi3_long", {"partial_rotary_factor": None, "rope_parameters": {
            "rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor"),
    ],
)  # fmt: skip
def test_refuses_by_name(family, change, named):
    with pytest.raises(ConfigError, match=named):
        families.read_config(tiny.config_dict(family) | change)


def test_harmless_fields_are_carried_on():
    raw = tiny.config_dict("llama") | {"initializer_range": 0.5, "unsloth_fixed": True, "my_flag": False}
    written = families.write_config(families.read_config(raw), dtype="bfloat16", like=raw)
    assert written["initializer_range"] == 0.5 and written["my_flag"] is False


def test_changed_fields_win_over_the_source():
    raw = tiny.config_dict("granite")
    config = families.read_config(raw).replace(vocab_size=100)
    written = families.write_config(config, dtype="float32", like=raw)
    assert written["vocab_size"] == 100 and written["logits_scaling"] == 7.0 and written["dtype"] == "float32"
