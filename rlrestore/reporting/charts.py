"""Inline SVG for reports: lines with bands, dots with intervals, parallel coordinates, bars. Text is escaped.

Colours are classes (c0 to c7) that the page's style sheet gives, so that one chart fits light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

COLOURS = 8
WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 30  # margins for tick labels


@dataclass(frozen=True)
class Series:
    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()  # band, as long as y, or none
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Dot:
    label: str
    x: float
    y: float
    x_ci: tuple[float, float]
    y_ci: tuple[float, float]
    colour: int = 0
    front: bool = False  # filled
    chosen: bool = False  # ringed


@dataclass(frozen=True)
class Frame:
    """Where numbers lie on a chart."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def line_chart(series: Sequence[Series], x_label: str = "iteration") -> Markup:
    """One line a series; '' if there is nothing to draw."""
    series = [item for item in series if len(item.y)]
    if not series:
        return Markup("")
    xs = [x for item in series for x in item.x]
    ys = [y for item in series for y in (*item.y, *item.low, *item.high)]
    frame = Frame(*_span(xs, pad=0.0), *_span(ys))
    body = [_axes(frame, x_label)]
    for index, item in enumerate(series):
        colour = f"c{index % COLOURS}"
        if item.low:
            edge = [*zip(item.x, item.high, strict=True), *reversed(list(zip(item.x, item.low, strict=True)))]
            body.append(f'<polygon class="band {colour}" points="{_points(frame, edge)}"/>')
        body.append(
            f'<polyline class="line {colour}" points="{_points(frame, list(zip(item.x, item.y, strict=True)))}"/>'
        )
        if len(item.y) < 12:
            body += [f'<circle class="dot {colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2"/>'
                     for x, y in zip(item.x, item.y, strict=True)]  # fmt: skip
    return _svg(body, ", ".join(item.name for item in series)) + legend([item.name for item in series])


def legend(names: Sequence[str]) -> Markup:
    if len(names) < 2:
        return Markup("")
    keys = "".join(f'<span><i class="key c{i % COLOURS}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return Markup(f'<div class="legend">{keys}</div>')


def scatter(dots: Sequence[Dot], x_label: str, y_label: str, front: Sequence[tuple[float, float]] = ()) -> Markup:
    """Dots with a cross of their intervals; the front as a staircase through (x, y) sorted by x."""
    frame = Frame(*_span([0.0, *(v for d in dots for v in (d.x, *d.x_ci) if math.isfinite(v))]),
                  *_span([0.0, *(v for d in dots for v in (d.y, *d.y_ci) if math.isfinite(v))]))  # fmt: skip
    body = [_axes(frame, x_label, y_label)]
    body.append(f'<line class="zero" x1="{frame.x(0):.1f}" x2="{frame.x(0):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    body.append(f'<line class="zero" y1="{frame.y(0):.1f}" y2="{frame.y(0):.1f}" x1="{LEFT}" x2="{WIDTH - RIGHT}"/>')
    if len(front) > 1:
        body.append(f'<polyline class="front" points="{_points(frame, front)}"/>')
    for dot in dots:
        x, y, colour = frame.x(dot.x), frame.y(dot.y), f"c{dot.colour % COLOURS}"
        if all(map(math.isfinite, (*dot.x_ci, *dot.y_ci))):
            body.append(f'<path class="cross {colour}" d="M{frame.x(dot.x_ci[0]):.1f} {y:.1f}H{frame.x(dot.x_ci[1]):.1f}'
                        f'M{x:.1f} {frame.y(dot.y_ci[0]):.1f}V{frame.y(dot.y_ci[1]):.1f}"/>')  # fmt: skip
        if dot.chosen:
            body.append(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="7.5"/>')
        body.append(f'<circle class="{"dot" if dot.front else "open"} {colour}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
                    f"<title>{escape(dot.label)}</title></circle>")  # fmt: skip
    return _svg(body, f"{y_label} against {x_label}")


def parallel(
    axes: Sequence[str], rows: Sequence[Sequence[float | str]], labels: Sequence[str], shade: Sequence[float]
) -> Markup:
    """Parallel coordinates: an axis a column of `rows` (numbers by value, text by order of appearance), a line a row.

    shade: one number a row in [0, 1], which colours the line from c3 (0) to c0 (1).
    """
    width, height = max(WIDTH, 90 * len(axes)), HEIGHT + 20
    xs = [46 + index * (width - 92) / max(1, len(axes) - 1) for index in range(len(axes))]
    body, places = [], []
    for x, axis, column in zip(xs, axes, zip(*rows, strict=True), strict=True):
        at, ticks = _column(column, height)
        places.append(at)
        body.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="30" y2="{height - 14}"/>')
        body.append(f'<text class="label" x="{x:.1f}" y="14" text-anchor="middle">{escape(axis)}</text>')
        body += [f'<text class="tick" x="{x + 4:.1f}" y="{y + 3:.1f}">{escape(text)}</text>' for text, y in ticks]
    for index, label in enumerate(labels):
        points = " ".join(f"{x:.1f},{at[index]:.1f}" for x, at in zip(xs, places, strict=True))
        mixed = f"color-mix(in srgb, var(--c0) {100 * shade[index]:.0f}%, var(--c3))"
        body.append(
            f'<polyline class="line" style="stroke:{mixed}" points="{points}"><title>{escape(label)}</title></polyline>'
        )
    return _svg(body, "parallel coordinates", width, height)


def _column(column: Sequence[float | str], height: float) -> tuple[list[float], list[tuple[str, float]]]:
    """(y of every row, tick labels with their y)."""
    low_y, high_y = height - 20.0, 36.0
    if all(isinstance(value, int | float) for value in column):
        numbers = [float(value) for value in column]
        low, high = min(numbers), max(numbers)
        scale = (low_y - high_y) / ((high - low) or 1.0)
        ticks = [(_number(value), low_y - (value - low) * scale) for value in sorted({low, (low + high) / 2, high})]
        return [low_y - (value - low) * scale for value in numbers], ticks
    names = list(dict.fromkeys(map(str, column)))
    step = (low_y - high_y) / max(1, len(names) - 1)
    return [low_y - names.index(str(value)) * step for value in column], [
        (n, low_y - i * step) for i, n in enumerate(names)
    ]


def bars(rows: Sequence[tuple[str, float, float, float]], limit: float = 1.0) -> Markup:
    """(name, value, low, high) as horizontal bars from the middle, on [-limit, limit]."""
    row_h, left = 22, 150
    height = row_h * len(rows) + 8
    middle, half = left + (WIDTH - left) / 2, (WIDTH - left) / 2 - 26
    body = [f'<line class="zero" x1="{middle:.1f}" x2="{middle:.1f}" y1="0" y2="{height}"/>']
    for index, (name, value, low, high) in enumerate(rows):
        y = 4 + row_h * index
        x = middle + half * value / limit
        body.append(f'<rect class="fill {"c0" if value > 0 else "c3"}" x="{min(x, middle):.1f}" width="{abs(x - middle):.1f}" '
                    f'y="{y + 3}" height="{row_h - 8}"/>')  # fmt: skip
        if math.isfinite(low) and math.isfinite(high):
            body.append(f'<path class="whisker" d="M{middle + half * low / limit:.1f} {y + row_h / 2 - 1}'
                        f'H{middle + half * high / limit:.1f}"/>')  # fmt: skip
        body.append(f'<text class="tick" x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        body.append(f'<text class="tick" x="{WIDTH - 2}" y="{y + 14}" text-anchor="end">{value:+.2f}</text>')
    return _svg(body, "bars", WIDTH, height)


# -- parts -------------------------------------------------------------------------------------------------------------


def _svg(body: Sequence[str], title: str, width: float = WIDTH, height: float = HEIGHT) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
    )


def _points(frame: Frame, points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)


def _axes(frame: Frame, x_label: str, y_label: str = "") -> str:
    parts = []
    for value in ticks(frame.y0, frame.y1):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in ticks(frame.x0, frame.x1):
        parts.append(f'<text class="tick" x="{frame.x(value):.1f}" y="{HEIGHT - BOTTOM + 12}" text-anchor="middle">'
                     f"{_number(value)}</text>")  # fmt: skip
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle:.1f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    if y_label:
        y = (TOP + HEIGHT - BOTTOM) / 2
        parts.append(
            f'<text class="label" x="9" y="{y:.1f}" text-anchor="middle" '
            f'transform="rotate(-90 9 {y:.1f})">{escape(y_label)}</text>'
        )
    return "".join(parts)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers inside [low, high], about `wanted` of them."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _span(values: Sequence[float], pad: float = 0.06) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if high - low < 1e-12 * max(1.0, abs(high)):
        return low - (abs(low) * 0.05 or 1.0), high + (abs(high) * 0.05 or 1.0)
    return low - pad * (high - low), high + pad * (high - low)


def _number(value: float) -> str:
    return "0" if abs(value) < 1e-15 else f"{value:.3g}"
