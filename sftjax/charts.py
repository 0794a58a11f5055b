"""Line charts as inline SVG: no scripts from elsewhere, no images, sharp at every size.

Colours come from the page's CSS (classes `line a` to `line d`), so that a chart follows light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

RIGHT, TOP, BOTTOM = 18, 12, 34
LETTER = 8.5  # width of a digit of the labels, at the size that page.css gives them
MAX_POINTS = 400


class Frame(NamedTuple):
    """A chart's size, and how many ticks its axes have about. Labels scale with the chart, so that one for a narrow
    place is drawn in fewer units, of which the same labels take more."""

    width: int
    height: int
    x_ticks: int
    y_ticks: int


WIDE = Frame(640, 270, 6, 5)
NARROW = Frame(340, 230, 4, 5)


class Series(NamedTuple):
    """Points of one line. `style` is a letter of the page's palette; `dots` marks each point."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "a"
    dots: bool = False


def line_chart(
    series: Sequence[Series], *, title: str, x_name: str = "step", from_zero: bool = False, frame: Frame = WIDE
) -> Markup:
    """An `<svg>` with axes, one line for each series, and the values of each point for the page's pointer.

    Points that aren't finite leave a gap. Empty if there is nothing to draw.
    """
    drawn = [(one, _segments(one)) for one in series]
    points = [point for _, segments in drawn for segment in segments for point in segment]
    if not points:
        return Markup("")
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points), frame.x_ticks)
    low = 0.0 if from_zero else min(y for _, y in points)
    y_ticks = ticks(low, max(y for _, y in points), frame.y_ticks)
    x_range = (min(x for x, _ in points), max(x for x, _ in points))
    y_range = (min(low, y_ticks[0]), max(y_ticks[-1], max(y for _, y in points)))

    left = round(14 + LETTER * max(len(number(tick)) for tick in y_ticks))
    right, bottom = frame.width - RIGHT, frame.height - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / ((x_range[1] - x_range[0]) or 1)
        up = (y - y_range[0]) / ((y_range[1] - y_range[0]) or 1)
        return left + across * (right - left), bottom - up * (bottom - TOP)

    parts = []
    for tick in y_ticks:
        _, y = place(x_range[0], tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 5:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        if x_range[0] <= tick <= x_range[1]:
            x, _ = place(tick, y_range[0])
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{frame.height - 10}" text-anchor="middle">{number(tick)}</text>'
            )
    for one, segments in drawn:
        for segment in segments:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in segment))
            if len(segment) > 1:
                parts.append(f'<polyline class="line {one.style}" points="{path}"/>')
            if one.dots or len(segment) == 1:
                for point in segment:
                    x, y = place(*point)
                    label = f"{one.name} {number(point[1])} at {x_name} {number(point[0])}"
                    parts.append(
                        f'<circle class="dot {one.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
                        f"<title>{escape(label)}</title></circle>"
                    )
    narrow = " narrow" if frame == NARROW else ""
    return Markup(
        f'<svg class="chart{narrow}" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="{escape(title)}" data-frame="{left},{right},{x_range[0]},{x_range[1]}">{"".join(parts)}'
        f'<line class="cursor" y1="{TOP}" y2="{bottom}" visibility="hidden"/></svg>'
    )


def _segments(one: Series) -> list[list[tuple[float, float]]]:
    """Finite stretches, thinned to a number of points that an eye can tell apart."""
    segments: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(one.xs, one.ys, strict=True):
        if isinstance(y, int | float) and math.isfinite(y):
            segments[-1].append((float(x), float(y)))
        elif segments[-1]:
            segments.append([])
    return [thin(segment) for segment in segments if segment]


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about MAX_POINTS of them: of each bucket the lowest and the highest, so that spikes stay visible."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    kept = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        extremes = {min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])}
        kept += sorted(extremes)
    return kept


def smooth(ys: Sequence[float | None], half_life: float) -> list[float | None]:
    """Exponential moving average without bias at the start; a gap stays a gap."""
    keep, total, weight, out = 0.5 ** (1 / max(half_life, 1e-9)), 0.0, 0.0, []
    for y in ys:
        if y is None or not math.isfinite(y):
            out.append(None)
            continue
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        out.append(total / weight)
    return out


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` of them."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def number(value: float) -> str:
    """A number for a person: 1,234 or 0.0123 or 1.9e-05."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        text = f"{value:.3g}"
        return text if size < 1e-3 or "e" not in text else _with_suffix(value)
    if size >= 1000 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _with_suffix(value: float) -> str:
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {suffix}"
    return f"{value:.3g}"
