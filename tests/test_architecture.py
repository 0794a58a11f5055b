"""The house rules that a reader relies on, read off the source: which way imports go, and what is never used."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Imports only go to a later line; names on one line don't import each other. (A package may import within itself.)
LAYERS = [
    {"main", "convert", "chat", "inference", "plan_scaling", "assess", "bench_data", "bench_loading"}
    | {"bench_preparing", "step_profile"},
    {"bench_methods", "config_file"},
    {"sweep"},
    {"train", "plan_search", "bench", "serve", "synth"},
    {"plan_fit"},
    {"plan"},
    {"job"},
    {"job_data", "chat", "finish", "inference"},
    {"run_evaluation"},
    {"doctor", "evaluate", "loading", "samples", "score", "runlog", "topology"},
    {"generate", "report", "costs", "divergence", "finished"},
    {"program"},
    {"step"},
    {"optim", "metrics", "checkpoint", "runs", "stopping", "weights"},
    {"optim8bit", "digest", "lock", "charts", "held_out", "hlo", "hardware", "distributed"},
    {"models"},
    {"peft"},
    {"kernels"},
    {"parallel"},
    {"compat"},
    {"tree"},
]
EVERYBODY = {"errors", "paths", "aliases", "arguments", "phases", "utils"}
# each with the wings it may use beside numpy, Grain and the tokenizer
WINGS = {"data": set(), "curate": {"data"}, "scorers": {"data", "curate"}}
USE_WINGS = set().union(*LAYERS[:10])
# the others take plain arguments
USE_CONFIG = {
    "main",
    "config_file",
    "sweep",
    "train",
    "job",
    "job_data",
    "plan",
    "plan_search",
    "plan_fit",
    "plan_scaling",
    "step_profile",
    "bench",
    "finish",
    "convert",
}
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

BANNED_MODULES = {
    "pickle": "runs code from the file it reads",
    "marshal": "runs code from the file it reads",
    "shelve": "is pickle",
    "dill": "is pickle",
    "cloudpickle": "is pickle",
    "torch": "is no dependency",
    "tensorflow": "is no dependency",
}
BANNED_CALLS = {"eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
# A forked child inherits the locks of threads that it doesn't have; JAX has many. (sftjax/data/processes.py spawns.)
FORKS = {"os.fork", "multiprocessing.Process", "multiprocessing.Pool", "multiprocessing.get_context('fork')"}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """Full names of what is imported, at any depth: `from sftjax import tree` is sftjax.tree."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def unit(path: Path) -> str:
    """The name in LAYERS that a file belongs to: its package, or the module right under sftjax."""
    return path.relative_to(ROOT / "sftjax").with_suffix("").parts[0]


def why_not(importer: str, target: str) -> str | None:
    """What is wrong with `importer` using `target`; None when it is fine."""
    if target == importer or target in EVERYBODY:
        return None
    if importer in EVERYBODY or importer == "config":
        return f"may import nothing but {' and '.join(sorted(EVERYBODY))}"
    if importer in WINGS:
        return None if target in WINGS[importer] else "is a wing of its own"
    if target in WINGS:
        return None if importer in USE_WINGS else "is below the layers that see data"
    if target == "config":
        return None if importer in USE_CONFIG else "takes plain arguments, not the config"
    if importer not in RANK or target not in RANK:
        return f"or {target} has no place in LAYERS yet: give it one"
    return None if RANK[importer] < RANK[target] else "is not above it"


def test_imports_go_right():
    problems = [
        f"{path.relative_to(ROOT)} imports {target}, but {reason}"
        for path in sources("sftjax")
        if path != ROOT / "sftjax" / "__init__.py"
        for target in sorted({name.split(".")[1] for name in imported(parse(path)) if name.startswith("sftjax.")})
        if (reason := why_not(unit(path), target))
    ]
    assert not problems, problems


def test_the_rule_itself_refuses_what_it_should():
    assert why_not("models", "kernels") is None
    assert why_not("kernels", "models") == "is not above it"
    assert why_not("optim", "metrics") == "is not above it"
    assert why_not("models", "data") == "is below the layers that see data"
    assert why_not("data", "tree") == "is a wing of its own"
    assert why_not("step", "config") == "takes plain arguments, not the config"
    assert "no place in LAYERS" in why_not("newcomer", "tree")


def test_the_wings_know_no_jax():
    """Worker processes would start a backend of their own, and on an accelerator find it taken."""
    for path in sources(*(f"sftjax/{wing}" for wing in WINGS)):
        roots = {name.split(".")[0] for name in imported(parse(path))}
        assert not roots & {"jax", "jaxlib", "flax", "optax", "orbax"}, path


def test_only_compat_asks_for_the_version_of_jax():
    asking = [
        unit(path)
        for path in sources("sftjax")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("jax.__version__", "jax.__version_info__")
    ]
    assert set(asking) <= {"compat"}


def unsafe_or_heavy(tree: ast.AST) -> list[str]:
    problems = []
    for name in imported(tree):
        if reason := BANNED_MODULES.get(name.split(".")[0]):
            problems.append(f"imports {name}, which {reason}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if ast.unparse(node.func) in BANNED_CALLS | FORKS or ast.unparse(node) in FORKS:
            problems.append(f"line {node.lineno}: {ast.unparse(node.func)}()")
        for keyword in node.keywords:
            if keyword.arg in ("allow_pickle", "shell", "trust_remote_code") and ast.unparse(keyword.value) != "False":
                problems.append(f"line {node.lineno}: {ast.unparse(keyword)}")
    return problems


def test_nothing_unsafe_and_nothing_heavy():
    found = {
        str(path.relative_to(ROOT)): problems
        for path in sources("sftjax", "tools", "configs")
        if (problems := unsafe_or_heavy(parse(path)))
    }
    assert not found
    assert len(unsafe_or_heavy(ast.parse("import torch.nn, pickle\neval(x)\nload(x, allow_pickle=True)"))) == 4
    assert len(unsafe_or_heavy(ast.parse("os.fork()\nmultiprocessing.get_context('fork').Pool()"))) == 2


def test_tools_are_run_as_programs():
    """Each answers --help, ends with an exit code, and can be imported without doing anything."""
    for path in sources("tools"):
        body = parse(path).body
        assert isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant), f"{path}: no docstring"
        assert isinstance(body[-1], ast.If) and "__main__" in ast.unparse(body[-1].test), path
        assert "exit_with_message" in ast.unparse(body[-1]), path


def test_slow_tests_that_are_listed_exist():
    lines = [line for line in (ROOT / "tests" / "slow.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(set(lines))
    for line in lines:
        file, name = line.split("[")[0].split("::")
        assert any(isinstance(node, ast.FunctionDef) and node.name == name for node in parse(ROOT / file).body), line
