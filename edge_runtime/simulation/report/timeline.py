"""One session: the uplink's rate over time, and under it where each request was answered."""

from __future__ import annotations

import math
from html import escape
from typing import Final

import numpy as np

from edge_runtime.simulation.records import ACTION_CODES
from edge_runtime.simulation.report.cells import Session
from edge_runtime.simulation.report.plot import Frame, log_ticks, ticks

__all__ = ["WINDOW_S", "timeline_chart"]

WINDOW_S: Final = 60.0
_HEIGHT: Final = 360
_LANES: Final = {"cloud": 46, "held": 32, "device": 18}
_LANE_NAMES: Final = {"cloud": "cloud", "held": "asked", "device": "device", "ping": "ping"}
_PING_LANE: Final = 6
_MAX_EVENTS: Final = 4_000
_ACTIONS: Final = {code: name for name, code in ACTION_CODES.items()}


def timeline_chart(session: Session) -> str:
    """A minute of one run: the one with most requests."""
    run = session.run
    start_s = _busiest(run.arrived_s)
    end_s = start_s + WINDOW_S
    bins = session.rates_mbps[round(start_s * 10) : round(end_s * 10)]
    positive = bins[bins > 0]
    high = 1.3 * float(positive.max(initial=1.0))
    least = max(float(positive.min(initial=high / 10)), high / 1e3)
    low = least / 12
    frame = Frame(
        "Uplink rate over time and where each request was answered",
        _HEIGHT,
        (start_s, end_s),
        (low, high),
        log_y=True,
    )
    rate_ticks = log_ticks(least, high)
    powers = {value: text for value, text in rate_ticks.items() if math.log10(value) % 1 == 0}
    rate_ticks = powers if len(powers) > 1 else rate_ticks
    frame.axes("seconds", ticks(start_s, end_s), "uplink, Mbit/s", rate_ticks)
    frame.add(f'<path class="rate" d="{_area(frame, bins, start_s, low)}"/>')
    for name, lane in (*_LANES.items(), ("ping", _PING_LANE)):
        frame.add(
            f'<text class="lane" x="58" y="{frame.floor - lane + 4}" text-anchor="end">'
            f"{_LANE_NAMES[name]}</text>"
        )
    for event in run.events[:_MAX_EVENTS]:
        if event.kind == "ping" and start_s <= event.time_s < end_s:
            x = frame.x(event.time_s)
            frame.add(
                f'<path class="ping" d="M{x} {frame.floor - _PING_LANE - 4}v8">'
                f"<title>keep-warm ping at {event.time_s:.2f} s</title></path>"
            )
    for number in np.flatnonzero((run.arrived_s >= start_s) & (run.arrived_s < end_s)):
        frame.add(_request(frame, session, int(number)))
    return frame.svg()


def _busiest(arrived_s: np.ndarray) -> float:
    """Start of the minute with most arrivals, whole seconds; the first of them."""
    last = float(arrived_s[-1]) if arrived_s.size else 0.0
    starts = np.arange(0.0, max(last - WINDOW_S, 0.0) + 1.0, 5.0)
    counts = [((arrived_s >= s) & (arrived_s < s + WINDOW_S)).sum() for s in starts]
    return float(starts[int(np.argmax(counts))])


def _area(frame: Frame, bins: np.ndarray, start_s: float, low: float) -> str:
    """An area under the rate; an outage is a gap."""
    path = []
    edges = np.flatnonzero(np.diff(np.concatenate(([0], (bins > low).astype(int), [0]))))
    for first, last in edges.reshape(-1, 2):
        path.append(f"M{frame.x(start_s + first / 10)} {frame.floor}")
        for i in range(first, last):
            path.append(f"V{frame.y(float(bins[i]))}H{frame.x(start_s + (i + 1) / 10)}")
        path.append(f"V{frame.floor}Z")
    return "".join(path)


def _request(frame: Frame, session: Session, number: int) -> str:
    run = session.run
    at_s, latency_ms = float(run.arrived_s[number]), float(run.latency_ms[number])
    in_time = latency_ms <= float(run.deadline_ms[number])
    where = "cloud" if run.source_cloud[number] else "held" if run.offloaded[number] else "device"
    said = {"cloud": "cloud", "held": "uploaded, device in time", "device": "device"}[where]
    answer = f"{said}, {latency_ms:.0f} ms" if math.isfinite(latency_ms) else "no answer"
    chance = float(run.p_cloud[number])
    action = _ACTIONS.get(int(run.action[number]), "")
    title = f"{at_s:.2f} s: {action}, {answer}" + (
        f", cloud in time predicted {100 * chance:.0f} %" if math.isfinite(chance) else ""
    )
    missed = "" if in_time else " wrong"
    return (
        f'<circle class="{where}{missed}" cx="{frame.x(at_s)}" '
        f'cy="{frame.floor - _LANES[where]}" r="4"><title>{escape(title)}</title></circle>'
    )
