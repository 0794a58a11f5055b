"""Rules about how a run goes: steady, without waste, at a usual pace."""

from __future__ import annotations

import math
import statistics

from sftjax.charts import number
from sftjax.doctor.figures import Figures, Verdict


def gradient_spikes(run: Figures) -> Verdict:
    """Gradients of ten times the usual norm, in two steps and one of a hundred, after the first tenth of the run."""
    norms = [(line["step"], line["grad_norm"]) for line in run.train if line.get("grad_norm") is not None]
    norms = norms[len(norms) // 10 :]
    if len(norms) < 20:
        return None
    usual = statistics.median(norm for _, norm in norms)
    spikes = [(step, norm) for step, norm in norms if norm > 10 * usual]
    if len(spikes) < max(2, 0.01 * len(norms)):
        return None
    step, norm = max(spikes, key=lambda spike: spike[1])
    clip = run.setting("train.max_grad_norm") or 0.0
    clip = f"train.max_grad_norm={_short(2 * usual)}, " if not clip or clip > 4 * usual else ""
    return (
        f"{len(spikes)} of {len(norms)} steps had a gradient over ten times the usual norm of {number(usual)} (step "
        f"{step}: {number(norm)})",
        f"{clip}train.learning_rate={run.lower_rate():g}",
    )


def learning_rate_unusual(run: Figures) -> Verdict:
    """The learning rate is out of the range that is usual for the method."""
    rate, (low, high, start) = run.setting("train.learning_rate"), run.usual_rates
    if rate is None or 0.999 * low <= rate <= 1.001 * high:
        return None
    return (
        f"a learning rate of {rate:g}, where {low:g} to {high:g} is usual for "
        f"{'full tuning' if run.method == 'full' else 'adapters'} of such a model",
        f"train.learning_rate={start:g}",
    )


def padding_waste(run: Figures) -> Verdict:
    """Less than 70 % of what is computed are real tokens."""
    share, length = run.preflight.get("packing_efficiency"), run.preflight.get("max_length") or 1
    if share is None or share >= 0.7:
        return None
    mean = (run.preflight.get("length") or {}).get("mean") or 1
    slots = length * (run.setting("train.batch_size") or 1)
    if run.setting("data.packing") == "none":
        remedy = "data.packing='best_fit'"
    elif (run.preflight.get("tokens_to_come") or slots) < 0.7 * slots:
        remedy = f"train.batch_size={max(1, round(run.preflight['tokens_to_come'] / length))} (the data is less)"
    elif (run.setting("data.max_segments") or 0) * mean < length:
        remedy = f"data.max_segments={2 * math.ceil(length / mean)}"
    else:
        remedy = f"data.max_length={max(128, 128 * math.ceil(2 * mean / 128))}"
    return f"{share:.0%} of the tokens in a batch are real, the rest is padding (mean sample: {mean:.0f})", remedy


def data_bound(run: Figures) -> Verdict:
    """A third of the time or more the device waits for data."""
    shares = run.timing("waiting_share")
    if not shares or statistics.median(shares) < 1 / 3:
        return None
    workers = run.setting("data.workers") or 0
    return (
        f"the device waited for data in {statistics.median(shares):.0%} of the time",
        f"data.workers={max(2, 2 * workers)}",
    )


def slow_device(run: Figures) -> Verdict:
    """A run of more than a day on a CPU, or one whose steps came to take twice as long."""
    seconds, rates = run.timing("step_seconds"), run.timing("padded_tokens_per_second")
    if not seconds:
        return None
    hours = statistics.median(seconds) * (run.preflight.get("steps") or 0) / 3600
    if run.run.environment.get("backend") == "cpu" and hours > 24:
        steps = max(1, round(8 * 3600 / statistics.median(seconds)))
        return (
            f"{hours:,.0f} hours for the whole run on a CPU, at {number(statistics.median(rates))} tokens/s",
            f"train.max_steps={steps} (8 hours), or peft.method='lora', or a GPU or TPU",
        )
    third = len(rates) // 3
    if third >= 20 and statistics.median(rates[-third:]) < 0.5 * statistics.median(rates[:third]):
        first, last = (number(statistics.median(part)) for part in (rates[:third], rates[-third:]))
        return (
            f"{first} tokens/s at first, {last} at the end: the machine is throttled, or others use it",
            "data.workers=0 if the machine is short of cores or memory; else look at its temperature and neighbours",
        )
    return None


def _short(value: float) -> str:
    return f"{value:.1g}"
