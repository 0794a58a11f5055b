"""Eight simulated CPU devices, and no silent rank promotion, for every test; which of them are slow."""

import os
import shutil
import tempfile
from pathlib import Path

# The devices wait for each other: on a loaded machine for longer than the 40 s after which XLA aborts. Most of the
# time here goes into machine code for tiny arrays, two fifths less of it without LLVM's optimizer; the programs that
# tests start as a user does (tests/tiny_run.py) are compiled as a user's.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
    + " --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"
# What one test compiled the next needn't, nor the programs that tests start: the folder goes with the session.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR") or tempfile.mkdtemp(
    prefix=f"sftjax-compiled-{os.getpid()}-"
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import pytest

import sftjax.compat  # noqa: F401  # before jax looks at its devices: it keeps their collectives in order

jax.config.update("jax_numpy_rank_promotion", "raise")

SLOW = {line for line in (Path(__file__).parent / "slow.txt").read_text().splitlines() if not line.startswith("#")}


def pytest_unconfigure():
    folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if folder.name.startswith(f"sftjax-compiled-{os.getpid()}-"):  # made by this process, not given to it
        shutil.rmtree(folder, ignore_errors=True)


def pytest_runtest_teardown(item, nextitem):
    if nextitem is None or nextitem.path != item.path:
        jax.clear_caches()  # a file's programs are of no use to the next one, and gigabytes


def pytest_collection_modifyitems(items):
    # Files right under tests/ train whole models; first, so that no worker is left with one at the end.
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)
    for item in items:
        if SLOW & {item.nodeid, item.nodeid.split("[")[0]}:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("parity"):  # what the peers warn each other of isn't ours to fail on
            item.add_marker(pytest.mark.filterwarnings("default"), append=False)
