"""Reward models against transformers' sequence classifiers, live."""

import numpy as np
import pytest

from sftjax.synth.reward_model import load_reward_model
from tests.data import tiny

pytestmark = pytest.mark.parity
CONVERSATIONS = [
    [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": answer}]
    for answer in ("Paris.", "I am fine, thank you. " * 20, "No")
]
COMMON = {
    "vocab_size": 912, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "num_labels": 1,
}  # fmt: skip


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2"])
def test_rewards(tmp_path, family):
    torch = pytest.importorskip("torch")
    import transformers

    extra = {"head_dim": 16} if family != "Qwen2" else {}
    config = getattr(transformers, f"{family}Config")(**COMMON, **extra)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    theirs.save_pretrained(tmp_path / "m")
    tiny.byte_level(tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        wanted = [
            float(theirs(**tokenizer.apply_chat_template(each, return_tensors="pt", return_dict=True)).logits[0, 0])
            for each in CONVERSATIONS
        ]
    found = load_reward_model(str(tmp_path / "m"), "float32").score(CONVERSATIONS)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert np.ptp(wanted) > 1e-3
