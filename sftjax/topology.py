"""Devices to plan for, whether they are here or not: `v5e:4x4`, `v5p:2x2x4`, `h100:8`, `gpu`, `cpu`, `cpu:8`."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence

import jax

from sftjax import hardware
from sftjax.errors import ConfigError
from sftjax.hardware import CHIPS, Chip

GPU = "h100"  # what `gpu` stands for where there is none: the usual device with 80 GB
# libtpu wants to know on what machine it is, even when it only compiles; any that exists will do.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling needs no chip, so plans may run side by side
}


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program is planned for.

    Attributes:
      chip: None where nothing is known of it (a CPU).
      devices: to build a mesh from. Of GPUs that aren't here, CPU devices stand in.
      compiles: whether programs can be compiled for these devices on this machine.
    """

    name: str
    platform: str
    chip: Chip | None
    devices: Sequence[jax.Device]
    compiles: bool

    @property
    def memory(self) -> int:
        """Bytes of one device: by its data sheet, by what it says itself, or as its share of the host's."""
        if self.chip is not None:
            return self.chip.memory
        here = [device for device in self.devices if device.process_index == jax.process_index()] or self.devices
        stats = None if self.platform == "cpu" else here[0].memory_stats()
        return stats["bytes_limit"] if stats and "bytes_limit" in stats else hardware.host_memory() // len(here)


def find(name: str) -> Target:
    """The devices of a topology. Call it before jax has been used: it decides which platforms jax opens.

    Raises:
      ConfigError: an unknown name, or what is needed to compile for it isn't installed.
    """
    kind, _, shape = name.partition(":")
    chip = CHIPS.get(kind)
    if kind == "cpu":
        return Target(name, "cpu", None, _cpus(_count(name, shape)), True)
    if chip is not None and chip.platform == "tpu" and kind != "v4":  # of which libtpu only compiles for halves
        return Target(name, "tpu", chip, _tpus(name, shape), True)
    if kind == "gpu" or (chip is not None and chip.platform == "gpu"):
        return _gpus(name, chip, _count(name, shape))
    known = ", ".join(chip for chip in CHIPS if chip != "v4")
    raise ConfigError(
        f"--topology={name}: say CHIP:SHAPE, such as v5e:4x4, v5p:2x2x4, h100:8, gpu or cpu; chips are {known}"
    )


def here() -> Target:
    """The devices that jax has."""
    devices = jax.devices()
    kind = devices[0].device_kind
    return Target(f"{len(devices)} x {kind}", devices[0].platform, hardware.find(kind), devices, True)


def _count(name: str, shape: str) -> int:
    if not re.fullmatch(r"[1-9]\d*|", shape):
        raise ConfigError(f"--topology={name}: after the colon comes the number of devices")
    return int(shape or 1)


def _cpus(count: int, platforms: str | None = "cpu") -> list[jax.Device]:
    try:
        jax.config.update("jax_platforms", platforms)
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # jax is in use already: take what it has
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(f"{count} CPU devices are needed, jax was started with {len(devices)}")
    return devices[:count]


def _tpus(name: str, shape: str) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"--topology={name}: compiling for a TPU needs libtpu: pip install 'sftjax[tpu]'")
    if not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        raise ConfigError(f"--topology={name}: give the slice's shape, such as v5e:4x4 or v5p:2x2x4")
    for variable, value in _LIBTPU.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")  # the plan compiles; it must not take this machine's own TPU
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(name, "tpu").devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"--topology={name}: {str(error).splitlines()[0]}") from error


def _gpus(name: str, chip: Chip | None, count: int) -> Target:
    stand_ins = _cpus(count, platforms=None)
    try:
        here = jax.devices("gpu")
    except RuntimeError:
        here = []
    kind = hardware.find(here[0].device_kind) if here else None
    if kind is not None and len(here) >= count and chip in (None, kind):
        return Target(name, "gpu", kind, here[:count], True)
    return Target(name, "gpu", chip or CHIPS[GPU], stand_ins, False)
