"""The notebooks, executed as a reader would, cell by cell on a tiny model: only the parameter cell is another."""

from __future__ import annotations

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests import tiny_run

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
SMALL = {
    "data.max_length": 128,
    "data.max_segments": 8,
    "model.compute_dtype": "float32",
    "eval.max_new_tokens": 8,
    "eval.num_samples": 2,
}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(name: str, parameters: dict, tmp_path: Path) -> list[str]:
    """Runs every cell; the printed text of each code cell.

    Raises:
      CellExecutionError: with the traceback of the first cell that fails.
    """
    book = read(name)
    (cell,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    given = {line.split("=")[0].strip() for line in cell.source.splitlines()}
    assert set(parameters) <= given, "a parameter that the notebook doesn't have"
    cell.source += "\n" + "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    client = nbclient.NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute(env=tiny_run.environment())
    nbformat.write(book, tmp_path / f"{name}.ipynb")
    return [
        "".join(output.get("text", "") for output in cell.outputs) for cell in book.cells if cell.cell_type == "code"
    ]


@pytest.fixture
def job(tmp_path) -> dict:
    return {
        "MODEL": str(tiny_run.model(tmp_path / "model")),
        "TRAIN": str(tiny_run.conversations(tmp_path / "train.jsonl", 60)),
        "HELD_OUT": str(tiny_run.conversations(tmp_path / "held_out.jsonl", 12, seed=1)),
        "RUN_DIR": str(tmp_path / "run"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_committed_clean(name):
    """No outputs (they would go stale), one parameter cell, and code that a formatter would leave alone in width."""
    book = read(name)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert max(len(line) for cell in code for line in cell.source.splitlines()) <= 120
    assert not any(line.startswith(("!", "%")) for cell in code for line in cell.source.splitlines())


def test_quickstart(job, tmp_path):
    fields = {**SMALL, "train.max_steps": 12, "train.learning_rate": 3e-3, "eval.eval_steps": 6}
    printed = "\n".join(execute("quickstart", {**job, "FIELDS": fields}, tmp_path))
    assert "held-out loss" in printed and "before" in printed and "assistant" in printed
    assert (Path(job["RUN_DIR"]) / "report.html").exists()
    images = [
        output
        for cell in nbformat.read(tmp_path / "quickstart.ipynb", as_version=4).cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(images) == 1


def test_resume_and_convert(job, tmp_path):
    fields = {**SMALL, "train.max_steps": 200, "eval.eval_steps": 0, "checkpoint.save_steps": 20}
    printed = "\n".join(execute("resume_and_convert", {**job, "FIELDS": fields}, tmp_path))
    assert "killed after step" in printed and "steps 1 to 200, none twice and none missing" in printed
    config = json.loads((tmp_path / "run-hf" / "config.json").read_text())
    assert config["model_type"] == "llama"
