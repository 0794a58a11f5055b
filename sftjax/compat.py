"""The one place that knows jax versions (0.10 on Python 3.11, 0.12 on 3.12 and later)."""

from __future__ import annotations

import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:3] if part.isdigit())

HOST_MEMORY = "pinned_host"  # of the host, as devices reach it; nothing is computed in it


def order_collectives() -> None:
    """Has XLA run a program's collectives in one order on all CPU devices; before jax first looks at its devices.

    By default each device starts whatever is ready, and blocks a thread until the others have come to the same one. Two
    collectives that don't depend on each other, started in different orders, wait for ever (jax 0.10, two cores: one
    evaluation of a few dozen on eight simulated devices; none of thousands with this). It costs a little speed, and
    isn't needed where a device is alone.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_enable_concurrency_optimized_scheduler" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_enable_concurrency_optimized_scheduler=false".strip()


if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ:
    order_collectives()


def make_mesh(devices: np.ndarray, axis_names: tuple[str, ...]) -> Mesh:
    """A mesh whose axes the compiler partitions by itself.

    `jax.make_mesh` defaults to Explicit axes since jax 0.9; the code here relies on propagation.
    """
    return Mesh(devices, axis_names, axis_types=(AxisType.Auto,) * len(axis_names))


def in_turn(results):
    """The results of a program, waited for where the devices are simulated on a CPU.

    There the threads that launch a program are those that the one before may still need: both with collectives, they
    wait for each other, and XLA aborts after 40 s (seen with jax 0.10 on two busy cores).
    """
    if jax.default_backend() == "cpu" and jax.local_device_count() > 1:
        jax.block_until_ready(results)
    return results


def shard_map(function, *, mesh: Mesh, in_specs, out_specs):
    """Per-device code. Replication isn't checked: Pallas kernels can't state it."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
