"""What a run tells while it goes: files that other programs read, a line for people, and how fast it is.

`metrics.jsonl` holds what the run computed and nothing else, so that two runs can be compared byte for byte;
`timing.jsonl` holds what the clock said. Names are those of other SFT tools: loss, grad_norm, learning_rate, epoch,
num_tokens, mean_token_accuracy; of an evaluation the same behind `eval_`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple, TextIO

import fsspec

from sftjax.utils import storage

# --- files ------------------------------------------------------------------------------------------------------------


class LineFile:
    """A JSONL file that grows. Objects in a bucket can't be appended to, so there the whole is written again,
    at most every `remote_interval` seconds.

    Attributes:
      count: lines that it has.

    Raises:
      StorageError: it can't be opened or written.
    """

    def __init__(self, path: str, *, remote_interval: float = 30.0):
        self._path, self._interval = path, remote_interval
        self._lines: list[str] = []
        self._written = -math.inf
        self._file: BinaryIO | None = None
        self.count = 0
        try:
            if not storage.is_remote(path):
                # Unbuffered: after an error there is nothing left that closing would try to write again.
                self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
                if os.path.isfile(path):  # and no device
                    with open(path, "rb") as file:
                        self.count = sum(1 for _ in file)
            elif (found := fsspec.core.url_to_fs(path))[0].exists(found[1]):
                with fsspec.open(path, "r", encoding="utf-8") as file:
                    self._lines = file.read().splitlines(keepends=True)
                self.count = len(self._lines)
        except OSError as error:
            raise storage.failure(path, error) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line; numbers exactly, non-finite ones as null (JSON has no others)."""
        line = json.dumps(_plain(record), allow_nan=False) + "\n"
        self.count += 1
        if self._file is None:
            self._lines.append(line)
            if time.monotonic() - self._written >= self._interval:
                self.flush()
            return
        try:
            content = line.encode()
            while content:  # a disk that is nearly full takes a part, and refuses the rest
                content = content[self._file.write(content) :]
        except OSError as error:
            raise storage.failure(self._path, error) from error

    def flush(self) -> None:
        """Makes sure that what was written survives the machine. Before a checkpoint: its lines belong to it."""
        if self._file is not None:
            storage.fsync(self._path)
        elif self._lines:
            storage.write_text(self._path, "".join(self._lines))
            self._written = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


def _plain(value: Any) -> Any:
    """JSON's own types; arrays and numpy scalars become numbers, NaN and infinities null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = value.item() if hasattr(value, "item") else value
    return None if isinstance(number, float) and not math.isfinite(number) else number


class _TensorBoard:
    """Scalars, written by this thread: tensorboardX's own writer blocks for ever once its thread has met an error."""

    def __init__(self, folder: str, continued_from: int | None):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        os.makedirs(folder, exist_ok=True)
        self._events = EventsWriter(os.path.join(folder, "events"))
        if continued_from is not None:  # what an interrupted run wrote beyond this step isn't shown
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._events.write_event(event_pb2.Event(wall_time=time.time(), step=continued_from + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2

        scalars = [summary_pb2.Summary.Value(tag=_tag(name), simple_value=value) for name, value in values.items()]
        summary = summary_pb2.Summary(value=scalars)
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
        self._events.flush()

    def close(self) -> None:
        self._events.close()


def _tag(name: str) -> str:
    """As Hugging Face names them there: train/loss, eval/loss."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


class _WandB:
    def __init__(self, project: str, folder: str, config: Mapping[str, Any]):
        import wandb

        # The run's id is its folder's name, so that a resumed run goes on in the same charts.
        name = os.path.basename(folder)
        self._run = wandb.init(project=project, name=name, id=name, resume="allow", dir=folder, config=dict(config))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({_tag(name): value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class MetricsLog:
    """Writes metrics to `metrics.jsonl` and `timing.jsonl`, and on request to TensorBoard and Weights & Biases.

    The two files are the run's record, and failing to write them is an error. The others are a convenience: one that
    fails is named once and left out from then on.

    Args:
      folder: the run's folder (cut back to the checkpoint already, if this is a continuation).
      tensorboard: also write `tb/` (local folders only).
      wandb_project: also log there, if not empty; needs the package.
      continued_from: the step of the checkpoint, in a run that goes on.
      config: what W&B shows as the configuration; to be free of secrets.
      warn: where a warning goes.
    """

    def __init__(
        self,
        folder: str,
        *,
        tensorboard: bool = True,
        wandb_project: str = "",
        continued_from: int | None = None,
        config: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    ):
        self._warn = warn
        self._metrics = LineFile(f"{folder}/metrics.jsonl")
        self._timing = LineFile(f"{folder}/timing.jsonl")
        self._extras: dict[str, Any] = {}
        if tensorboard and "://" not in folder:
            self._begin("TensorBoard", lambda: _TensorBoard(f"{folder}/tb", continued_from))
        if wandb_project:
            self._begin("W&B", lambda: _WandB(wandb_project, folder, config or {}))

    def log(self, step: int, values: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
        """One line of metrics of `step`, and one of timing if given. Order and names of `values` are kept."""
        values = _plain(values)
        self._metrics.write({"step": int(step), **values})
        timing = _plain(timing or {})
        if timing:
            self._timing.write({"step": int(step), "time": round(time.time(), 3), **timing})
        numbers = {k: v for k, v in {**values, **timing}.items() if isinstance(v, int | float)}
        for name in list(self._extras):
            self._try(name, lambda writer: writer.write(int(step), numbers))

    def flush(self) -> None:
        """To be called before a checkpoint is saved: what is logged up to its step must not be lost later."""
        self._metrics.flush()
        self._timing.flush()

    def counts(self) -> dict[str, int]:
        """How many lines each file has."""
        return {"metrics.jsonl": self._metrics.count, "timing.jsonl": self._timing.count}

    def close(self) -> None:
        self._metrics.close()
        self._timing.close()
        for name in list(self._extras):
            self._try(name, lambda writer: writer.close())

    def _begin(self, name: str, make: Callable[[], Any]) -> None:
        try:
            self._extras[name] = make()
        except Exception as error:  # whatever a third party raises, training matters more
            self._warn(f"warning: {name} is left out ({_line(error)})")

    def _try(self, name: str, action: Callable[[Any], None]) -> None:
        try:
            action(self._extras[name])
        except Exception as error:
            with contextlib.suppress(Exception):
                self._extras.pop(name).close()
            self._warn(f"warning: {name} failed ({_line(error)}); the run goes on without it")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- speed ------------------------------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """Over the last steps: seconds for one, and tokens per second of each kind. NaN before there is a figure."""

    step_seconds: float
    tokens_per_second: float  # real ones: neither padding nor counted twice
    trained_tokens_per_second: float  # those with a loss
    padded_tokens_per_second: float  # all that went through the model, padding too
    waiting_share: float = 0.0  # of the time, waiting for data with nothing left to compute

    def timing(self) -> dict[str, float]:
        """For `MetricsLog.log`."""
        return {} if math.isnan(self.step_seconds) else {name: round(v, 4) for name, v in self._asdict().items()}


class Throughput:
    """Tokens per second between finished steps, without the first step (it compiles) and without pauses.

        throughput = Throughput()
        throughput.start()
        for ...:
            ...                                     # its metrics are here: the step is finished
            throughput.step(real=..., trained=..., padded=...)
            with throughput.pause(): evaluate()
            throughput.waited(seconds)              # of the next step, for its data

    Args:
      window: how many steps `rates` looks back.
      clock: seconds that never go back.
    """

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._recent: deque[tuple[float, int, int, int, float]] = deque(maxlen=window)
        self._total = [0.0, 0, 0, 0, 0.0]
        self._waited = 0.0
        self._steps = 0
        self._last: float | None = None
        self._first = True

    def start(self) -> None:
        """The clock of the first step runs from here."""
        self._last = self._clock()

    def step(self, *, real: int, trained: int, padded: int) -> None:
        """A step is finished: tokens that were real, that had a loss, and all with padding."""
        now = self._clock()
        seconds = now - (self._last if self._last is not None else now)
        self._last = now
        waited, self._waited = self._waited, 0.0
        if self._first:
            self._first = False
            return
        counts = (seconds, int(real), int(trained), int(padded), waited)
        self._recent.append(counts)
        self._total = [a + b for a, b in zip(self._total, counts, strict=True)]
        self._steps += 1

    def waited(self, seconds: float) -> None:
        """So long the device had nothing to do because the next batch wasn't there."""
        self._waited += seconds

    def pause(self) -> _Pause:
        """A context whose time counts for no step."""
        return _Pause(self)

    @property
    def rates(self) -> Rates:
        """Over the last steps."""
        return _rates([sum(column) for column in zip(*self._recent, strict=True)], len(self._recent))

    @property
    def overall(self) -> Rates:
        """Over all steps but the first."""
        return _rates(self._total, self._steps)


class _Pause:
    def __init__(self, throughput: Throughput):
        self._throughput = throughput

    def __enter__(self) -> None:
        self._begun = self._throughput._clock()

    def __exit__(self, *_) -> None:
        if self._throughput._last is not None:
            self._throughput._last += self._throughput._clock() - self._begun


def _rates(sums: Iterable[float], steps: int) -> Rates:
    sums = list(sums)
    if not steps or sums[0] <= 0:
        return Rates(math.nan, math.nan, math.nan, math.nan)
    seconds, real, trained, padded, waited = sums
    return Rates(seconds / steps, real / seconds, trained / seconds, padded / seconds, waited / seconds)


# --- work -------------------------------------------------------------------------------------------------------------

# Peak dense bf16 FLOP/s of one device, by JAX's `device_kind` (data sheets; a TPU device is a chip from v4 on).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153e12,  # a device is one of the chip's two cores
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def model_flops(
    *, matmul_params: int, tokens: int, layers: int, width: int, squared_lengths: int, frozen_base: bool = False
) -> float:
    """Floating-point operations that the model's definition needs for a forward and backward pass.

    6 N per token (4 N where the base is frozen: no weight gradients), and causal attention with
    6 layers width l per token of a sequence of length l, that is 6 layers width Σl². Recomputation doesn't count.

    Args:
      matmul_params: N, parameters that multiply activations (the output head too, looked-up embeddings not).
      tokens: real tokens.
      width: heads x head size.
      squared_lengths: Σl² over the packed sequences.
    """
    return (4 if frozen_base else 6) * matmul_params * tokens + 6 * layers * width * squared_lengths


def mfu(flops: float, seconds: float, device_kind: str, devices: int = 1) -> float | None:
    """Model FLOP/s over the devices' peak; None where the peak isn't known (CPUs)."""
    peak = PEAK_FLOPS.get(device_kind)
    return flops / (seconds * peak * devices) if peak and seconds > 0 else None


# --- the line ---------------------------------------------------------------------------------------------------------


class ProgressLine:
    """One line that people watch: rewritten in place on a terminal, printed now and then elsewhere.

        step 12/300  loss 2.31  lr 1.9e-05  tokens/s 512 (trained 300)  ETA 4:31

    Args:
      total_steps: of the whole run.
      stream: stderr by default.
      interval: least seconds between two printed lines where the stream isn't a terminal.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        stream: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._interval, self._clock = total_steps, interval, clock
        self._stream = stream or sys.stderr
        self._terminal = bool(getattr(self._stream, "isatty", lambda: False)()) and os.environ.get("TERM") != "dumb"
        self._printed = -math.inf
        self._width = 0

    def update(self, step: int, loss: float, learning_rate: float, rates: Rates) -> None:
        """Shows the state after `step`; the first and the last are always shown."""
        text = progress_text(step, self._total, loss, learning_rate, rates)
        if self._terminal:
            self._put("\r" + text.ljust(self._width))
            self._width = len(text)
            return
        now = self._clock()
        if now - self._printed >= self._interval or step >= self._total:
            self._printed = now
            self._put(text + "\n")

    def note(self, text: str) -> None:
        """A line of its own, above the progress line on a terminal."""
        self._put(("\r" + text.ljust(self._width) if self._terminal else text) + "\n")

    def close(self) -> None:
        """Leaves the last state standing."""
        if self._terminal and self._width:
            self._put("\n")
            self._width = 0

    def _put(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # a closed terminal is no reason to stop
            pass


def progress_text(step: int, total: int, loss: float, learning_rate: float, rates: Rates) -> str:
    """The progress line; see `ProgressLine`."""
    known = not math.isnan(rates.step_seconds)
    speed = f"{_count(rates.tokens_per_second)} (trained {_count(rates.trained_tokens_per_second)})" if known else "…"
    eta = clock_text((total - step) * rates.step_seconds) if known else "…"
    return f"step {step}/{total}  loss {loss:.4g}  lr {learning_rate:.2g}  tokens/s {speed}  ETA {eta}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def clock_text(seconds: float) -> str:
    """4:31, or 1:04:31, or 2d 3:04:31."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{minutes:02d}:{rest:02d}" if hours or days else f"{minutes}:{rest:02d}"
    return f"{days}d {text}" if days else text
