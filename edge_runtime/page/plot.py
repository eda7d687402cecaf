"""Charts as inline SVG: plain text, no script, colors from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from edge_runtime.page.markup import text as shown

__all__ = ["Plot", "linear_ticks"]

# Drawn at about this width on a phone, so that text stays readable there.
_WIDTH: Final = 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 42


def linear_ticks(low: float, high: float, parts: int = 5) -> dict[float, str]:
    """Round numbers from ``low`` to ``high``, about ``parts`` of them."""
    raw = max(high - low, 1e-9) / parts
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if raw <= f * power * (1 + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return {number * step: f"{number * step:g}" for number in range(first, last + 1)}


class Plot:
    """A plot area with axes; maps data to its own units. Marks outside stay at its edges."""

    def __init__(
        self,
        title: str,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        width: int = _WIDTH,
        height: int = 280,
        left: int = _LEFT,
    ) -> None:
        self._title, self._width, self._height, self._left = title, width, height, left
        self._x, self._y = x, y
        self._parts: list[str] = []

    @property
    def floor(self) -> float:
        """Row of the x axis."""
        return self._height - _BOTTOM

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Column and row of a point."""
        return self.column(x), self.row(y)

    def column(self, x: float) -> float:
        """Column of a value."""
        share = _share(x, self._x)
        return round(self._left + share * (self._width - self._left - _RIGHT), 1)

    def row(self, y: float) -> float:
        """Row of a value."""
        return round(self.floor - _share(y, self._y) * (self.floor - _TOP), 1)

    def add(self, markup: str) -> None:
        """Draw."""
        self._parts.append(markup)

    def axes(
        self,
        x_label: str,
        x_ticks: Mapping[float, str],
        y_label: str = "",
        y_ticks: Mapping[float, str] | None = None,
    ) -> None:
        """Grid lines, tick labels, and what the axes mean."""
        right = self._width - _RIGHT
        for value, name in (y_ticks or {}).items():
            y = self.row(value)
            self.add(f'<line class="grid" x1="{self._left}" x2="{right}" y1="{y}" y2="{y}"/>')
            self.label(self._left - 7, y + 4, name, anchor="end")
        for value, name in x_ticks.items():
            x = self.column(value)
            self.add(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{self.floor}"/>')
            self.label(x, self.floor + 16, name, anchor="middle")
        middle = (self._left + right) / 2
        self.label(middle, self._height - 5, x_label, anchor="middle", kind="label")
        if y_label:
            center = (self.floor + _TOP) / 2
            self.add(
                f'<text class="label" transform="translate(13 {center}) rotate(-90)" '
                f'text-anchor="middle">{shown(y_label)}</text>'
            )

    def label(
        self, x: float, y: float, words: str, *, anchor: str = "start", kind: str = ""
    ) -> None:
        """Text at a column and row."""
        named = f' class="{kind}"' if kind else ""
        self.add(f'<text{named} x="{x}" y="{y}" text-anchor="{anchor}">{shown(words)}</text>')

    def curve(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A line through data points."""
        path = "L".join(f"{x} {y}" for x, y in (self.at(*point) for point in points))
        self.add(f'<path class="curve {kind}" d="M{path}"/>')

    def dot(self, x: float, y: float, kind: str, tooltip: str, radius: float = 4.0) -> None:
        """A data point."""
        column, row = self.at(x, y)
        self.add(
            f'<circle class="{kind}" cx="{column}" cy="{row}" r="{radius:g}">'
            f"<title>{shown(tooltip)}</title></circle>"
        )

    def bar(self, low: float, high: float, y: float, kind: str, *, height: float = 12.0) -> None:
        """A horizontal stretch of x, its middle at a row of data."""
        start, end = self.column(low), self.column(high)
        width = round(max(end - start, 2.0), 1)
        self.add(
            f'<rect class="{kind}" x="{start}" y="{round(self.row(y) - height / 2, 1)}" '
            f'width="{width}" height="{height:g}" rx="3"/>'
        )

    def svg(self) -> str:
        """The finished chart."""
        return (
            f'<svg viewBox="0 0 {self._width} {self._height}" role="img" '
            f'aria-label="{shown(self._title)}">{"".join(self._parts)}</svg>'
        )


def _share(value: float, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return min(1.0, max(0.0, (value - low) / max(high - low, 1e-12)))
