"""Charts as inline SVG: plain text, no script, colors from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from edge_runtime.demo.records import RequestRecord
from edge_runtime.demo.scoring import ModeScore
from edge_runtime.results import InferenceSource
from edge_runtime.simulation.links import LinkSchedule

__all__ = ["accuracy_chart", "latency_chart", "timeline_chart"]

_WIDTH: Final = 720
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 16, 44
_MODE_CLASS: Final = {
    "ONLY_ON_DEVICE": "device",
    "ONLY_IN_CLOUD": "cloud",
    "ADAPTIVE": "adaptive",
}


class _Frame:
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
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        """Pixel row of a value."""
        share = _share(value, self._y_range, log=self._log_y)
        return round(self._height - _BOTTOM - share * (self._height - _TOP - _BOTTOM), 1)

    @property
    def floor(self) -> float:
        """Pixel row of the x axis."""
        return self._height - _BOTTOM

    def add(self, markup: str) -> None:
        """Draw."""
        self._parts.append(markup)

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
            self.add(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
            self.add(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(text)}</text>')
        for value, text in x_ticks.items():
            x = self.x(value)
            self.add(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{self.floor}"/>')
            self.add(
                f'<text x="{x}" y="{self.floor + 16}" text-anchor="middle">{escape(text)}</text>'
            )
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        self.add(
            f'<text class="label" x="{middle}" y="{self._height - 6}" text-anchor="middle">'
            f"{escape(x_label)}</text>"
        )
        self.add(
            f'<text class="label" transform="translate(14 {(self.floor + _TOP) / 2}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_label)}</text>'
        )

    def svg(self) -> str:
        """The finished chart."""
        return (
            f'<svg viewBox="0 0 {_WIDTH} {self._height}" role="img" '
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


def _ticks(low: float, high: float, unit: str = "") -> dict[float, str]:
    step = _nice_step(high - low)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return {(first + i) * step: f"{(first + i) * step:g}{unit}" for i in range(count)}


def accuracy_chart(scores: Mapping[str, ModeScore]) -> str:
    """Accuracy within the deadline against megabytes uploaded, a point for each mode."""
    megabytes = {mode: score.uploaded_bytes / 1e6 for mode, score in scores.items()}
    percent = {mode: 100 * score.accuracy_in_deadline for mode, score in scores.items()}
    high_x = max(max(megabytes.values()) * 1.15, 0.1)
    low_y = max(0.0, 10 * math.floor(min(percent.values()) / 10 - 0.2))
    frame = _Frame("Accuracy within the deadline against bytes", 300, (0, high_x), (low_y, 100))
    frame.axes(
        "uploaded, MB",
        _ticks(0, high_x),
        "right within the deadline, %",
        _ticks(low_y, 100),
    )
    for mode, value in percent.items():
        x, y = frame.x(megabytes[mode]), frame.y(value)
        at_end = x > _WIDTH * 0.7
        frame.add(f'<circle class="{_MODE_CLASS[mode]}" cx="{x}" cy="{y}" r="7"/>')
        below = 16 if mode == "ONLY_ON_DEVICE" else 2  # its point lies close to another's
        frame.add(
            f'<text class="value" x="{x + (-12 if at_end else 12)}" y="{y + below}" '
            f'text-anchor="{"end" if at_end else "start"}">{mode} {value:.1f} %</text>'
        )
    return frame.svg()


def latency_chart(records: Mapping[str, Sequence[RequestRecord]], deadline_ms: float) -> str:
    """Share of requests answered within a time, a step curve for each mode."""
    slowest = max(
        (record.latency_ms for found in records.values() for record in found), default=1.0
    )
    high = max(2 * deadline_ms, 1.1 * slowest)
    frame = _Frame("Share of requests answered within a time", 300, (1, high), (0, 100), log_x=True)
    decades = [10.0**power for power in range(int(math.log10(high)) + 1)]
    ticks = {step * d: f"{step * d:g}" for d in decades for step in (1, 2, 5) if step * d <= high}
    frame.axes("answered within, ms (logarithmic)", ticks, "requests, %", _ticks(0, 100))
    x = frame.x(deadline_ms)
    frame.add(f'<line class="deadline" x1="{x}" x2="{x}" y1="{_TOP}" y2="{frame.floor}"/>')
    frame.add(f'<text x="{x + 5}" y="{_TOP + 10}">deadline</text>')
    for mode, found in records.items():
        latencies = sorted(record.latency_ms for record in found if record.answered)
        path = [f"M{frame.x(1)} {frame.y(0)}"]
        for done, latency in enumerate(latencies, 1):
            path.append(f"H{frame.x(latency)}V{frame.y(100 * done / len(found))}")
        if latencies:
            path.append(f"H{_WIDTH - _RIGHT}")
        frame.add(f'<path class="curve {_MODE_CLASS[mode]}" d="{"".join(path)}"/>')
    return frame.svg()


def timeline_chart(
    records: Sequence[RequestRecord], schedule: LinkSchedule, killed_s: float | None
) -> str:
    """The uplink rate over time, and below it where each adaptive request was answered."""
    high_s = max(record.link_s for record in records) + 0.05
    rates = [segment.uplink_mbps for segment in schedule.segments if segment.uplink_mbps > 0]
    low, high = min(rates) / 12, max(rates) * 1.3
    frame = _Frame(
        "Uplink rate over time and where each request ran", 330, (0, high_s), (low, high),
        log_y=True,
    )  # fmt: skip
    powers = range(math.floor(math.log10(min(rates))), math.ceil(math.log10(high)) + 1)
    y_ticks = {10.0**p: f"{10.0**p:g}" for p in powers if min(rates) <= 10.0**p <= high}
    frame.axes("seconds since the link started", _ticks(0, high_s), "uplink, Mbit/s", y_ticks)
    frame.add(f'<path class="rate" d="{_rate_path(frame, schedule, high_s)}"/>')
    for number, (start_s, name) in enumerate(_episodes(schedule, 0.95 * high_s)):
        row = _TOP + 10 + 14 * (number % 2)  # two rows: a short episode's name outgrows it
        frame.add(f'<text class="episode" x="{frame.x(start_s) + 4}" y="{row}">{name}</text>')
    if killed_s is not None:
        x = frame.x(killed_s)
        frame.add(f'<line class="deadline" x1="{x}" x2="{x}" y1="{_TOP}" y2="{frame.floor}"/>')
        frame.add(f'<text x="{x + 5}" y="{frame.floor - 60}">broker killed</text>')
    for record in records:
        in_cloud = record.source is InferenceSource.IN_CLOUD
        lane, kind = (34, "cloud") if in_cloud else (12, "device")
        if not in_cloud and record.upload_started:
            lane, kind = 23, "held"
        wrong = "" if record.right else " wrong"
        frame.add(
            f'<circle class="{kind}{wrong}" cx="{frame.x(record.link_s)}" '
            f'cy="{frame.floor - lane}" r="3"><title>{escape(_tooltip(record))}</title></circle>'
        )
    return frame.svg()


def _tooltip(record: RequestRecord) -> str:
    where = "no answer" if record.source is None else record.source.value
    return (
        f"{record.file} at {record.link_s:.2f} s: {where}, {record.reason}, "
        f"{record.latency_ms:.0f} ms, {'right' if record.right else 'wrong'}"
    )


def _rate_path(frame: _Frame, schedule: LinkSchedule, high_s: float) -> str:
    """An area under the rate; outages are gaps."""
    path = []
    time_s = 0.0
    while time_s < high_s:
        for segment in schedule.segments:
            end_s = min(time_s + segment.duration_s, high_s)
            if segment.uplink_mbps > 0 and time_s < high_s:
                left, right = frame.x(time_s), frame.x(end_s)
                path.append(f"M{left} {frame.floor}V{frame.y(segment.uplink_mbps)}H{right}")
                path.append(f"V{frame.floor}Z")
            time_s += segment.duration_s
    return "".join(path)


def _episodes(schedule: LinkSchedule, high_s: float) -> list[tuple[float, str]]:
    """Where the kind of link changes, within the time shown."""
    found: list[tuple[float, str]] = []
    time_s, before = 0.0, ""
    while time_s < high_s:
        for segment in schedule.segments:
            if segment.name != before and time_s < high_s:
                found.append((time_s, escape(segment.name)))
                before = segment.name
            time_s += segment.duration_s
    return found
