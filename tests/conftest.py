"""Eight simulated CPU devices, and no silent rank promotion, for every test; which of them are slow."""

import os
from pathlib import Path

# The devices wait for each other: on a loaded machine for longer than the 40 s after which XLA aborts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

import sftjax.compat  # noqa: F401  # before jax looks at its devices: it keeps their collectives in order

jax.config.update("jax_numpy_rank_promotion", "raise")

SLOW = {line for line in (Path(__file__).parent / "slow.txt").read_text().splitlines() if not line.startswith("#")}


def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW & {item.nodeid, item.nodeid.split("[")[0]}:
            item.add_marker(pytest.mark.slow)
