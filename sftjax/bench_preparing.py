"""How fast conversations become packed rows: rendered, tokenised, masked and packed, beside a peer's preparation."""

from __future__ import annotations

import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from sftjax import bench, loading
from sftjax.data import pipeline
from sftjax.data.encode import RowEncoder
from sftjax.data.mixture import Ingredient, Mixture
from sftjax.data.sources import open_source


def preparation(*, model: str, data: str, max_length: int, workers: int) -> dict[str, Any]:
    """Every conversation once, through the pipeline that training reads from; from opening the file to the last row."""
    tokenizer = loading.open_model(model).tokenizer
    begun = time.monotonic()
    source = open_source({"path": data})
    mixture = Mixture([Ingredient(source, RowEncoder(tokenizer))], epochs=1)
    rows = 8
    with pipeline.build(mixture, length=max_length, batch_size=rows, workers=workers) as batches:
        infos = [item.info for item in batches]
    return _figures(
        seconds=time.monotonic() - begun,
        tokens=sum(info.real_tokens for info in infos),
        slots=sum(info.real_tokens + info.padding_tokens for info in infos),
        conversations=len(source),
    )


def peer(*, python: str, masks: bool, model: str, data: str, max_length: int, workers: int) -> dict[str, Any]:
    """The same by TRL's SFTTrainer, in the Python that has it: what it does with a dataset before the first step."""
    line = [python, str(bench.ROOT / "tests" / "parity" / "peer_prepare.py"), "--model", model, "--data", data]
    line += ["--max_length", str(max_length), "--workers", str(workers or 2), *["--masks"] * masks]
    output, _ = bench.run(line)
    return _figures(**json.loads(output.strip().splitlines()[-1]))


def compare(*, peer_python: str, peer_masks: bool, repeats: int, copies: int, **settings: Any) -> dict[str, Any]:
    """`preparation` and the peer in turn, on `copies` of the data."""
    with tempfile.TemporaryDirectory(prefix="sftjax-bench-") as folder:
        if copies > 1:
            lines = Path(settings["data"]).read_bytes()
            settings["data"] = f"{folder}/chats.jsonl"
            Path(settings["data"]).write_bytes((lines if lines.endswith(b"\n") else lines + b"\n") * copies)
        programs = {"sftjax": functools.partial(preparation, **settings)}
        if peer_python:
            programs["trl"] = functools.partial(peer, python=peer_python, masks=peer_masks, **settings)
        return bench.in_turn(programs, repeats, settings, ("tokens_per_second", "seconds", "filled"))


def _figures(*, seconds: float, tokens: int, slots: int, conversations: int) -> dict[str, Any]:
    return {
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "tokens": tokens,
        "filled": tokens / slots,
        "conversations": conversations,
    }
