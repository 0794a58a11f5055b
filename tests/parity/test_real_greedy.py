"""Greedy answers of real models to real prompts, token by token as transformers' (float32).

Needs the conversations of the quickstart (`bash tools/quickstart.sh --setup_only`). SmolLM2-135M-Instruct comes with
them; SFTJAX_GEMMA3_270M names a Hugging Face folder of Gemma 3 270M with a chat template.
"""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from sftjax import loading
from sftjax.generate.sample import Generator
from sftjax.parallel import mesh as meshes

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "quickstart"
DATA = CACHE / "chitchat" / "held_out.jsonl"
FOLDERS = {
    "smollm2": str(CACHE / "SmolLM2-135M-Instruct"),
    "gemma3": os.environ.get("SFTJAX_GEMMA3_270M", ""),
}
pytestmark = [
    pytest.mark.parity,
    pytest.mark.nightly,
    pytest.mark.skipif(not DATA.exists(), reason="run tools/quickstart.sh --setup_only first"),
]
PROMPTS, NEW_TOKENS, MARGIN = 20, 40, 1e-3


@pytest.mark.parametrize("name", FOLDERS)
def test_twenty_real_prompts(name):
    folder = FOLDERS[name]
    if not os.path.isdir(folder):
        pytest.skip(f"no folder of {name}: see this file's first lines")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line)["messages"] for line in DATA.read_text().splitlines()[:PROMPTS]]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [
        tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        for messages in rows
    ]
    ours = loading.load_model(folder, dtype="float32", mesh=meshes.make({"fsdp": 1}, jax.devices()[:1]))
    generator = Generator(ours.config, ours.runtime, ours.variables, ours.tokenizer)
    outputs = generator.generate([messages[:1] for messages in rows], max_new_tokens=NEW_TOKENS)
    ties = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt])
        found = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        answer, expected = np.array(output.tokens), found.sequences[0, len(prompt) :].numpy()
        both = min(len(answer), len(expected))
        apart = np.flatnonzero(answer[:both] != expected[:both])
        if not len(apart):
            assert len(answer) == len(expected)
            continue
        top = found.logits[apart[0]][0].topk(2).values  # only where the reference itself could go either way
        assert top[0] - top[1] < MARGIN
        ties += 1
    assert ties <= PROMPTS // 4  # or the comparison would end early too often to say much
