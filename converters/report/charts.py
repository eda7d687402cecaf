"""Charts as inline SVG: plain text, no script; colors come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from converters.report.markup import text as shown
from converters.report.records import LayerRow

__all__ = ["Bar", "Point", "bar_chart", "layer_chart", "scatter_chart", "share_bar"]

# Drawn at about this width on a phone, so that text stays readable there.
_WIDTH = 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 14, 42
_CHAR = 6.6
"""Width of one character of a chart's text, in its units."""

Box = tuple[float, float, float, float]


class Point(NamedTuple):
    """One variant in a scatter chart."""

    x: float
    y: float
    label: str
    """Beside the dot, where there is room."""
    kind: str
    """CSS class: its color."""
    failed: bool
    tooltip: str


class Bar(NamedTuple):
    """One row of a bar chart."""

    label: str
    value: float
    figure: str
    kind: str


class Axis(NamedTuple):
    """One axis: what it means, its range and its ticks."""

    label: str
    low: float
    high: float
    ticks: Mapping[float, str]
    log: bool = False

    def share(self, value: float) -> float:
        """Where ``value`` lies, 0 to 1."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-12))
        return min(1.0, max(0.0, (value - low) / (high - low)))


def _nice_step(span: float, parts: int) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides ``span`` into about ``parts``."""
    raw = span / parts
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if raw <= factor * power * (1 + 1e-9))


def linear_axis(label: str, values: Sequence[float], *, ceiling: float | None = None) -> Axis:
    """From round number to round number around ``values``; never above ``ceiling``."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - max(1.0, 0.05 * abs(low)), high + max(1.0, 0.05 * abs(high))
    if ceiling is not None and high >= ceiling - 1e-9:
        high = ceiling
    step = _nice_step(high - low, 4)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if ceiling is not None and high == ceiling:
        end = math.floor(ceiling / step + 1e-9)
    ticks = {number * step: f"{number * step:g}" for number in range(start, end + 1)}
    return Axis(label, start * step, max(end * step, high), ticks)


_SIZES = [digit * power for power in (1, 10, 100) for digit in range(1, 10)]
_ROUND = {digit * power for power in (1, 10, 100) for digit in (1, 2, 5)}


def size_axis(label: str, sizes: Sequence[float]) -> Axis:
    """Bytes, logarithmic, with ticks at round numbers of kB, MB or GB, where there is room."""
    low, high = max(1.0, min(sizes)) / 1.35, max(sizes) * 1.35
    every = [
        (number not in _ROUND, unit * number, f"{number} {name}")
        for unit, name in ((2.0**10, "kB"), (2.0**20, "MB"), (2.0**30, "GB"))
        for number in _SIZES
        if low <= unit * number <= high
    ]
    room = 46.0 / (_WIDTH - _LEFT - _RIGHT) * math.log(high / low)
    ticks: dict[float, str] = {}
    for _, value, text in sorted(every):  # 1, 2 and 5 first
        if all(abs(math.log(value / other)) >= room for other in ticks):
            ticks[value] = text
    return Axis(label, low, high, ticks, log=True)


def _overlaps(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _place_labels(
    dots: Sequence[tuple[float, float]], labels: Sequence[str], floor: float
) -> list[Box | None]:
    """A free place for each label around its dot, first come first served; None: no room."""
    taken: list[Box] = [(x - 7, y - 7, x + 7, y + 7) for x, y in dots]
    places: list[Box | None] = []
    for (x, y), label in zip(dots, labels, strict=True):
        width, height = _CHAR * len(label), 13.0
        corners = (
            (x + 9, y - 6.5), (x - 9 - width, y - 6.5), (x - width / 2, y - 22),
            (x - width / 2, y + 9), (x + 7, y - 19), (x + 7, y + 6), (x - 7 - width, y - 19),
            (x - 7 - width, y + 6),
        )  # fmt: skip
        chosen = None
        for left, top in corners:
            box = (left, top, left + width, top + height)
            inside = left >= _LEFT and box[2] <= _WIDTH and top >= 0 and box[3] <= floor
            if inside and not any(_overlaps(box, other) for other in taken):
                chosen = box
                taken.append(box)
                break
        places.append(chosen)
    return places


def _axes(x_axis: Axis, y_axis: Axis, height: float) -> list[str]:
    floor, right = height - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value, text in y_axis.ticks.items():
        y = _y(y_axis, value, height)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4}" text-anchor="end">{shown(text)}</text>')
    for value, text in x_axis.ticks.items():
        x = _x(x_axis, value)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{floor}"/>')
        parts.append(f'<text x="{x}" y="{floor + 16}" text-anchor="middle">{shown(text)}</text>')
    middle, center = (_LEFT + right) / 2, (floor + _TOP) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{height - 5}" text-anchor="middle">'
        f"{shown(x_axis.label)}</text>"
    )
    parts.append(
        f'<text class="label" transform="translate(13 {center}) rotate(-90)" '
        f'text-anchor="middle">{shown(y_axis.label)}</text>'
    )
    return parts


def _x(axis: Axis, value: float) -> float:
    return round(_LEFT + axis.share(value) * (_WIDTH - _LEFT - _RIGHT), 1)


def _y(axis: Axis, value: float, height: float) -> float:
    return round(height - _BOTTOM - axis.share(value) * (height - _TOP - _BOTTOM), 1)


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {round(height, 1)}" role="img" '
        f'aria-label="{shown(title)}">{"".join(parts)}</svg>'
    )


def scatter_chart(
    title: str,
    points: Sequence[Point],
    y_label: str,
    *,
    ceiling: float | None = None,
    height: float = 300,
) -> str:
    """Bytes (x, logarithmic) against a figure of quality (y), a dot a variant."""
    x_axis = size_axis("size of the file", [point.x for point in points])
    y_axis = linear_axis(y_label, [point.y for point in points], ceiling=ceiling)
    parts = _axes(x_axis, y_axis, height)
    dots = [(_x(x_axis, point.x), _y(y_axis, point.y, height)) for point in points]
    places = _place_labels(dots, [point.label for point in points], height - _BOTTOM)
    for point, (x, y), place in zip(points, dots, places, strict=True):
        kind = shown(point.kind) + (" failed" if point.failed else "")
        parts.append(
            f'<circle class="dot {kind}" cx="{x}" cy="{y}" r="6">'
            f"<title>{shown(point.tooltip)}</title></circle>"
        )
        if place is not None:
            left, top = round(place[0], 1), round(place[1] + 10.5, 1)
            parts.append(f'<text class="value" x="{left}" y="{top}">{shown(point.label)}</text>')
    return _svg(title, height, parts)


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """Horizontal bars from zero, each with its label on the left and its value on the right."""
    row, left = 22, 10 + _CHAR * max(len(bar.label) for bar in bars)
    room = _WIDTH - left - 70
    largest = max(bar.value for bar in bars) or 1.0
    parts = []
    for number, bar in enumerate(bars):
        y = 4 + number * row
        width = round(max(1.0, room * bar.value / largest), 1)
        parts.append(
            f'<text class="label" x="{round(left - 8, 1)}" y="{y + 13}" text-anchor="end">'
            f"{shown(bar.label)}</text>"
            f'<rect class="fill {shown(bar.kind)}" x="{round(left, 1)}" y="{y + 2}" '
            f'width="{width}" height="{row - 7}" rx="2"/>'
            f'<text x="{round(left + width + 6, 1)}" y="{y + 13}">{shown(bar.figure)}</text>'
        )
    return _svg(title, 8 + row * len(bars), parts)


def layer_chart(title: str, rows: Sequence[LayerRow], worst: Sequence[int]) -> str:
    """SQNR of each layer in the order of the net, a column a layer.

    ``worst``: indices to mark, numbered from 1 in their order.
    """
    height = 190.0
    values = [row.sqnr_db for row in rows]
    high = max(10.0, *values)
    y_axis = linear_axis("SQNR, dB", [min(0.0, *values), high])
    floor = height - 30
    step = (_WIDTH - _LEFT - _RIGHT) / len(rows)

    def place(value: float) -> float:
        return round(floor - y_axis.share(value) * (floor - 22), 1)

    parts = []
    for value, text in y_axis.ticks.items():
        y = place(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4}" text-anchor="end">{shown(text)}</text>')
    zero = place(0.0)
    marked: list[float] = []
    for number, row in enumerate(rows):
        x = round(_LEFT + number * step, 2)
        top = place(row.sqnr_db)
        width = round(max(0.6, min(step - min(2.0, step / 4), 26.0)), 2)
        kind = "layer bad" if number in worst else "layer"
        parts.append(
            f'<rect class="{kind}" x="{x}" y="{min(top, zero)}" width="{width}" '
            f'height="{round(max(1.0, abs(zero - top)), 1)}">'
            f"<title>{shown(f'{row.name} ({row.op}): {row.sqnr_db:.1f} dB')}</title></rect>"
        )
        if number in worst and not any(abs(x - other) < 9 for other in marked):
            marked.append(x)
            parts.append(
                f'<text class="value" x="{round(x + width / 2, 1)}" y="{min(top, zero) - 4}" '
                f'text-anchor="middle">{worst.index(number) + 1}</text>'
            )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{height - 6}" text-anchor="middle">'
        f"{len(rows)} layers, first to last</text>"
    )
    parts.append(
        f'<text class="label" transform="translate(13 {(floor + 22) / 2}) rotate(-90)" '
        f'text-anchor="middle">{shown(y_axis.label)}</text>'
    )
    return _svg(title, height, parts)


def share_bar(share: float, color: str | None = None) -> str:
    """A bar of ``share`` (0 to 1) of the width it is given."""
    width = round(100 * min(1.0, max(0.0, share)), 1)
    fill = f' fill="{shown(color)}"' if color is not None else ""
    kind = "" if color is not None else ' class="share"'
    return (
        '<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="6"/><rect{kind}{fill} width="{width}" '
        'height="6"/></svg>'
    )
