"""Executes a notebook in an empty folder, with nothing there but its kernel: notebook.py NOTEBOOK REPOSITORY FOLDER

Only two things are another than on its page: the address that it is cloned from, and what is trained (a tiny model).
"""

import json
import sys
from pathlib import Path

import nbclient
import nbformat

notebook, repository, folder = Path(sys.argv[1]), Path(sys.argv[2]).resolve(), Path(sys.argv[3])
small = {"data.max_length": 128, "data.max_segments": 8, "eval.max_new_tokens": 8, "eval.num_samples": 2}
# The one that is killed needs steps enough to be killed between.
steps = {"train.max_steps": 200, "checkpoint.save_steps": 20} if "resume" in notebook.stem else {"train.max_steps": 4}
parameters = {
    "MODEL": "../../models/tiny",
    "TRAIN": "../../chats.jsonl",
    "HELD_OUT": "../../held_out.jsonl",
    "FIELDS": {**small, **steps, "eval.eval_steps": 0},
}
folder.mkdir()
book = nbformat.read(notebook, as_version=4)
for cell in book.cells:
    if "repository" in cell.metadata.get("tags", []):
        cell.source = f"REPOSITORY = {str(repository)!r}"
    if "parameters" in cell.metadata.get("tags", []):
        cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
nbclient.NotebookClient(
    book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
).execute()
print(json.dumps([cell.get("outputs", []) for cell in book.cells if cell.cell_type == "code"])[-2000:])
