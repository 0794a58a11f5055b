"""GPT-OSS as released: experts in MXFP4, dequantised while they are read.

Two 4-bit floats (E2M1) in a byte, the low nibble first; each block of 32 has one power of two as scale:

    <name>_blocks u8 [E, rows, columns / 32, 16],  <name>_scales u8 [E, rows, columns / 32]  ->  [E, rows, columns]

Source: the OCP Microscaling specification; `transformers.integrations.mxfp4.convert_moe_packed_tensors`.
"""

from __future__ import annotations

import numpy as np

from sftjax.weights.load import Source

_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


class DequantisedSource:
    """Shows `<name>_blocks` and `<name>_scales` as one bfloat16 tensor `<name>`."""

    def __init__(self, source: Source):
        self.where, self._source = source.where, source

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read  # type: ignore[attr-defined]

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        shapes = dict(self._source.shapes())
        for name in [name for name in shapes if name.endswith("_blocks")]:
            stem = name.removesuffix("_blocks")
            (count, rows, blocks, size), dtype = shapes.pop(name)
            scales = shapes.pop(f"{stem}_scales", None)
            sound = dtype == "uint8" and scales == ((count, rows, blocks), "uint8")
            shapes[stem] = (count, rows, blocks * size * 2), "bfloat16" if sound else "broken MXFP4"
        return shapes

    def read(self, name: str, index: tuple[int | slice, ...], out: np.ndarray) -> None:
        stored = self._source.shapes()
        if f"{name}_blocks" not in stored:
            self._source.read(name, index, out)
            return
        expert, rows, columns = index[0], *(tuple(index[1:]) + (slice(None),) * 2)[:2]
        shape = stored[f"{name}_blocks"][0]
        chosen = range(shape[1])[rows]
        blocks = np.empty((len(chosen), *shape[2:]), np.uint8)
        scales = np.empty((len(chosen), shape[2]), np.uint8)
        self._source.read(f"{name}_blocks", (expert, rows), blocks)
        self._source.read(f"{name}_scales", (expert, rows), scales)
        out[...] = dequantise(blocks, scales)[:, columns]


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [rows, columns] from blocks [rows, columns / 32, 16] and scales [rows, columns / 32]."""
    rows, count, size = blocks.shape
    values = np.empty((rows, count, size * 2), np.float32)
    values[..., 0::2] = _VALUES[blocks & 0x0F]
    values[..., 1::2] = _VALUES[blocks >> 4]
    return np.ldexp(values, scales.astype(np.int32)[..., None] - 127).reshape(rows, -1)
