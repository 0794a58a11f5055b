"""What tools/setup.sh decides, on machines made of a few stubs on PATH. (CI runs the set-up itself.)"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
PROGRAMS = "bash cat dirname ls df awk sed sort paste head tail tee grep printf rm ln"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def machine(tmp_path):
    """An empty machine: PATH has what the scripts themselves need, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in PROGRAMS.split():
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return folder


def stub(machine: Path, name: str, script: str) -> None:
    path = machine / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def python(machine: Path, name: str) -> None:
    stub(machine, name, f'exec {sys.executable} "$@"')


def bash(machine: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess:
    environment = {"PATH": path or str(machine), "HOME": str(machine.parent / "home")}
    return subprocess.run(
        [shutil.which("bash"), *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


def call(machine: Path, function: str, path: str | None = None) -> subprocess.CompletedProcess:
    return bash(machine, "-euo", "pipefail", "-c", f"source {TOOLS}/setup.sh; {function}", path=path)


@pytest.mark.parametrize(
    "script, extra",
    [
        ("echo 580.65.06", "cuda13"),
        ("echo 595.10; echo 595.10", "cuda13"),  # two devices
        ("echo 570.124.06", "cuda12"),
        ("echo 470.82.01", ""),
        ("echo 'NVIDIA-SMI has failed'; exit 9", ""),
        ("echo '[N/A]'", ""),
    ],
)
def test_the_driver_decides_on_the_build_of_jax(machine, script, extra):
    stub(machine, "nvidia-smi", script)
    done = call(machine, "accelerator_extra")
    assert done.returncode == 0 and done.stdout.strip() == extra, done
    assert ("older than 525" in done.stderr) == script.startswith("echo 470")


def test_nothing_without_an_accelerator(machine):
    done = call(machine, "accelerator_extra")
    assert (done.returncode, done.stdout.strip()) in ((0, ""), (0, "tpu"))


def test_a_stub_that_only_prints_is_no_python(machine):
    """pyenv leaves one on PATH for each version it has anywhere; the real one lies beside it."""
    shims = machine.parent / "manager" / "shims"
    stub(shims, f"python{VERSION}", f"echo 'python{VERSION}: command not found' >&2; exit 127")
    path = f"{shims}{os.pathsep}{machine}"
    assert call(machine, f"find_python {VERSION}", path).returncode == 1
    real = machine.parent / "manager" / "versions" / f"{VERSION}.1" / "bin"
    python(real, f"python{VERSION}")
    done = call(machine, f"find_python {VERSION} && echo $PYTHON_PATH", path)
    assert done.stdout.strip() == str(real / f"python{VERSION}")


def test_a_python_by_another_name_is_found_and_its_version_is_asked(machine):
    python(machine, "python3")
    others = {"3.11", "3.12", "3.13"} - {VERSION}
    for other in others:
        python(machine, f"python{other}")  # lies about its version
    done = call(machine, "require_python && echo $PYTHON_VERSION $PYTHON_PATH")
    assert done.stdout.split() == [VERSION, str(machine / "python3")], done


@pytest.mark.parametrize("missing, code", [("ensurepip", 1), ("nothing", 0)])
def test_a_python_without_venv_does_not_count(machine, missing, code):
    run = f"import sys; sys.modules['{missing}'] = None; exec(sys.argv[1])"
    stub(machine, f"python{VERSION}", f'exec {sys.executable} -c "{run}" "$2"')
    assert call(machine, f"find_python {VERSION}").returncode == code


def test_no_python_is_one_clear_line(machine):
    for script in ("quickstart.sh", "test.sh"):
        done = bash(machine, str(TOOLS / script))
        assert done.returncode == 1 and done.stderr.startswith("error: no working Python 3.11, 3.12 or 3.13 found")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--python", "3.9"], "--python 3.9: choose one of 3.13 3.12 3.11"),
        (["--python"], "--python needs a version"),
    ],
)
@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_wrong_arguments(machine, script, arguments, message):
    done = bash(machine, str(TOOLS / script), *arguments)
    assert done.returncode == 1 and message in done.stderr


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_help(machine, script):
    done = bash(machine, str(TOOLS / script), "--help")
    assert done.returncode == 0 and done.stdout.startswith("Usage:") and not done.stderr
