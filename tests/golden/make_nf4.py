"""Makes nf4.npz: what bitsandbytes computes on the CPU. Needs torch and bitsandbytes.

python tests/golden/make_nf4.py
"""

from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as bnb
import numpy as np
import torch


def weights() -> dict[str, np.ndarray]:
    """Ordinary, heavy-tailed, partly zero and bfloat16-rounded matrices; the last needs two blocks of scales."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((24, 128)).astype(np.float32) * 0.02
    heavy = (rng.standard_normal((16, 192)) ** 5).astype(np.float32)
    zeros = normal.copy()
    zeros[3:7] = 0
    rounded = torch.tensor(rng.standard_normal((40, 128)) * 0.3).bfloat16().float().numpy()
    grid = (rng.integers(-15, 16, (8, 64)) / 16).astype(np.float32)
    large = rng.standard_normal((128, 192)).astype(np.float32)
    return dict(normal=normal, heavy=heavy, zeros=zeros, rounded=rounded, grid=grid, large=large)


def main():
    arrays = {"version": np.array(bitsandbytes.__version__), "dynamic_map": bnb.create_dynamic_map(True).numpy()}
    arrays["dynamic_map_unsigned"] = bnb.create_dynamic_map(False).numpy()
    for name, weight in weights().items():
        packed, state = bnb.quantize_4bit(
            torch.tensor(weight), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        _, plain = bnb.quantize_4bit(torch.tensor(weight), blocksize=64, quant_type="nf4", compress_statistics=False)
        arrays[f"{name}/weight"] = weight
        arrays[f"{name}/codes"] = packed.numpy().reshape(weight.shape[0], -1)
        arrays[f"{name}/largest"] = plain.absmax.numpy().reshape(weight.shape[0], -1)
        arrays[f"{name}/absmax"] = state.absmax.numpy().reshape(weight.shape[0], -1)
        arrays[f"{name}/absmax_scale"] = state.state2.absmax.numpy()
        arrays[f"{name}/absmax_offset"] = state.offset.numpy()
        arrays[f"{name}/values"] = bnb.dequantize_4bit(packed, state).numpy()
    np.savez_compressed(Path(__file__).with_name("nf4.npz"), **arrays)


if __name__ == "__main__":
    main()
