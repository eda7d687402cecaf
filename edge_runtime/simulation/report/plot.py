"""A plot area as inline SVG: plain text, no script, colors from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Final

import msgspec

__all__ = ["LEFT", "RIGHT", "TOP", "WIDTH", "Frame", "Label", "log_ticks", "place_labels", "ticks"]

WIDTH: Final = 720
LEFT, RIGHT, TOP, _BOTTOM = 62, 18, 16, 44
_CHAR_PX: Final = 6.6
_LINE_PX: Final = 13.0


class Frame:
    """A plot area with axes; maps data to pixels."""

    def __init__(
        self,
        title: str,
        height: int,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        *,
        log_x: bool = False,
        log_y: bool = False,
    ) -> None:
        self._title = title
        self._height = height
        self._x_range, self._y_range = x_range, y_range
        self._log_x, self._log_y = log_x, log_y
        self._parts: list[str] = []

    def x(self, value: float) -> float:
        """Pixel column of a value."""
        share = _share(value, self._x_range, log=self._log_x)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Pixel row of a value."""
        share = _share(value, self._y_range, log=self._log_y)
        return round(self._height - _BOTTOM - share * (self._height - TOP - _BOTTOM), 1)

    @property
    def floor(self) -> float:
        """Pixel row of the x axis."""
        return self._height - _BOTTOM

    def add(self, markup: str) -> None:
        """Draw."""
        self._parts.append(markup)

    def line(self, points: Iterable[tuple[float, float]], css_class: str, title: str) -> None:
        """A curve through points of the data."""
        path = "L".join(f"{self.x(x)} {self.y(y)}" for x, y in points)
        if path:
            self.add(f'<path class="{css_class}" d="M{path}"><title>{escape(title)}</title></path>')

    def mark(self, x: float, text: str, *, low: bool = False) -> None:
        """A dashed line across the plot at a value of the x axis; its text high or low."""
        column = self.x(x)
        self.add(
            f'<line class="deadline" x1="{column}" x2="{column}" y1="{TOP}" y2="{self.floor}"/>'
        )
        row = self.floor - 8 if low else TOP + 10
        self.add(f'<text x="{column + 5}" y="{row}">{escape(text)}</text>')

    def axes(
        self,
        x_label: str,
        x_ticks: Mapping[float, str],
        y_label: str,
        y_ticks: Mapping[float, str],
    ) -> None:
        """Grid lines, tick labels, and what the axes mean."""
        for value, text in y_ticks.items():
            y = self.y(value)
            self.add(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            self.add(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(text)}</text>')
        for value, text in x_ticks.items():
            x = self.x(value)
            self.add(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{self.floor}"/>')
            self.add(
                f'<text x="{x}" y="{self.floor + 16}" text-anchor="middle">{escape(text)}</text>'
            )
        middle = (LEFT + WIDTH - RIGHT) / 2
        self.add(
            f'<text class="label" x="{middle}" y="{self._height - 6}" text-anchor="middle">'
            f"{escape(x_label)}</text>"
        )
        self.add(
            f'<text class="label" transform="translate(14 {(self.floor + TOP) / 2}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_label)}</text>'
        )

    def svg(self) -> str:
        """The finished chart."""
        return (
            f'<svg viewBox="0 0 {WIDTH} {self._height}" role="img" '
            f'aria-label="{escape(self._title, quote=True)}">{"".join(self._parts)}</svg>'
        )


def _share(value: float, bounds: tuple[float, float], *, log: bool) -> float:
    low, high = bounds
    if log:
        low, high, value = math.log(low), math.log(high), math.log(max(value, low))
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _nice_step(span: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides ``span`` into about five."""
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if raw <= factor * power)


def ticks(low: float, high: float, unit: str = "") -> dict[float, str]:
    """About five round values from ``low`` to ``high``, with their texts."""
    step = _nice_step(high - low)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return {(first + i) * step: f"{(first + i) * step:g}{unit}" for i in range(count)}


def log_ticks(low: float, high: float) -> dict[float, str]:
    """1, 2 and 5 times the powers of ten from ``low`` to ``high``."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    return {value: f"{value:g}" for value in values if low <= value <= high}


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """A text that belongs beside a point, in pixels."""

    x: float
    y: float
    radius: float
    text: str


def place_labels(labels: Sequence[Label], height: float) -> list[str]:
    """Markup of the labels that fit without covering a point or each other.

    Each is tried right, left, above, below and aslant of its point; one that fits nowhere is
    left out (the point's title still says it). Earlier labels go first.
    """
    taken = [(p.x - p.radius, p.y - p.radius, p.x + p.radius, p.y + p.radius) for p in labels]
    markup = []
    for label in labels:
        width = _CHAR_PX * len(label.text)
        gap = label.radius + 4
        for x, y, anchor in (
            (label.x + gap, label.y + 4, "start"),
            (label.x - gap, label.y + 4, "end"),
            (label.x, label.y - gap - 2, "middle"),
            (label.x, label.y + gap + 10, "middle"),
            (label.x + 0.75 * gap, label.y - 0.75 * gap, "start"),
            (label.x + 0.75 * gap, label.y + 0.75 * gap + 8, "start"),
            (label.x - 0.75 * gap, label.y - 0.75 * gap, "end"),
            (label.x - 0.75 * gap, label.y + 0.75 * gap + 8, "end"),
        ):
            left = x - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
            box = (left, y - _LINE_PX + 3, left + width, y + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH - 2 and box[1] >= 0 and box[3] <= height
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                markup.append(
                    f'<text class="value" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
                    f"{escape(label.text)}</text>"
                )
                break
    return markup


def _overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
