"""Small checkpoints in bitsandbytes' 4-bit form, with digests of what it dequantises them to: tests/golden/bnb4/.

pip install torch==2.13.0 transformers accelerate bitsandbytes; python tests/golden/make_bnb4.py
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import bitsandbytes
import torch
import transformers

KINDS = {
    "nf4_double": dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "nf4": dict(bnb_4bit_quant_type="nf4"),
    "fp4": dict(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
}
SIZES = dict(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=320,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)


def main() -> None:
    root = Path(__file__).with_name("bnb4")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as plain:
        config = transformers.LlamaConfig(**SIZES)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(plain)
        for kind, options in KINDS.items():
            settings = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                plain, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
            )
            model.save_pretrained(root / kind)
            (root / kind / "generation_config.json").unlink(missing_ok=True)
            digests = {}
            for name, module in model.named_modules():
                if isinstance(module, bitsandbytes.nn.Linear4bit):
                    weight = module.weight
                    values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
                    digests[f"{name}.weight"] = hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()
            (root / kind / "dequantised.json").write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main()
