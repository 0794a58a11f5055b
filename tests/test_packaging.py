"""What pip installs: every file is there, every import is declared, and the extras are the promised ones."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Imported where they happen to be installed; a message says what is missing elsewhere.
WHERE_PRESENT = {"datasets"}
# Parts of a declared package that brings them along.
BROUGHT = {
    "absl": "absl-py",
    "etils": "orbax-checkpoint",
    "huggingface_hub": "transformers",
    "jaxlib": "jax",
    "markupsafe": "jinja2",
    "ml_dtypes": "jax",
}


def declared(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def top_level_imports(folder: Path) -> set[str]:
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"sftjax", "__future__"}


@pytest.mark.parametrize("folder", ["sftjax", "tools", "configs"])
def test_every_import_is_a_declared_dependency(folder):
    known = declared(PROJECT["dependencies"]).union(*(declared(lines) for lines in EXTRAS.values()))
    distributions = packages_distributions()
    undeclared = {
        name
        for name in top_level_imports(ROOT / folder) - WHERE_PRESENT
        if not known & {canonicalize_name(found) for found in [*distributions.get(name, [name]), BROUGHT.get(name, "")]}
    }
    assert not undeclared


def test_extras():
    promised = "cuda cuda12 cuda13 tpu kernels data eval serve wandb notebooks test parity"
    assert set(EXTRAS) >= set(promised.split())
    assert not declared(PROJECT["dependencies"]) & {"torch", "tensorflow", "peft", "accelerate"}
    assert "torch==2.13.0" in EXTRAS["parity"]


def test_upper_pins_have_a_reason_beside_them():
    for line in (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines():
        if line.strip().startswith('"') and any(sign in line.split("#")[0] for sign in ("==", "<", "~=")):
            assert "#" in line or "python_version" in line, line


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy, so that the checkout stays clean."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs setuptools 77 or later: install the extra `test`, as tools/test.sh does")
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "sftjax", folder / "source" / "sftjax", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(folder / "source")], check=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_has_every_file(wheel):
    ours = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "sftjax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert ours == {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_the_wheel_carries_its_licence(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith("LICENSE")]
    assert "the sftjax authors" in wheel.read(name).decode()
    (name,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    assert "License-Expression: Apache-2.0" in wheel.read(name).decode()
