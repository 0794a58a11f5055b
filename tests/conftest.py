"""Eight simulated CPU devices, and no silent rank promotion, for every test."""

import os

# The devices wait for each other: on a loaded machine for longer than the 40 s after which XLA aborts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

import sftjax.compat  # noqa: F401  # before jax looks at its devices: it keeps their collectives in order

jax.config.update("jax_numpy_rank_promotion", "raise")
