"""Choices of data beside each other: what is trained on what, once each, and the table."""

import json

import jax
import pytest

from sftjax import bench_data
from tests import tiny_run


@pytest.fixture
def place(tmp_path, monkeypatch):
    jax.devices()  # this process has its eight before the runs get one
    monkeypatch.setenv("XLA_FLAGS", "")
    model = tiny_run.model(tmp_path / "model")
    tiny_run.conversations(tmp_path / "chats.jsonl")
    tiny_run.conversations(tmp_path / "held_out.jsonl", count=8, seed=1)
    settings = bench_data.settings(model=str(model), steps=2, max_length=128, eval_rows=4)
    names = {"data": "chats.jsonl", "held_out": "held_out.jsonl", "folder": "runs"}
    return {**{key: str(tmp_path / name) for key, name in names.items()}, "seeds": [0, 1], "settings": settings}


def test_curation_is_compared_with_everything_and_with_chance(place, tmp_path):
    pytest.importorskip("rensa", reason="curation needs the extra `data`: xxhash and rensa")
    with open(place["data"], "a") as file:  # rows that no rule lets pass
        for number in range(6):
            answer = {"role": "assistant", "content": ""}
            file.write(json.dumps({"messages": [{"role": "user", "content": f"{number}?"}, answer]}) + "\n")
    said = []
    results = bench_data.curated(**place, say=said.append)
    assert [(r.variant, r.seed) for r in results][:4] == [("all", 0), ("curated", 0), ("random", 0), ("all", 1)]
    whole, kept, chance = (r.rows for r in results[:3])
    assert whole == 66 and kept == chance <= 60 and len(said) == 6
    chosen = [(tmp_path / "runs" / f"random-{seed}.jsonl").read_text().splitlines() for seed in (0, 1)]
    assert len(chosen[0]) == chance and chosen[0] != chosen[1]
    assert bench_data.curated(**place, say=said.append) == results


def test_replay_is_measured_on_text_that_is_not_replayed(place, tmp_path):
    texts = [" ".join(tiny_run.WORDS[(3 * row + i) % len(tiny_run.WORDS)] for i in range(20)) for row in range(20)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    place |= {"seeds": [0], "text": str(tmp_path / "text.jsonl"), "shares": [0.0, 0.3]}
    results = bench_data.replayed(**place, say=lambda line: None)
    parts = [set((tmp_path / "runs" / f"{name}.jsonl").read_text().splitlines()) for name in ("replay", "plain")]
    assert len(parts[0]) == len(parts[1]) == 10 and not parts[0] & parts[1]
    assert [r.variant for r in results] == ["replay 0%", "replay 30%"]
    assert results[0].before == results[1].before and results[0].losses != results[1].losses
    lines = bench_data.table(results).splitlines()
    assert lines[2].startswith(f"| nothing | {results[0].before['eval_loss']:.4f} |") and len(lines) == 5
    difference = results[1].losses["plain_text_loss"] - results[0].losses["plain_text_loss"]
    assert lines[4].endswith(f"| {difference:+.4f} |")
