"""Makes peft_kinds_<base>.npz: adapters of every kind as PEFT writes them, and logits. Needs torch and peft.

python -m tests.golden.make_peft_kinds
"""

import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file

from tests.parity import peft_kinds

BASES = ("qwen2", "phi3", "qwen2_moe")
peft_kinds.SIZES.update(hidden_size=16, intermediate_size=24, num_hidden_layers=3)
TOKENS = torch.tensor([[3, 17, 95, 5, 6, 40, 41, 80], [7, 8, 3, 3, 17, 60, 61, 62]])


def main():
    for family in BASES:
        arrays = {"tokens": TOKENS.numpy(), "version": np.array(f"{peft.__version__}, {transformers.__version__}")}
        for name, kind in peft_kinds.kinds_of(family).items():
            with tempfile.TemporaryDirectory() as folder:
                folder = Path(folder)
                wrapped = peft_kinds.make_adapter(folder, family, kind)
                with torch.no_grad():
                    arrays[f"{name}/logits"] = wrapped(TOKENS).logits.numpy()
                for path in (folder / "adapter").glob("adapter_*"):
                    arrays[f"{name}/file/{path.name}"] = np.frombuffer(path.read_bytes(), np.uint8)
                arrays[f"{name}/refused"] = np.array(kind.get("_refused", ""))
                arrays["base/config.json"] = np.array((folder / "base" / "config.json").read_text())
                arrays |= {f"base/{key}": value for key, value in load_file(folder / "base/model.safetensors").items()}
        np.savez_compressed(Path(__file__).with_name(f"peft_kinds_{family}.npz"), **arrays)


if __name__ == "__main__":
    main()
