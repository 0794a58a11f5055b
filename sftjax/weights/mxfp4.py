"""MXFP4, as GPT-OSS is released: two 4-bit floats (E2M1) in a byte, the low half first; each 32 share a power of two.

Source: the OCP Microscaling specification; `transformers.integrations.mxfp4.convert_moe_packed_tensors`.
"""

from __future__ import annotations

import numpy as np

_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [rows, columns] from blocks [rows, columns / 32, 16] and scales [rows, columns / 32]."""
    rows, count, size = blocks.shape
    values = np.empty((rows, count, size * 2), np.float32)
    values[..., 0::2] = _VALUES[blocks & 0x0F]
    values[..., 1::2] = _VALUES[blocks >> 4]
    return np.ldexp(values, scales.astype(np.int32)[..., None] - 127).reshape(rows, -1)
