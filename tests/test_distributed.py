"""Several processes: found by their traces, joined by hand, and training as one."""

import socket
import subprocess
import sys
import textwrap

import jax
import pytest

from sftjax import distributed
from sftjax.errors import ConfigError
from tests import tiny_run

VARIABLES = (
    "SLURM_NTASKS", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES",
    "MEGASCALE_COORDINATOR_ADDRESS", "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX",
)  # fmt: skip


@pytest.fixture
def alone(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: [])
    return monkeypatch


def test_alone_nothing_is_joined(alone):
    alone.setattr(jax.distributed, "initialize", lambda *a, **k: pytest.fail("joined"))
    assert distributed.start() == 1


@pytest.mark.parametrize(
    ("variables", "cluster"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "a[1-4]"}, "Slurm"),
        ({"SLURM_NTASKS": "4"}, None),  # in an allocation, but not started by srun
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "a TPU pod"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "a Kubernetes job"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a lone pod, such as a notebook's
    ],
)
def test_clusters_are_known_by_their_traces(alone, variables, cluster):
    for name, value in variables.items():
        alone.setenv(name, value)
    assert distributed.started_by() == cluster


def test_a_cluster_that_fails_is_named(alone):
    def fail(*arguments, **options):
        raise RuntimeError("Barrier timed out\nwith much detail")

    alone.setenv("OMPI_COMM_WORLD_SIZE", "2")
    alone.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ConfigError, match=r"Open MPI.*Barrier timed out.*by hand"):
        distributed.start()


def test_by_hand_all_three_are_needed(alone):
    with pytest.raises(ConfigError, match="--processes and --process"):
        distributed.start("localhost:1234")
    with pytest.raises(ConfigError, match="--process"):
        distributed.start("localhost:1234", 2, 2)
    with pytest.raises(ConfigError, match="--coordinator=HOST:PORT"):
        distributed.start(processes=2)


WORKER = textwrap.dedent("""
    import sys
    from sftjax import distributed
    assert distributed.start(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1])) == 2
    import jax, numpy as np
    from jax.experimental import multihost_utils
    assert jax.device_count() == 4
    print("sum", int(multihost_utils.process_allgather(np.int32(sys.argv[1])).sum()), flush=True)
""")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def together(commands: list[list[str]], timeout: float) -> list[str]:
    """Runs processes of two devices each; their standard outputs."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [
        subprocess.Popen(command, cwd=tiny_run.ROOT, env=tiny_run.environment(2), **pipes) for command in commands
    ]
    outputs = [worker.communicate(timeout=timeout) for worker in workers]
    for worker, (out, err) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, f"{out[-2000:]}\n{err[-4000:]}"
    return [out for out, _ in outputs]


def test_two_processes_meet():
    port = free_port()
    outputs = together([[sys.executable, "-c", WORKER, str(number), port] for number in range(2)], 120)
    for out in outputs:  # Gloo writes there too, whenever it connects
        assert "sum 1" in out.splitlines(), out


@pytest.mark.nightly
def test_two_processes_train_as_one(tmp_path):
    """Two processes of two devices, and one of four: the same losses."""
    model, data = tiny_run.model(tmp_path / "model"), tiny_run.conversations(tmp_path / "chats.jsonl")
    fields = {"train__batch_size": 8, "train__max_steps": 4, "checkpoint__save_steps": 2, "export__enabled": False}
    port = free_port()
    run = tiny_run.command(model, data, tmp_path / "two", **fields)
    together([[*run, f"--coordinator=localhost:{port}", "--processes=2", f"--process={i}"] for i in range(2)], 600)
    tiny_run.run(tiny_run.command(model, data, tmp_path / "one", **fields), devices=4, timeout=600)
    two, one = (tiny_run.lines(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert len(two) == len(one)
    for first, second in zip(two, one, strict=True):
        assert first.keys() == second.keys()
        for name, value in second.items():
            assert first[name] == pytest.approx(value, rel=1e-5), name
