import dataclasses
import json
import sys
from pathlib import Path

import gguf as reference
import numpy as np
import pytest
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from sftjax import tree
from sftjax.errors import ConfigError, StorageError
from sftjax.weights import families, gguf, gguf_config, gguf_file, gguf_tokenizer, gguf_write, hf, rules

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def permuted(weight, heads):
    """As llama.cpp's converter does it."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write(path, architecture, raw, tensors, *, kinds=("F32",), extra=()):
    """A file as llama.cpp's converter writes it; returns the tensors as they come back."""
    writer = reference.GGUFWriter(path, architecture)
    heads, kv = raw["num_attention_heads"], raw["num_key_value_heads"]
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_key_length(raw.get("head_dim") or raw["hidden_size"] // heads)
    if raw.get("sliding_window"):
        writer.add_sliding_window(raw["sliding_window"])
    for name, value in extra:
        writer.add_array(name, value) if isinstance(value, list) else writer.add_key_value(
            name, value, reference.GGUFValueType.get_type(value)
        )
    config = families.read_config(raw)
    names = {ours: theirs for theirs, ours in gguf_config.hf_names(config, architecture).items()}
    back = {}
    for number, (name, array) in enumerate(tensors.items()):
        array = array.astype(np.float32)
        kind = reference.GGMLQuantizationType[kinds[number % len(kinds)] if array.ndim > 1 else "F32"]
        stored = array + 1 if config.norm_plus_one and name.endswith("norm.weight") else array
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            stored = permuted(stored, heads if ".q_proj." in name else kv)
        data, stored = encode(stored, kind)
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            count = heads if ".q_proj." in name else kv
            order = permuted(np.arange(len(stored)), count)
            stored = stored[np.argsort(order)]
        back[name] = stored - 1 if config.norm_plus_one and name.endswith("norm.weight") else stored
        writer.add_tensor(names[name], data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return back


def encode(array, kind):
    """(bytes, what they decode to); K-quants have no encoder in Python, so their blocks are random."""
    try:
        data = reference.quants.quantize(array, kind)
    except NotImplementedError:
        block, size = reference.GGML_QUANT_SIZES[kind]
        rows = np.random.default_rng(0).integers(0, 60, (array.shape[0], array.shape[1] // block, size), np.uint8)
        data = rows.reshape(array.shape[0], -1)
    return data, reference.quants.dequantize(data, kind) if kind.name != "F32" else array


ARCHITECTURES = {
    "llama": ("llama", dict(attention_bias=True)), "qwen2": ("qwen2", dict(use_sliding_window=False)),
    "qwen3": ("qwen3", {}), "gemma": ("gemma", {}), "gemma2": ("gemma2", dict(query_pre_attn_scalar=16)),
    "gemma3": ("gemma3", dict(query_pre_attn_scalar=16)), "phi3": ("phi3", {}),
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(tmp_path, architecture):
    name, options = ARCHITECTURES[architecture]
    raw = tiny.config_dict(name, **options)
    tensors = tiny.random_tensors(raw, dtype="float32")
    back = write(tmp_path / "m.gguf", architecture, raw, tensors, extra=[(f"{architecture}.rope.freq_base", 1e4)])
    model = hf.open_model(tmp_path / "m.gguf")
    expected = families.read_config(raw)
    if architecture == "gemma3":  # its local theta isn't in the file
        assert [layer.window for layer in model.config.layers] == [layer.window for layer in expected.layers]
    else:
        assert model.config == expected
    assert hf.fingerprint(model)
    flat = tree.flatten(hf.load_params(model, model.config, "float32"))
    for tensor in rules.tensors(model.config, model.family.layout):
        for part in tensor.parts:
            np.testing.assert_allclose(
                np.asarray(flat[part.path])[part.index], back[tensor.name][part.select], atol=3e-7
            )


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantisation(tmp_path, kind):
    raw = tiny.config_dict("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1, attention_bias=False,
                           mlp_bias=False)  # fmt: skip
    tensors = tiny.random_tensors(raw, dtype="float32")
    back = write(tmp_path / "m.gguf", "llama", raw, tensors, kinds=[kind])
    model = hf.open_model(tmp_path / "m.gguf")
    source, table = hf.open_source(model)
    for tensor in table:
        whole = np.empty(tensor.shape, np.float32)
        source.read(tensor.name, (), whole)
        np.testing.assert_array_equal(whole, back[tensor.name])
        if len(tensor.shape) == 2:  # rows and columns of it, as a shard asks for them
            part = np.empty((20, 7), np.float32)
            source.read(tensor.name, (slice(10, 30), slice(5, 12)), part)
            np.testing.assert_array_equal(part, whole[10:30, 5:12])
            row, column = np.empty(whole.shape[1], np.float32), np.empty(20, np.float32)
            source.read(tensor.name, (3,), row)
            source.read(tensor.name, (slice(10, 30), 5), column)
            np.testing.assert_array_equal(row, whole[3])
            np.testing.assert_array_equal(column, whole[10:30, 5])


def test_unpermuted_rows_drawn():
    assert gguf_config.unpermuted_rows(2, 8).tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]


@pytest.mark.parametrize(
    ("dim", "settings"),
    [
        (64, (32.0, 1.0, 4.0, 8192)),
        (128, (8.0, 1.0, 4.0, 8192)),
        (128, (4.0, 1.0, 8.0, 3000)),  # a length that is no power of two, found from the slope of the band
    ],
)
def test_llama_3_scaling_is_found_back(dim, settings):
    """In a file of another program, which holds the divisors alone."""
    divisors = gguf_config.llama3_divisors(5e5, dim, *settings)
    found = gguf_config.llama3_of(divisors, 5e5, dim)
    assert (found["factor"], found["low_freq_factor"], found["high_freq_factor"]) == settings[:3]
    assert abs(found["original_max_position_embeddings"] - settings[3]) <= 1
    with pytest.raises(ConfigError, match="rope_freqs"):
        gguf_config.llama3_of(divisors * np.linspace(1, 2, dim // 2).astype(np.float32), 5e5, dim)


def test_damaged_files(tmp_path):
    raw = tiny.config_dict("llama")
    path = tmp_path / "m.gguf"
    write(path, "llama", raw, tiny.random_tensors(raw, dtype="float32"))
    sound = path.read_bytes()
    for broken in (sound[:-100], sound[:200], b"GGUX" + sound[4:], b"GGUF", b"", sound[:8] + b"\xff" * 16 + sound[24:]):
        path.write_bytes(broken)
        gguf_file._read.cache_clear()
        with pytest.raises((StorageError, ConfigError), match=r"m\.gguf"):
            hf.open_model(path)


def test_refuses_what_it_can_t_read(tmp_path):
    raw = tiny.config_dict("llama")
    tensors = tiny.random_tensors(raw, dtype="float32")
    write(tmp_path / "m.gguf", "mamba", raw, tensors)
    with pytest.raises(ConfigError, match="mamba"):
        hf.open_model(tmp_path / "m.gguf")
    del tensors["model.norm.weight"]
    write(tmp_path / "o.gguf", "llama", raw, tensors)
    model = hf.open_model(tmp_path / "o.gguf")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight"):
        hf.load_params(model, model.config, "float32")


# ------------------------------------------------------------------------------------------------------ tokenizers


def byte_level_data(**changes):
    tokens = ["<|end|>", *sorted(set(_bytes()))]
    merges = [("a", "b"), ("1", "2"), ("Ġ", "a")]
    tokens += ["".join(pair) for pair in merges]
    types = [3] + [1] * (len(tokens) - 1)
    return dict(
        architecture="llama", model="gpt2", pre="smollm", tokens=tokens, types=types, merges=merges, scores=[], bos=0,
        eos=0, unk=None, pad=0, eot=None, add_bos=False, add_eos=False, add_space_prefix=False, chat_template=None,
    ) | changes  # fmt: skip


def _bytes():
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


RULES = ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "gpt-4o", "tekken", "seed-coder", "default"]


@pytest.mark.parametrize("pre", RULES)
def test_the_name_of_a_rule_is_found_by_what_it_does(pre):
    """Written otherwise than ours, it is the same rule; and plain GPT-2 isn't what llama.cpp calls "default"."""
    spec = json.loads(gguf.build_tokenizer(byte_level_data(pre=pre), "x").to_str())
    assert gguf_tokenizer._name_of_rule(spec) == pre
    splitter = spec["pre_tokenizer"]
    if splitter["type"] == "Sequence" and splitter["pretokenizers"][0]["type"] == "Split":
        first = splitter["pretokenizers"][0]
        first["pattern"] = {"Regex": f"(?:{first['pattern']['Regex']})"}
        assert gguf_tokenizer._name_of_rule(spec) == pre
    with pytest.raises(ConfigError, match="no name"):
        gguf_tokenizer._name_of_rule(spec | {"pre_tokenizer": {"type": "Whitespace"}})


def spell(tokenizer, text):
    return tokenizer.encode(text).tokens


def test_byte_level_rules_by_name():
    smollm = gguf.build_tokenizer(byte_level_data(), "x")
    assert spell(smollm, "ab 12<|end|> a") == ["ab", "Ġ", "1", "2", "<|end|>", "Ġa"]
    plain = gguf.build_tokenizer(byte_level_data(pre="gpt-2"), "x")
    assert spell(plain, "12") == ["12"]
    llama = gguf.build_tokenizer(byte_level_data(pre="llama-bpe", add_bos=True), "x")
    assert spell(llama, "12") == ["<|end|>", "12"]
    assert smollm.decode(smollm.encode("héllo 日本").ids) == "héllo 日本"
    with pytest.raises(ConfigError, match="strange"):
        gguf.build_tokenizer(byte_level_data(pre="strange"), "x")


def test_sentencepiece_rules():
    letters = ["▁", "a", "b", "ab", "▁a", "▁ab"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters]
    scores = [0.0] * 259 + [-10.0, -11.0, -12.0, -1.0, -2.0, -3.0]
    data = byte_level_data(
        model="llama", pre="default", tokens=tokens, types=[2, 3, 3] + [6] * 256 + [1] * 6, merges=[], scores=scores,
        unk=0, bos=1, eos=2, add_bos=True, add_space_prefix=True,
    )  # fmt: skip
    tokenizer = gguf.build_tokenizer(data, "x")
    assert spell(tokenizer, "ab é</s>") == ["<s>", "▁ab", "▁", "<0xC3>", "<0xA9>", "</s>"]
    assert tokenizer.decode(tokenizer.encode("ab é").ids) == "ab é"


def test_writes_the_files(tmp_path):
    raw = tiny.config_dict("llama")
    data = byte_level_data()
    extra = [
        ("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "smollm"), ("tokenizer.ggml.tokens", data["tokens"]),
        ("tokenizer.ggml.token_type", data["types"]),
        ("tokenizer.ggml.merges", [" ".join(pair) for pair in data["merges"]]),
        ("tokenizer.ggml.eos_token_id", 0), ("tokenizer.chat_template", "{{ messages }}"),
    ]  # fmt: skip
    write(tmp_path / "m.gguf", "llama", raw, tiny.random_tensors(raw, dtype="float32"), extra=extra)
    files = gguf.tokenizer_files(tmp_path / "m.gguf")
    assert sorted(files) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    loaded = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert spell(loaded, "ab 12<|end|>") == ["ab", "Ġ", "1", "2", "<|end|>"]
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "<|end|>"
    assert gguf.tokenizer_data(tmp_path / "m.gguf")["chat_template"] == "{{ messages }}"


def out_and_back(folder, raw, kind="F16"):
    """(the model, its parameters, the notes, the model read back, its parameters)."""
    raw = raw | dict(bos_token_id=0, eos_token_id=0)
    model = hf.open_model(tiny.write_model(folder / "in", raw, tiny.random_tensors(raw)))
    params = hf.load_params(model, model.config, "float32")
    files = tokenizer_files(byte_level_data(), raw["vocab_size"])
    options = dict(kind=kind, model_type=families.family_of(raw), tokenizer=files)
    notes = gguf_write.write_gguf(folder / "m.gguf", model.config, params, **options)
    again = hf.open_model(folder / "m.gguf")
    return model, params, notes, again, hf.load_params(again, again.config, "float32")


# every family of ours that llama.cpp has, as it has it
WRITABLE = ARCHITECTURES | {
    "mistral": ("mistral", dict(sliding_window=512)), "mixtral": ("mixtral", {}),
    "qwen2moe": ("qwen2_moe", dict(mlp_only_layers=[])),
    "qwen3moe": ("qwen3_moe", dict(decoder_sparse_step=1)), "olmo2": ("olmo2", {}), "granite": ("granite", {}),
    "smollm3": ("smollm3", {}), "seed_oss": ("seed_oss", {}), "gpt-oss": ("gpt_oss", {}), "command-r": ("cohere", {}),
    "cohere2": ("cohere2", {}), "phi3 long": ("phi3_long", {}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [(name, "F16") for name in WRITABLE]
    + [(name, kind) for name in ("llama", "gemma3", "qwen3moe") for kind in ("BF16", "Q8_0")],
)
def test_what_goes_out_comes_back(tmp_path, architecture, kind):
    name, options = WRITABLE[architecture]
    sizes = dict(intermediate_size=64) | (dict(moe_intermediate_size=32) if "moe" in name else {})
    raw = tiny.config_dict(name, **options, **sizes)
    if name == "qwen3":
        raw["head_dim"] = 8
    model, params, notes, again, back = out_and_back(tmp_path, raw, kind)
    reference.GGUFReader(tmp_path / "m.gguf")  # the reference parser agrees that it is one
    if name == "phi3":  # llama.cpp has no window for it: the context ends there
        assert "64 tokens instead of 512" in notes[0]
        assert again.config == model.config.replace(max_position=64)
    else:
        assert (again.config, notes) == (model.config, [])
    tolerance = {"BF16": 0.0, "F16": 1e-3, "Q8_0": 1e-2}[kind] + (2e-7 if model.config.norm_plus_one else 0)
    for name, leaf in tree.flatten(back).items():
        scale = np.abs(tree.flatten(params)[name]).max()
        np.testing.assert_allclose(leaf, tree.flatten(params)[name], rtol=0, atol=tolerance * scale, err_msg=name)
    data = gguf.tokenizer_data(tmp_path / "m.gguf")
    assert (data["model"], data["pre"], data["eos"]) == ("gpt2", "smollm", 0)
    assert spell(gguf.build_tokenizer(data, "x"), "ab 12<|end|> a") == ["ab", "Ġ", "1", "2", "<|end|>", "Ġa"]


_PAIRS = [1.0, 1.1, 1.2, 1.3]
ROPES = {
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128),
    "llama3, other bands": dict(
        rope_type="llama3", factor=6.0, low_freq_factor=2.0, high_freq_factor=5.0, original_max_position_embeddings=200
    ),
    "linear": dict(factor=3.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=128),
    "yarn without a length": dict(rope_type="yarn", factor=4.0),
    "yarn, all fields": dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=128, beta_fast=20.0, beta_slow=2.0,
        attention_factor=1.25,
    ),
    "longrope": dict(
        original_max_position_embeddings=128, short_factor=_PAIRS, long_factor=[2 * x for x in _PAIRS], factor=4.0
    ),
    "longrope, own attention": dict(
        rope_type="longrope", original_max_position_embeddings=128, short_factor=_PAIRS, long_factor=_PAIRS,
        attention_factor=1.5, factor=4.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_every_kind_of_rope_comes_back(tmp_path, kind):
    raw = tiny.config_dict("llama", rope_parameters=dict(rope_type=kind, rope_theta=1e4) | ROPES[kind])
    model, _, _, again, _ = out_and_back(tmp_path, raw)
    ours, theirs = model.config.ropes[0], again.config.ropes[0]
    if kind == "yarn without a length":
        ours = dataclasses.replace(ours, scaling=dataclasses.replace(ours.scaling, original_max_position=512))
    assert theirs == ours


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama_dynamic", {}, "no RoPE scaling of the kind 'dynamic'"),
        ("qwen2", dict(rope_parameters=ROPES["llama3"] | dict(rope_type="llama3", rope_theta=1e4)), "kind 'llama3'"),
        ("qwen3_moe", dict(decoder_sparse_step=2), "experts"),
        ("qwen3_moe", dict(norm_topk_prob=False, decoder_sparse_step=1), "normalize_top_k True instead of False"),
        ("smollm3", dict(no_rope_layers=[1, 1, 0, 1]), "rope"),
        ("seed_oss", dict(attention_out_bias=True), "o_bias"),
        ("gpt_oss", dict(swiglu_limit=5.0), "swiglu_limit 7.0 instead of 5.0"),
        ("olmo2", dict(head_dim=16), "hidden size"),
        ("gemma", dict(tie_word_embeddings=False), "that of the embedding"),
        ("llama", dict(hidden_act="gelu"), "activation 'silu' instead of 'gelu'"),
    ],
)  # fmt: skip
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(tmp_path, name, changes, said):
    raw = tiny.config_dict(name) | changes
    if name == "olmo2":
        raw.pop("head_dim", None)
        raw |= dict(head_dim=16)
    with pytest.raises(ConfigError, match=said):
        out_and_back(tmp_path, raw)
    assert not [*tmp_path.glob("*.gguf*")] and not [*tmp_path.glob(".*partial")]


def test_a_scale_of_attention_without_a_field_goes_into_q(tmp_path):
    """Gemma 2's is read from the head's size; its q matrices take the difference, and q's norm where there is one."""
    for name, role in (("gemma2", "q_proj"), ("gemma3", "q_norm")):
        model, params, _, again, back = out_and_back(tmp_path / name, tiny.config_dict(name, query_pre_attn_scalar=64))
        assert (model.config.attention_scale, again.config.attention_scale) == (1 / 8, 1 / 4)
        offset = float(model.config.norm_plus_one and role == "q_norm")
        for path, leaf in tree.flatten(params).items():
            factor = 0.5 if f"/{role}/" in path else 1.0
            expected = (np.asarray(leaf) + offset) * factor - offset
            np.testing.assert_allclose(tree.flatten(back)[path], expected, atol=3e-3, err_msg=path)


def tokenizer_files(data, size):
    tokens = data["tokens"]
    keep = ["<|end|>", "Ġ", "a", "b", "1", "2", "ab", "12", "Ġa"]
    rest = [token for token in tokens if token not in keep][: size - len(keep)]
    tokens = keep[:1] + rest + keep[1:]
    tokenizer = gguf.build_tokenizer({**data, "tokens": tokens, "types": [3] + [1] * (size - 1)}, "x")
    settings = b'{"eos_token": "<|end|>", "pad_token": "<|end|>"}'
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": settings}


def test_sentencepiece_goes_out_and_comes_back(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁a", "▁ab"]
    scores = [0.0] * 259 + [-10.0, -11.0, -12.0, -1.0, -2.0, -3.0]
    data = byte_level_data(
        model="llama", pre="default", tokens=tokens, types=[2, 3, 3] + [6] * 256 + [1] * 6, merges=[], scores=scores,
        unk=0, bos=1, eos=2, add_bos=True, add_space_prefix=True,
    )  # fmt: skip
    files = {
        "tokenizer.json": gguf.build_tokenizer(data, "x").to_str().encode(),
        "tokenizer_config.json": b'{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}',
    }
    raw = tiny.config_dict("llama", vocab_size=len(tokens))
    model = hf.open_model(tiny.write_model(tmp_path / "in", raw, tiny.random_tensors(raw)))
    params = hf.load_params(model, model.config, "float32")
    path = tmp_path / "m.gguf"
    gguf_write.write_gguf(path, model.config, params, kind="F16", model_type="llama", tokenizer=files)
    found = gguf.tokenizer_data(path)
    assert found["types"] == data["types"] and found["add_bos"] and found["add_space_prefix"]
    assert spell(gguf.build_tokenizer(found, "x"), "ab é</s>") == ["<s>", "▁ab", "▁", "<0xC3>", "<0xA9>", "</s>"]
