"""Tokens that `model.add_tokens` brings, trained by the main program, in transformers and in PEFT."""

import jax.numpy as jnp
import numpy as np
import pytest

from sftjax import loading
from sftjax.data import tokenizer as tokenizers
from sftjax.models import decoder
from tests import tiny_run

torch = pytest.importorskip("torch", reason="needs the extra parity")
peft = pytest.importorskip("peft", reason="needs the extra parity")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

NAMES = ("<|user|>", "<|assistant|>", "<|fin|>")
OWN = (
    "{%- for m in messages -%}<|{{ m['role'] }}|>{{ m['content'] }}<|fin|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model whose table has room for one token more; the other two make it grow."""
    place = tmp_path_factory.mktemp("added")
    (place / "own.jinja").write_text(OWN)
    tiny_run.conversations(place / "chats.jsonl")
    return tiny_run.model(place / "base", vocab_size=901)


@pytest.mark.parametrize("method", ["none", "lora"])
def test_added_tokens_are_one_token_with_a_trained_row_elsewhere(base, method):
    place = base.parent
    fields = {"model__chat_template": str(place / "own.jinja"), "model__add_tokens": repr(NAMES)}
    fields |= {"peft__method": method, "train__max_steps": 3, "data__eval_fraction": 0.0, "eval__num_samples": 0}
    tiny_run.run(tiny_run.command(base, place / "chats.jsonl", place / method, **fields))
    export = place / method / "export"
    theirs = transformers.AutoTokenizer.from_pretrained(export)
    assert theirs.convert_tokens_to_ids(list(NAMES)) == [900, 901, 902] and len(theirs) == 903
    ids = theirs.apply_chat_template([{"role": "user", "content": "the cat"}], add_generation_prompt=True)
    ids = list(ids["input_ids"] if hasattr(ids, "keys") else ids)
    assert ids[0] == 900 and ids[-2:] == [902, 901]
    ours = tokenizers.load(export)
    assert ours.encode("<|user|>the cat<|fin|><|assistant|>") == ids and ours.stop_ids[0] == 902
    if method == "none":
        model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
        assert model.generation_config.eos_token_id[0] == 902
        loaded = loading.load_model(str(export))
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model.resize_token_embeddings(len(theirs), mean_resizing=False)
        model = peft.PeftModel.from_pretrained(model, export)
        loaded = loading.load_model(str(base), adapter=str(export))
    assert model.get_input_embeddings().weight.shape[0] == 903
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    tokens = jnp.asarray([ids], jnp.int32)
    inputs = (tokens, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], jnp.ones_like(tokens))
    hidden, _ = decoder.hidden_states(loaded.config, loaded.runtime, loaded.variables, *inputs)
    logits = decoder.logits(loaded.config, loaded.runtime, loaded.variables, hidden)
    np.testing.assert_allclose(np.asarray(logits)[0], expected, atol=2e-4)
