"""What a device can do, from its maker's data sheet: the denominators of MFU, and the limits a plan is held against.

Figures are those of one device as jax counts them (of tpu7x, that is half a chip), dense, for bfloat16.
Sources: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x); NVIDIA's data sheets of A100, H100, H200, B200, L4, L40S,
RTX A6000, RTX 4090 and T4 (float16).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from pathlib import Path

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      flops: a second.
      memory: bytes of HBM; on TPUs what the compiler leaves to a program.
      memory_rate: bytes a second.
      link_rate: bytes a second that it can receive from its neighbours (ICI, NVLink; PCIe where there is nothing else).
    """

    name: str
    platform: str
    flops: float
    memory: int
    memory_rate: float
    link_rate: float


def lacks_bfloat16(device: object) -> bool:
    """Whether it is an NVIDIA GPU older than Ampere (T4, V100), on which bfloat16 is emulated, slowly."""
    capability = str(getattr(device, "compute_capability", ""))  # AMD's are names, such as gfx90a
    return re.fullmatch(r"[1-7]\.\d", capability) is not None


def host_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or those of the container that it runs in."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)


def _tpu(name: str, tflops: float, gib: float, gb_per_s: float, link_gb_per_s: float) -> Chip:
    return Chip(name, "tpu", tflops * 1e12, int(gib * GIB), gb_per_s * 1e9, link_gb_per_s * 1e9)


def _gpu(name: str, tflops: float, mib: int, gb_per_s: float, link_gb_per_s: float) -> Chip:
    return Chip(name, "gpu", tflops * 1e12, mib * 2**20, gb_per_s * 1e9, link_gb_per_s * 1e9)


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 275, 30.75, 1228, 300),
        _tpu("v5e", 197, 15.75, 819, 200),
        _tpu("v5p", 459, 95.74, 2765, 600),
        _tpu("v6e", 918, 31.25, 1640, 400),
        _tpu("tpu7x", 1153.5, 94.75, 3690, 300),
        _gpu("t4", 65, 15_360, 320, 16),
        _gpu("l4", 121, 23_034, 300, 32),
        _gpu("rtx4090", 165, 24_564, 1008, 32),
        _gpu("a6000", 155, 49_140, 768, 32),
        _gpu("l40s", 362, 46_068, 864, 32),
        _gpu("a100-40gb", 312, 40_960, 1555, 300),
        _gpu("a100", 312, 81_920, 2039, 300),
        _gpu("h100", 989, 81_559, 3350, 450),
        _gpu("h200", 989, 143_771, 4800, 450),
        _gpu("b200", 2250, 183_359, 8000, 900),
    )
}
# How jax spells a device's kind, in lower case, to the name here: the first that is part of it.
_KINDS = {
    "tpu7x": "tpu7x",
    "v6 lite": "v6e",
    "v6e": "v6e",
    "v5 lite": "v5e",
    "v5e": "v5e",
    "v5p": "v5p",
    "tpu v5": "v5p",
    "tpu v4": "v4",
    "b200": "b200",
    "h200": "h200",
    "h100": "h100",
    "a100-sxm4-40gb": "a100-40gb",
    "a100-pcie-40gb": "a100-40gb",
    "a100": "a100",
    "rtx a6000": "a6000",
    "rtx 4090": "rtx4090",
    "l40s": "l40s",
    "nvidia l4": "l4",
    "tesla t4": "t4",
}


def find(device_kind: str) -> Chip | None:
    """The chip for `jax.Device.device_kind`; None if it isn't known."""
    kind = device_kind.lower()
    return next((CHIPS[name] for spelling, name in _KINDS.items() if spelling in kind), None)
