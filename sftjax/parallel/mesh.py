"""The device mesh: five named axes, always all present.

data     copies of the model, each on its own rows (across slices or hosts)
fsdp     rows and parameters: each device keeps a part, gathered layer by layer
tensor   heads, feed-forward width, vocabulary
context  parts of a long sequence
expert   experts of a mixture
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from sftjax import compat
from sftjax.errors import ConfigError

AXES = ("data", "fsdp", "tensor", "context", "expert")
BATCH_AXES = ("data", "fsdp")


def make(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all `devices` (default: every device of every process).

    Args:
      shape: axis -> size; axes left out have size 1, one may be -1: what is left. Empty: everything on `fsdp`.

    Raises:
      ConfigError: an unknown axis, or sizes whose product isn't the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = axis_sizes(shape, len(devices))
    return compat.make_mesh(_arrange(tuple(sizes[axis] for axis in AXES), devices), AXES)


def axis_sizes(shape: Mapping[str, int], count: int) -> dict[str, int]:
    """Sizes of all axes on `count` devices, with the -1 filled in."""
    unknown = sorted(set(shape) - set(AXES))
    if unknown:
        raise ConfigError(f"mesh axis {unknown[0]!r} doesn't exist; choose from {', '.join(AXES)}")
    sizes = {axis: 1 for axis in AXES} | (dict(shape) or {"fsdp": -1})
    bad = [axis for axis, size in sizes.items() if size < 1 and size != -1]
    free = [axis for axis, size in sizes.items() if size == -1]
    if bad or len(free) > 1:
        raise ConfigError(f"mesh {dict(shape)}: sizes are positive, and at most one may be -1 (what is left)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if count % fixed:
            raise ConfigError(f"mesh {dict(shape)}: {count} devices can't be divided by {fixed}")
        sizes[free[0]] = count // fixed
    elif fixed != count:
        raise ConfigError(f"mesh {dict(shape)} needs {fixed} devices, there are {count}; set one axis to -1")
    return sizes


def _arrange(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Neighbours in the mesh are neighbours on the chip's network; slices are split along `data`, else `fsdp`."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        for axis in range(len(BATCH_AXES)):
            if shape[axis] % slices == 0:
                within = tuple(size // slices if i == axis else size for i, size in enumerate(shape))
                across = tuple(slices if i == axis else 1 for i in range(len(shape)))
                return mesh_utils.create_hybrid_device_mesh(within, across, devices)
        raise ConfigError(f"{slices} slices: the mesh's data or fsdp axis must be a multiple of that")
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(shape, devices)
    return np.array(devices).reshape(shape)
