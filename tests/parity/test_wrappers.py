"""Multimodal models as transformers saves them: text goes in and out, the tower stays byte for byte."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax.numpy as jnp  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from sftjax.models import decoder  # noqa: E402
from sftjax.weights import export, hf  # noqa: E402

pytestmark = pytest.mark.parity
TEXT = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
TOWER = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
QWEN = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32)
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
KINDS = {
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=dict(TEXT, sliding_window=16, query_pre_attn_scalar=8), vision_config=TOWER, mm_tokens_per_image=4
    ),
    "mistral3": lambda: transformers.Mistral3Config(
        text_config=dict(TEXT, model_type="mistral", sliding_window=None),
        vision_config=dict(TOWER, model_type="pixtral", head_dim=8),
        tie_word_embeddings=False,
    ),
    "llava": lambda: transformers.LlavaConfig(
        text_config=dict(TEXT, model_type="llama"), vision_config=dict(TOWER, model_type="clip_vision_model")
    ),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        text_config={k: v for k, v in TEXT.items() if k != "head_dim"} | {"rope_parameters": MROPE}, vision_config=QWEN
    ),
    "qwen3_vl": lambda: transformers.Qwen3VLConfig(
        text_config=dict(TEXT, rope_parameters=MROPE),
        vision_config=dict(QWEN, deepstack_visual_indexes=[0], num_position_embeddings=16),
    ),
}


def saved(folder, kind):
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(KINDS[kind](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_text_in_and_out_and_the_tower_untouched(tmp_path, kind):
    theirs = saved(tmp_path / "in", kind)
    files = hf.open_model(tmp_path / "in")
    params = hf.load_params(files, files.config, "float32")
    tokens = np.arange(3, 60)[None]
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(tokens)).logits.numpy()
    runtime = decoder.Runtime(compute_dtype="float32")
    hidden, _ = decoder.hidden_states(
        files.config,
        runtime,
        {"params": params},
        jnp.asarray(tokens),
        jnp.arange(57)[None],
        jnp.ones((1, 57), jnp.int32),
    )
    logits = decoder.logits(files.config, runtime, {"params": params}, hidden)
    assert np.abs(np.asarray(logits) - expected).max() < 2e-5 * np.abs(expected).max()
    export.export_model(tmp_path / "out", files.config, params, dtype="float32", source=files, shard_bytes=50_000)
    before, after = load_file(tmp_path / "in/model.safetensors"), {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        after |= load_file(file)
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        np.testing.assert_array_equal(again(input_ids=torch.from_numpy(tokens)).logits.numpy(), expected)
    export.export_model(tmp_path / "text", files.config, params, dtype="float32", source=files, text_only=True)
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32).eval()
    with torch.no_grad():
        found = alone(input_ids=torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
