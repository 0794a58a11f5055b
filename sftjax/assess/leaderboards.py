"""Answers in the files that other evaluations read: AlpacaEval's model outputs, MT-Bench's model answers (FastChat)."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence

import orjson

from sftjax.assess.items import Item
from sftjax.generate.answer import Output
from sftjax.utils import storage


def write_alpaca_eval(path: str, items: Sequence[Item], outputs: Sequence[Sequence[Output]], *, generator: str) -> None:
    """A JSON list of {"instruction", "output", "generator", "dataset"}: `alpaca_eval --model_outputs PATH`."""
    name = os.path.basename(generator)
    rows = [
        {
            "instruction": item.instruction,
            "output": turns[-1].text,
            "generator": name,
            "dataset": str(item.row.get("dataset") or item.source),
        }
        for item, turns in zip(items, outputs, strict=True)
    ]
    with storage.whole_file(path) as file:
        file.write(json.dumps(rows, indent=2, ensure_ascii=False).encode() + b"\n")


def write_mt_bench(path: str, items: Sequence[Item], outputs: Sequence[Sequence[Output]], *, model: str) -> None:
    """JSONL for FastChat's data/mt_bench/model_answer/NAME.jsonl, by question_id; rows without one are left out."""
    name, now = os.path.basename(model), time.time()
    asked = [(item, turns) for item, turns in zip(items, outputs, strict=True) if "question_id" in item.row]
    with storage.whole_file(path) as file:
        for item, turns in sorted(asked, key=lambda pair: pair[0].row["question_id"]):
            number = item.row["question_id"]
            line = {
                "question_id": number,
                "answer_id": hashlib.sha256(f"{name} {number}".encode()).hexdigest()[:22],
                "model_id": name,
                "choices": [{"index": 0, "turns": [turn.text for turn in turns]}],
                "tstamp": now,
            }
            file.write(orjson.dumps(line) + b"\n")
