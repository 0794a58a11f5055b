"""Several processes as one program: who started them, and where they meet.

Slurm, Open MPI, Kubernetes (indexed jobs, JobSets) and TPU pods tell each process its number and the others' address in
the environment or through the metadata server; jax reads all of them. Elsewhere all three are given by hand.
"""

from __future__ import annotations

import glob
import importlib.util
import os

import jax

from sftjax import compat
from sftjax.errors import ConfigError


def start(coordinator: str = "", processes: int = 0, process: int = -1) -> int:
    """Joins the other processes; before anything else touches jax's devices.

    Args:
      coordinator: HOST:PORT of process 0, the same for all; empty: found out, where a cluster says so.
      processes: how many there are.
      process: which one this is, from 0.

    Returns:
      how many processes there are; 1 where there is nobody to join.

    Raises:
      ConfigError: part of the three is missing, or the others can't be reached.
    """
    cluster = started_by()
    if not coordinator and cluster is None:
        if processes > 1:
            raise ConfigError("several processes need --coordinator=HOST:PORT, the address of process 0")
        return 1
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        compat.order_collectives()
    try:
        if coordinator:
            if processes < 1 or not 0 <= process < processes:
                raise ConfigError(
                    f"--coordinator={coordinator} needs --processes and --process, "
                    f"a number from 0 to --processes - 1 (here {process} of {processes})"
                )
            jax.distributed.initialize(coordinator, processes, process, cluster_detection_method="deactivate")
        else:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        who = f"process {process} of {processes} at {coordinator}" if coordinator else cluster
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"the processes can't meet ({who}): {reason}; give --coordinator, --processes and --process by hand"
        ) from error
    return jax.process_count()


def started_by() -> str | None:
    """What started this process as one of several, by its traces; None: it is alone as far as one can see."""
    env = os.environ
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in env:
        return "Slurm"
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "," in env.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in env:
        return "a TPU pod"
    if importlib.util.find_spec("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
        return "a TPU VM"  # which asks its metadata server for the others
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return "a Kubernetes job"
    return None
