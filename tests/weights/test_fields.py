"""Every field of a config.json: read, without effect, or refused; and what was read can be written."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from sftjax.errors import ConfigError
from sftjax.weights import families, reference

# Real configurations, as published with the models (rows with source "memory" were written down without the file).
HUB = [json.loads(line) for line in Path(__file__).with_name("hub_configs.jsonl").read_text("utf-8").splitlines()]
# Of model types that are read here: what can't be, and why.
REFUSED = {
    "CohereForAI/c4ai-command-r-plus": "use_qk_norm=True isn't supported",
}


@pytest.mark.parametrize("row", HUB, ids=lambda row: row["model"])
def test_a_real_configuration_is_read_and_writable_or_refused_for_a_stated_reason(row):
    raw = row["config"]
    try:
        known = families.family_of(raw)
    except ConfigError as error:
        known = None
        assert row["model"] not in REFUSED
        assert "docs/new_family.md" in str(error) and f"{families.closest(raw)!r}" in str(error)
    if known is None or row["model"] in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED.get(row["model"], "model_type .* isn't supported")):
            families.read_config(raw)
        return
    config = families.read_config(raw)
    families.check_writable(config, raw)
    assert families.read_config(families.write_config(config, dtype="bfloat16", like=raw)) == config
    assert families.read_config(families.write_config(config, dtype="bfloat16")) == config


@pytest.mark.parametrize(
    ("family", "change", "ignored"),
    [
        ("gemma2", {"sliding_window_size": 4096}, "sliding_window_size"),
        ("llama", {"internal_version": "1"}, "internal_version"),
        ("llama", {"attention_temperature": 2.0, "my_flag": False}, "attention_temperature my_flag"),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
        ("cohere2", {"layer_switch": 4, "use_parallel_block": True, "use_embedding_sharing": True}, ""),
        ("cohere2", {"order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj"}, ""),
        ("qwen3_moe", {"shared_expert_intermediate_size": 0, "use_qk_norm": True}, ""),
        ("llama", {"is_causal": True, "per_layer_config": {}, "is_encoder_decoder": False}, ""),
        (
            "qwen2_yarn",
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "attn_factor": 0.8, "finetuned": True}},
            "rope_parameters.attn_factor rope_parameters.finetuned",
        ),
        ("qwen2", {"rope_scaling": {"type": "default", "mrope_section": [1, 2]}}, "rope_parameters.mrope_section"),
    ],
)
def test_what_transformers_never_reads_passes_and_is_named(family, change, ignored):
    raw = tiny.config_dict(family) | change
    config, found = families.read_fields(raw)
    assert " ".join(found) == ignored
    written = families.write_config(config, dtype="bfloat16", like=raw)
    assert {name: written[name] for name in change if name != "rope_scaling"} == {
        name: value for name, value in change.items() if name != "rope_scaling"
    }
    if "rope_scaling" in change:
        kept = {key: value for key, value in change["rope_scaling"].items() if f"rope_parameters.{key}" in ignored}
        assert kept.items() <= written["rope_parameters"].items()


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama", {"is_causal": False}, "is_causal=False"),
        ("llama", {"is_causal": None}, "is_causal=None"),
        ("qwen3", {"is_causal": 0}, "is_causal=0"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ("llama", {"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config"),
        ("llama", {"attention_chunk_size": 64}, "attention_chunk_size=64"),
        ("llama", {"use_cla": True}, "use_cla=True"),
        ("llama", {"use_mrope": True}, "use_mrope=True"),
        ("cohere2", {"use_parallel_block": False}, "use_parallel_block=False"),
        ("cohere2", {"use_embedding_sharing": False}, "use_embedding_sharing=False"),
        ("cohere2", {"layer_switch": 3}, "layer_switch=3"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 16}, "shared_expert_intermediate_size=16"),
        ("qwen3_moe", {"use_qk_norm": False}, "use_qk_norm=False"),
        ("gemma3", {"tie_word_embeddings": None}, "tie_word_embeddings is None"),
        ("llama", {"rms_norm_eps": False}, "rms_norm_eps is False"),
        ("llama", {"num_key_value_heads": True}, "num_key_value_heads is True"),
        ("llama", {"hidden_size": "64"}, "hidden_size"),
        ("llama", {"model_type": "Yi", "attention_temperature": False}, "attention_temperature=False.*'Yi'"),
        ("llama", {"rope_scaling": {"type": "default", "llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta=0.1"),
        ("llama", {"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
    ],
)
def test_what_would_change_the_model_is_refused_by_name(family, change, named):
    with pytest.raises(ConfigError, match=named):
        families.read_config(tiny.config_dict(family) | change)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        {"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 64, "mscale": None}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 64},
        {"rope_scaling": {"type": "default", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {"type": "dynamic", "factor": 3.0}},
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "granite", "smollm3", "cohere", "gpt_oss"])
def test_every_way_of_writing_rope_leaves_as_the_same_model(family, change):
    raw = {key: value for key, value in tiny.config_dict(family).items() if key != "rope_parameters"} | change
    config = families.read_config(raw)
    written = families.write_config(config, dtype="bfloat16", like=raw)
    assert families.read_config(written) == config
    import transformers

    theirs = [transformers.AutoConfig.for_model(**json.loads(json.dumps(each))) for each in (raw, written)]
    for each in theirs:
        each.standardize_rope_params()  # as when the frequencies are computed
    ropes = theirs[0].rope_parameters
    used = {key: value for key, value in ropes.items() if key != "type" and value is not None}
    if ropes["rope_type"] == "default":
        used.pop("factor", None)  # never read
    assert used.items() <= theirs[1].rope_parameters.items()


def test_phi3_takes_its_original_length_from_beside_the_dict():
    raw = tiny.config_dict("phi3_long")
    del raw["original_max_position_embeddings"]
    assert families.read_config(raw).layers[0].rope.scaling.original_max_position == 4096  # the class's default


def test_the_table_of_known_fields_covers_every_family():
    assert set(families.FAMILIES) <= set(reference.table()["models"])
    assert reference.known("llama")["is_causal"] is True and reference.known("Yi") is None


@pytest.mark.parity
def test_the_table_is_what_transformers_says():
    from sftjax.weights import reference_scan

    assert reference_scan.scan(reference.table()["models"]) == reference.table()


def test_the_table_is_written_where_it_is_read(tmp_path, monkeypatch):
    from sftjax.weights import reference_scan

    monkeypatch.setattr(reference, "PATH", tmp_path / "reference.json")
    reference_scan.write(["llama"])
    assert set(json.loads((tmp_path / "reference.json").read_text())["models"]) == {"llama"}
