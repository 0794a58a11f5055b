"""Metrics: exact and repeatable lines, rates without the compile step, writers that may fail."""

import io
import json
import math
import os

import fsspec
import numpy as np
import pytest

from sftjax import metrics as metrics_lib
from sftjax.errors import StorageError
from sftjax.metrics import (
    LineFile,
    MetricsLog,
    ProgressLine,
    Rates,
    Throughput,
    clock_text,
    mfu,
    model_flops,
    progress_text,
)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_have_no_clock_in_them_and_floats_are_exact(tmp_path):
    loss = np.float32(2.31)
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        log = MetricsLog(str(folder), tensorboard=False)
        log.log(1, {"loss": loss, "epoch": 0.1, "num_tokens": np.int64(512)}, {"tokens_per_second": 10.0})
        log.log(1, {"eval_loss": 0.1 + 0.2})
        log.close()
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()
    first, second = lines(tmp_path / "a" / "metrics.jsonl")
    assert first == {"step": 1, "loss": float(loss), "epoch": 0.1, "num_tokens": 512}
    assert second["eval_loss"] == 0.1 + 0.2
    assert [sorted(line) for line in lines(tmp_path / "a" / "timing.jsonl")] == [["step", "time", "tokens_per_second"]]


def test_non_finite_figures_are_null_in_strict_json(tmp_path):
    log = MetricsLog(str(tmp_path), tensorboard=False)
    log.log(1, {"loss": math.nan, "grad_norm": np.float32("inf"), "sources": {"a": math.nan}})
    log.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "grad_norm": None, "sources": {"a": None}}]


def test_continuing_appends(tmp_path):
    for step in (1, 2):
        log = MetricsLog(str(tmp_path), tensorboard=False)
        log.log(step, {"loss": 1.0})
        log.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_remote_lines_are_rewritten_as_a_whole():
    path = "memory://metrics-bucket/metrics.jsonl"
    for step in (1, 2):
        file = LineFile(path)
        file.write({"step": step})
        file.close()
    with fsspec.open(path, "r") as file:
        assert file.read() == '{"step": 1}\n{"step": 2}\n'


def test_tensorboard_holds_the_same_figures(tmp_path):
    log = MetricsLog(str(tmp_path))
    log.log(3, {"loss": 2.5, "eval_loss": 2.0})
    log.close()
    (path,) = (tmp_path / "tb").iterdir()
    found = {}
    for event in read_events(path):
        for value in event.summary.value:
            found[value.tag] = (event.step, value.simple_value)
    assert found == {"train/loss": (3, 2.5), "eval/loss": (3, 2.0)}


def test_continued_tensorboard_hides_what_came_after_the_checkpoint(tmp_path):
    MetricsLog(str(tmp_path), continued_from=7).close()
    (path,) = (tmp_path / "tb").iterdir()
    assert [event.step for event in read_events(path) if event.HasField("session_log")] == [8]


def read_events(path):
    """TFRecord: length u64, crc u32, data, crc u32."""
    from tensorboardX.proto import event_pb2

    raw, at = path.read_bytes(), 0
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 8], "little")
        yield event_pb2.Event.FromString(raw[at + 12 : at + 12 + size])
        at += 16 + size


def test_tensorboard_that_cannot_be_written_is_named_once_and_left_out(tmp_path):
    (tmp_path / "tb").write_text("a file in the way")
    warnings = []
    log = MetricsLog(str(tmp_path), warn=warnings.append)
    log.log(1, {"loss": 1.0})
    log.log(2, {"loss": 1.0})
    log.close()
    assert len(warnings) == 1 and "TensorBoard" in warnings[0] and len(lines(tmp_path / "metrics.jsonl")) == 2


def test_writer_that_fails_later_is_named_once_and_left_out(tmp_path):
    warnings = []
    log = MetricsLog(str(tmp_path), warn=warnings.append)

    def full(*_):
        raise OSError(28, "No space left on device")

    log._extras["TensorBoard"].write = full
    for step in range(30):
        log.log(step, {"loss": 1.0})
    log.close()
    assert len(warnings) == 1 and "No space" in warnings[0] and len(lines(tmp_path / "metrics.jsonl")) == 30


def test_wandb_missing_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    warnings = []
    MetricsLog(str(tmp_path), tensorboard=False, wandb_project="x", warn=warnings.append).close()
    assert len(warnings) == 1 and "W&B" in warnings[0]


def test_metrics_file_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"metrics\.jsonl"):
        MetricsLog(str(tmp_path))
    if os.path.exists("/dev/full"):
        os.symlink("/dev/full", tmp_path / "full")
        file = LineFile(str(tmp_path / "full"))
        with pytest.raises(StorageError, match="No space"):
            file.write({"step": 1})
        file.close()


# --- rates ------------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_rates_leave_out_the_compile_step_and_pauses():
    #  start  compile 50 s | step 2 s | eval 30 s, step 2 s |
    clock = Clock()
    throughput = Throughput(clock=clock)
    throughput.start()
    assert math.isnan(throughput.rates.tokens_per_second) and throughput.rates.timing() == {}
    clock.now += 50
    throughput.step(real=100, trained=40, padded=128)
    clock.now += 2
    throughput.step(real=100, trained=40, padded=128)
    with throughput.pause():
        clock.now += 30
    clock.now += 2
    throughput.step(real=60, trained=20, padded=128)
    assert throughput.rates == throughput.overall == Rates(2.0, 40.0, 15.0, 64.0)
    assert throughput.rates.timing()["tokens_per_second"] == 40.0


def test_rates_look_back_a_window():
    clock = Clock()
    throughput = Throughput(window=2, clock=clock)
    throughput.start()
    for seconds in (9, 1, 4, 4):
        clock.now += seconds
        throughput.step(real=8, trained=4, padded=8)
    assert throughput.rates.step_seconds == 4.0 and throughput.overall.step_seconds == 3.0


def test_model_flops_by_hand():
    # two sequences of 3 and 5 tokens, one layer of width 4, ten parameters
    assert model_flops(matmul_params=10, tokens=8, layers=1, width=4, squared_lengths=34) == 6 * 80 + 6 * 4 * 34
    lora = model_flops(matmul_params=10, tokens=8, layers=1, width=4, squared_lengths=34, frozen_base=True)
    assert lora == 4 * 80 + 6 * 4 * 34
    assert mfu(197e12, 2.0, "TPU v5 lite", 4) == 0.125
    assert mfu(1e12, 1.0, "cpu") is None


# --- the line ---------------------------------------------------------------------------------------------------------


def test_progress_text():
    rates = Rates(271 / 288, 512.3, 300.2, 600.0)
    text = progress_text(12, 300, 2.31, 1.9e-5, rates)
    assert text == "step 12/300  loss 2.31  lr 1.9e-05  tokens/s 512 (trained 300)  ETA 4:31"
    unknown = metrics_lib._rates([0, 0, 0, 0], 0)
    assert progress_text(1, 300, 2.31, 0.0, unknown).endswith("tokens/s …  ETA …")


def test_plain_lines_come_now_and_then_and_at_the_end():
    clock, stream = Clock(), io.StringIO()
    line = ProgressLine(100, stream=stream, interval=10, clock=clock)
    for step in range(1, 101):
        clock.now += 1
        line.update(step, 1.0, 1e-4, Rates(1.0, 100.0, 50.0, 128.0))
    shown = [int(text.split()[1].split("/")[0]) for text in stream.getvalue().splitlines()]
    assert shown == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]


def test_terminal_line_is_rewritten_and_notes_stand_above(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    stream.isatty = lambda: True
    line = ProgressLine(2, stream=stream)
    rates = Rates(1.0, 100.0, 50.0, 128.0)
    line.update(1, 1.2345678, 1e-4, rates)
    line.note("saved")
    line.update(2, 1.0, 0.0, rates)
    line.close()
    first, second = stream.getvalue().split("\n")[:2]
    assert first.startswith("\rstep 1/2") and first.split("\r")[2].startswith("saved ")
    assert second.startswith("\rstep 2/2") and stream.getvalue().endswith("\n")


def test_clock_text():
    assert [clock_text(seconds) for seconds in (0, 59.6, 271, 3871, 190000)] == [
        "0:00",
        "1:00",
        "4:31",
        "1:04:31",
        "2d 4:46:40",
    ]
