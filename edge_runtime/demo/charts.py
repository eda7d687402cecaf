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
from edge_runtime.simulation.report.plot import RIGHT, TOP, WIDTH, Frame, log_ticks, ticks

__all__ = ["accuracy_chart", "latency_chart", "timeline_chart"]

_MODE_CLASS: Final = {
    "ONLY_ON_DEVICE": "device",
    "ONLY_IN_CLOUD": "cloud",
    "ADAPTIVE": "adaptive",
}


def accuracy_chart(scores: Mapping[str, ModeScore]) -> str:
    """Accuracy within the deadline against megabytes uploaded, a point for each mode."""
    megabytes = {mode: score.uploaded_bytes / 1e6 for mode, score in scores.items()}
    percent = {mode: 100 * score.accuracy_in_deadline for mode, score in scores.items()}
    high_x = max(max(megabytes.values()) * 1.15, 0.1)
    low_y = max(0.0, 10 * math.floor(min(percent.values()) / 10 - 0.2))
    frame = Frame("Accuracy within the deadline against bytes", 300, (0, high_x), (low_y, 100))
    frame.axes(
        "uploaded, MB",
        ticks(0, high_x),
        "right within the deadline, %",
        ticks(low_y, 100),
    )
    for mode, value in percent.items():
        x, y = frame.x(megabytes[mode]), frame.y(value)
        at_end = x > WIDTH * 0.7
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
    frame = Frame("Share of requests answered within a time", 300, (1, high), (0, 100), log_x=True)
    frame.axes(
        "answered within, ms (logarithmic)", log_ticks(1, high), "requests, %", ticks(0, 100)
    )
    frame.mark(deadline_ms, "deadline")
    for mode, found in records.items():
        latencies = sorted(record.latency_ms for record in found if record.answered)
        path = [f"M{frame.x(1)} {frame.y(0)}"]
        for done, latency in enumerate(latencies, 1):
            path.append(f"H{frame.x(latency)}V{frame.y(100 * done / len(found))}")
        if latencies:
            path.append(f"H{WIDTH - RIGHT}")
        frame.add(f'<path class="curve {_MODE_CLASS[mode]}" d="{"".join(path)}"/>')
    return frame.svg()


def timeline_chart(
    records: Sequence[RequestRecord], schedule: LinkSchedule, killed_s: float | None
) -> str:
    """The uplink rate over time, and below it where each adaptive request was answered."""
    high_s = max(record.link_s for record in records) + 0.05
    rates = [segment.uplink_mbps for segment in schedule.segments if segment.uplink_mbps > 0]
    low, high = min(rates) / 12, max(rates) * 1.3
    frame = Frame(
        "Uplink rate over time and where each request ran", 330, (0, high_s), (low, high),
        log_y=True,
    )  # fmt: skip
    powers = range(math.floor(math.log10(min(rates))), math.ceil(math.log10(high)) + 1)
    y_ticks = {10.0**p: f"{10.0**p:g}" for p in powers if min(rates) <= 10.0**p <= high}
    frame.axes("seconds since the link started", ticks(0, high_s), "uplink, Mbit/s", y_ticks)
    frame.add(f'<path class="rate" d="{_rate_path(frame, schedule, high_s)}"/>')
    for number, (start_s, name) in enumerate(_episodes(schedule, 0.95 * high_s)):
        row = TOP + 10 + 14 * (number % 2)  # two rows: a short episode's name outgrows it
        frame.add(f'<text class="episode" x="{frame.x(start_s) + 4}" y="{row}">{name}</text>')
    if killed_s is not None:
        x = frame.x(killed_s)
        frame.add(f'<line class="deadline" x1="{x}" x2="{x}" y1="{TOP}" y2="{frame.floor}"/>')
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


def _rate_path(frame: Frame, schedule: LinkSchedule, high_s: float) -> str:
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
