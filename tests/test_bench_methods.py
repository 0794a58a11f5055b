"""Methods side by side: each run is made once, and the table tells what it measured."""

import jax
import pytest

from sftjax import bench_methods
from sftjax.errors import ConfigError
from tests import tiny_run


def test_a_method_is_run_once_and_told(tmp_path, monkeypatch):
    jax.devices()  # this process has its eight before the runs get one
    monkeypatch.setenv("XLA_FLAGS", "")
    model, data = tiny_run.model(tmp_path / "model"), tiny_run.conversations(tmp_path / "chats.jsonl")
    job = {
        "model": str(model),
        "data": str(data),
        "held_out": str(data),
        "folder": str(tmp_path / "runs"),
        "methods": ["lora"],
        "steps": 2,
        "max_length": 128,
        "eval_rows": 4,
    }
    said = []
    (result,) = bench_methods.compare(**job, say=said.append)
    assert result.loss_after != result.loss_before and said
    assert result.state_bytes == pytest.approx(8 * result.trainable, abs=64)  # two float32 moments, and a counter
    assert 0 < result.frozen_bytes <= 4 * 178_496 and result.tokens_per_second > 0
    before = (tmp_path / "runs" / "lora-0" / "metrics.jsonl").stat().st_mtime_ns
    assert bench_methods.compare(**job) == [result]
    assert (tmp_path / "runs" / "lora-0" / "metrics.jsonl").stat().st_mtime_ns == before
    (_, _, row) = bench_methods.table([result]).splitlines()
    assert row.startswith(f"| lora | {result.loss_before:.4f} → {result.loss_after:.4f} |")
    with pytest.raises(ConfigError, match="unknown method 'lorra'"):
        bench_methods.compare(**{**job, "methods": ["lorra"]})
