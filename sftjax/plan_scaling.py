"""Weak scaling by compile: the same work a device on ever more of them. What grows besides their number is the cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sftjax import charts, plan, topology
from sftjax import config as config_lib

COLORS = {"a": "#2a78d6", "b": "#d9822b", "c": "#3a9d5d"}


def weak(config: config_lib.ConfigDict, names: Sequence[str]) -> list[dict[str, Any]]:
    """A plan for each topology. The configuration's rows are those of the first; others get as many a device.

    Raises:
      ConfigError, DoesNotFit: see `plan.make`.
    """
    plans = []
    for name in names:
        target = topology.find(name)
        share = len(target.devices) / (plans[0]["devices"] if plans else len(target.devices))
        rows = round(config_lib.rows_per_step(config) * share)
        plans.append(plan.make(plan.with_fields(config, {"train.batch_size": rows, "train.batch_tokens": 0}), target))
    return plans


def table(plans: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown, one line a topology."""
    lines = [
        "| topology | devices | tokens a step | arguments, GiB | temporaries, GiB | peak, GiB | TFLOP a device "
        "| received by a device, GiB | floor, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in plans:
        sizes = one["compiled"]["bytes"]
        figures = [f"{sizes[name] / 2**30:.2f}" for name in ("arguments", "temporaries", "peak")]
        floor = f"{one['floor']['step_seconds']:.3f}" if "floor" in one else "-"
        lines.append(
            f"| {one['topology']} | {one['devices']} | {one['tokens_per_step']:,} | {' | '.join(figures)} "
            f"| {work(one) / 1e12:.1f} | {one['compiled']['network_bytes'] / 2**30:.1f} "
            f"| {floor} |"
        )
    return "\n".join(lines)


def work(one: Mapping[str, Any]) -> float:
    """FLOPs of a device in a step, what is recomputed included."""
    flops = one["flops"]
    return (flops["model_per_token"] + flops["recomputed_per_token"]) * one["tokens_per_step"] / one["devices"]


def plot(plans: Sequence[Mapping[str, Any]]) -> str:
    """The same as an SVG file: gibibytes of a device over the number of devices."""
    devices = [one["devices"] for one in plans]

    def line(name: str, style: str, values: list[float]) -> charts.Series:
        return charts.Series(name, devices, [value / 2**30 for value in values], style, dots=True)

    series = [
        line("arguments", "a", [one["compiled"]["bytes"]["arguments"] for one in plans]),
        line("peak", "b", [one["compiled"]["bytes"]["peak"] for one in plans]),
        line("received in a step", "c", [one["compiled"]["network_bytes"] for one in plans]),
    ]
    chart = charts.line_chart(series, title="GiB of a device", x_name="devices", from_zero=True)
    style = "text{font:11px sans-serif;fill:#666}.grid{stroke:#ddd}.cursor{display:none}" + "".join(
        f".line.{letter}{{fill:none;stroke:{color};stroke-width:2}}.dot.{letter}{{fill:{color}}}"
        for letter, color in COLORS.items()
    )
    legend = "".join(
        f'<text x="{60 + 150 * i}" y="10" style="fill:{COLORS[one.style]}">{one.name}, GiB</text>'
        for i, one in enumerate(series)
    )
    opening, rest = chart.split(">", 1)
    return f'{opening} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{legend}{rest}\n'
