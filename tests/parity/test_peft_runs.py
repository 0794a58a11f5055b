"""A LoRA run of the main program on a model of every family, and its export in PEFT: the logits are ours."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

import jax.numpy as jnp  # noqa: E402
import transformers  # noqa: E402

from sftjax import loading  # noqa: E402
from sftjax.models import decoder  # noqa: E402
from tests import tiny_run  # noqa: E402
from tests.data import tiny as tokenizers  # noqa: E402
from tests.weights import tiny  # noqa: E402

FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3", "phi3",
    "olmo2", "granite", "smollm3", "seed_oss", "gpt_oss", "cohere", "cohere2",
)  # fmt: skip
ROWS = 912
# A part of a fused module, what transformers 5 has no module for, and what changes a tied weight's two sides apart.
OTHERS = {
    "phi3 in part": ("phi3", dict(peft__target_modules="('q_proj','up_proj')")),
    "phi3 dora": ("phi3", dict(peft__method="dora")),
    "phi3 pissa": ("phi3", dict(peft__init_lora_weights="pissa", peft__use_rslora=True)),
    "mixtral in part": ("mixtral", dict(peft__target_modules="('gate_proj','q_proj')", peft__use_rslora=True)),
    "experts of a layer": ("qwen3_moe", dict(peft__layers_to_transform="(1,)")),
    "router": ("mixtral", dict(peft__target_modules="('q_proj','gate')")),
    "fused names": ("phi3", dict(peft__target_modules="('qkv_proj',)")),
    "parameters": ("gpt_oss", dict(peft__target_modules="()", peft__target_parameters="('experts.gate_up_proj',)")),
    "embedding": ("gemma", dict(peft__target_modules="('embed_tokens','q_proj')")),
    "embedding dora": ("llama", dict(peft__method="dora", peft__target_modules="('embed_tokens','lm_head','q_proj')")),
    "head": ("gemma", dict(peft__target_modules="('lm_head','q_proj')")),
    "rows": ("gemma", dict(peft__trainable_token_indices="(1,2,256,300)")),
    "rows of both": ("llama", dict(peft__trainable_token_indices="(('embed_tokens',(1,2)),('lm_head',(3,)))")),
    "lora bias": ("qwen2", dict(peft__lora_bias="True")),
    "norm and head saved": ("llama", dict(peft__modules_to_save="('norm','lm_head')")),
    "norms trained beside": ("qwen3", dict(peft__also_train="params/.*_norm/weight")),
    "padded vocabulary": ("llama", dict(peft__modules_to_save="('lm_head',)", model__pad_vocab_to_multiple_of="128")),
}  # fmt: skip


def make_base(folder, family: str):
    """A tiny model in its family's layout, with a tokenizer."""
    raw = tiny.config_dict(family, vocab_size=ROWS) | {"dtype": "float32"}
    tensors = tiny.random_tensors(raw, dtype="float32")
    for name, value in tensors.items():
        scale = 0.1 if value.ndim == 1 else value.shape[-1] ** -0.5
        tensors[name] = (value * scale + (value.ndim == 1 and "norm" in name)).astype(np.float32)
    tokenizers.byte_level(folder)
    return tiny.write_model(folder, raw, tensors)


def train(tmp_path, base, **fields):
    data = tiny_run.conversations(tmp_path / "data.jsonl", 12)
    settings = {"peft__method": "lora", "peft__r": 4, "peft__lora_alpha": 8.0} | fields
    fixed = dict(train__max_steps=2, data__eval_fraction=0.0, eval__num_samples=0, train__lr_scheduler_type="constant")
    command = tiny_run.command(base, data, tmp_path / "run", train__warmup_ratio=0.0, **fixed, **settings)
    tiny_run.run(command, timeout=1200)
    return tmp_path / "run" / "export"


TOKENS = np.random.default_rng(0).integers(3, 900, (2, 24))
TOKENS[0, :4] = (1, 2, 256, 300)


def our_logits(base, adapter):
    model = loading.load_model(str(base), adapter=adapter)
    tokens = jnp.asarray(TOKENS, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = decoder.hidden_states(
        model.config, model.runtime, model.variables, tokens, positions, jnp.ones_like(tokens)
    )
    return np.asarray(decoder.logits(model.config, model.runtime, model.variables, hidden))


def peft_logits(base, adapter):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        alone = model.eval()(torch.tensor(TOKENS)).logits.numpy()
        wrapped = peft.PeftModel.from_pretrained(model, adapter).eval()
        return alone, wrapped(torch.tensor(TOKENS)).logits.numpy()


CASES = {family: (family, {}) for family in FAMILIES} | OTHERS


@pytest.mark.parametrize("case", CASES)
def test_what_a_run_exports_is_that_in_peft(tmp_path, case):
    family, fields = CASES[case]
    base = make_base(tmp_path / "base", family)
    export = train(tmp_path, base, **fields)
    alone, expected = peft_logits(base, export)
    effect = np.abs(expected - alone).max()
    assert effect > 1e-2
    np.testing.assert_allclose(our_logits(base, str(export)), expected, atol=1e-4, rtol=0)
    figures = json.loads((export / "verification.json").read_text())
    assert figures["passed"] and "5" in figures["loads_in_peft_with_transformers"]
