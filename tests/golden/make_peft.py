"""Makes peft_<variant>.npz: a tiny Llama, a PEFT adapter on it, and the logits. Needs torch, transformers and peft.

python tests/golden/make_peft.py
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file

VARIANTS = {
    "lora": dict(target_modules="all-linear"),
    "rslora": dict(
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 3, "v_proj": 6},
        alpha_pattern={r"layers\.0\.self_attn\.q_proj": 5},
    ),
    "dora": dict(use_dora=True, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"]),
}


def main():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.randint(3, 48, (2, 16))
    for variant, settings in VARIANTS.items():
        model = transformers.LlamaForCausalLM(config).eval()
        model.load_state_dict(start)
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **settings)
        ).eval()
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
            logits = wrapped(tokens).logits
        with tempfile.TemporaryDirectory() as folder:
            wrapped.save_pretrained(folder)
            adapter = load_file(Path(folder) / "adapter_model.safetensors")
            settings = json.loads((Path(folder) / "adapter_config.json").read_text())
            settings["target_modules"] = sorted(settings["target_modules"])  # a set: its order changes run by run
        arrays = {f"adapter/{name}": value for name, value in adapter.items()}
        if variant == "lora":
            arrays |= {f"base/{name}": value.numpy() for name, value in start.items()}
            arrays["config"] = np.array(config.to_json_string())
        arrays |= {
            "tokens": tokens.numpy(),
            "logits": logits.numpy(),
            "settings": np.array(json.dumps(settings)),
            "version": np.array(peft.__version__),
        }
        np.savez_compressed(Path(__file__).with_name(f"peft_{variant}.npz"), **arrays)


if __name__ == "__main__":
    main()
