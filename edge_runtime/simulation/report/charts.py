"""Charts of a simulation: figures against each other, latency, calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

import numpy as np

from edge_runtime.simulation.calibration import Bin, weighted_quantiles
from edge_runtime.simulation.report.cells import Cell, is_drawn
from edge_runtime.simulation.report.plot import Frame, Label, log_ticks, place_labels, ticks
from edge_runtime.simulation.scores import (
    LOCAL_ONLY,
    PolicyScore,
    is_bound,
)

__all__ = ["latency_chart", "reliability_chart", "tradeoff_chart", "utility_chart"]

_LOWEST_GAIN: Final = -0.2
_CURVE_POINTS: Final = 160
_MIN_BIN: Final = 20


def utility_chart(cells: Sequence[Cell], colors: Mapping[str, str]) -> str:
    """Net utility against the deadline, a line for each policy; cells of one device."""
    ordered = sorted(cells, key=lambda cell: cell.result.deadline_ms)
    points = {
        policy: [
            (cell.result.deadline_ms, 100 * cell.scores[policy].net_utility)
            for cell in ordered
            if policy in cell.scores
        ]
        for policy in colors
    }
    # Who does worse than the device alone would press the others into one line: they leave
    # the plot instead.
    floor = min(100 * cell.scores[LOCAL_ONLY].net_utility for cell in ordered) - 2.0
    best = max(value for policy in points for _, value in points[policy])
    low, high = math.floor(floor), math.ceil(best + 0.5)
    deadlines = [cell.result.deadline_ms for cell in ordered]
    frame = Frame(
        "Net utility against the deadline", 320, (deadlines[0], deadlines[-1]), (low, high)
    )
    frame.axes(
        "deadline, ms",
        {deadline: f"{deadline:g}" for deadline in deadlines},
        "net utility, points",
        ticks(low, high),
    )
    for policy in _back_to_front(colors):
        shown = [(x, y) for x, y in points[policy] if y >= low and is_drawn(policy)]
        frame.line(shown, f"curve {colors[policy]}", policy)
        for x, y in shown:
            frame.add(_dot(frame.x(x), frame.y(y), 3, colors[policy], f"{policy}: {y:.1f}"))
    return frame.svg()


def latency_chart(cell: Cell, colors: Mapping[str, str]) -> str:
    """Share of requests answered within a time, a curve for each policy, traces weighing alike."""
    deadline_ms = cell.result.deadline_ms
    curves = {policy: _latencies(cell, policy) for policy in cell.scores if is_drawn(policy)}
    finite = [ms for curve in curves.values() for ms, _ in curve]
    low = max(1.0, 0.8 * min(finite, default=1.0))
    high = max(1.5 * deadline_ms, min(1.05 * max(finite, default=1.0), 20 * deadline_ms))
    frame = Frame(
        "Share of requests answered within a time", 320, (low, high), (0, 100), log_x=True
    )
    frame.axes(
        "answered within, ms (logarithmic)", log_ticks(low, high), "requests, %", ticks(0, 100)
    )
    frame.mark(deadline_ms, "deadline", low=True)
    for policy in _back_to_front(colors):
        points = [(ms, 100 * share) for ms, share in curves.get(policy, []) if ms <= high]
        if points:
            start = [(max(low, points[0][0]), 0.0)]
            frame.line([*start, *points], f"curve {colors[policy]}", policy)
    return frame.svg()


def _latencies(cell: Cell, policy: str) -> list[tuple[float, float]]:
    """Quantiles of the latency, by share; as far as there are answers."""
    runs = [run for run in cell.result.runs if run.policy == policy]
    count: dict[str, int] = {}
    for run in runs:
        count[run.trace] = count.get(run.trace, 0) + run.latency_ms.size
    values = np.concatenate([run.latency_ms for run in runs])
    weights = np.concatenate([np.full(run.latency_ms.size, 1 / count[run.trace]) for run in runs])
    shares = [(i + 0.5) / _CURVE_POINTS for i in range(_CURVE_POINTS)]
    found = weighted_quantiles(values, weights, shares).tolist()
    return [(ms, share) for ms, share in zip(found, shares, strict=True) if math.isfinite(ms)]


def tradeoff_chart(cell: Cell, colors: Mapping[str, str]) -> str:
    """Gain capture against mean latency; a point's area is the kilobytes per request."""
    points = [
        (policy, found, found.mean_ms, found.gain_capture.mean)
        for policy, found in cell.scores.items()
        if is_drawn(policy) and found.mean_ms is not None and found.gain_capture.mean is not None
    ]
    if not points:
        return ""
    slowest = 1.3 * max(ms for _, _, ms, _ in points if ms is not None)
    fastest = 0.8 * min(ms for _, _, ms, _ in points if ms is not None)
    lowest = min(0.0, max(_LOWEST_GAIN, *(gain for *_, gain in points if gain is not None)))
    lowest = min([lowest, *(max(g, _LOWEST_GAIN) for *_, g in points if g is not None)]) - 0.06
    highest = max(1.0, *(gain for *_, gain in points if gain is not None)) + 0.08
    frame = Frame(
        "Gain capture against mean latency",
        400,
        (fastest, slowest),
        (lowest, highest),
        log_x=True,
    )
    marks = {value / 5: f"{20 * value}" for value in range(-1, 6) if lowest <= value / 5}
    frame.axes(
        "mean latency, ms (logarithmic)", log_ticks(fastest, slowest), "gain capture, %", marks
    )
    labels, dots = [], []
    front = _back_to_front(colors)
    for policy, found, mean_ms, gain in sorted(points, key=lambda point: front.index(point[0])):
        assert mean_ms is not None  # noqa: S101  # filtered above
        assert gain is not None  # noqa: S101
        x, y = frame.x(mean_ms), frame.y(max(gain, _LOWEST_GAIN))
        radius = 4 + 1.1 * math.sqrt(found.kb_per_request)
        below = gain < _LOWEST_GAIN
        text = f"{policy} ({100 * gain:.0f} %, below)" if below else policy
        title = (
            f"{policy}: gain {100 * gain:.1f} %, mean {mean_ms:.0f} ms, "
            f"{found.kb_per_request:.0f} kB per request"
        )
        dots.append(_dot(x, y, radius, colors[policy], title))
        order = (colors[policy] == "rest", -gain)
        labels.append((order, Label(x=x, y=y, radius=radius, text=text)))
    for dot in dots:
        frame.add(dot)
    for markup in place_labels([label for _, label in sorted(labels, key=_first)], frame.floor):
        frame.add(markup)
    return frame.svg()


def _first(pair: tuple[tuple[bool, float], Label]) -> tuple[bool, float]:
    return pair[0]


def reliability_chart(scores: Mapping[str, PolicyScore], colors: Mapping[str, str]) -> str:
    """What was predicted against what came of it, of policies that predict."""
    frame = Frame("Predicted against observed answers in time", 380, (0, 1), (0, 1))
    marks = {value / 5: f"{20 * value}" for value in range(6)}
    frame.axes("predicted chance of a cloud answer in time, %", marks, "observed, %", marks)
    frame.line([(0, 0), (1, 1)], "ideal", "as predicted")
    for policy in _back_to_front(colors):
        found = scores.get(policy)
        if found is None or is_bound(policy):
            continue
        bins = [_shown(bin_) for bin_ in found.reliability if bin_.n >= _MIN_BIN]
        if not bins:
            continue
        frame.line([(x, y) for x, y, _ in bins], f"curve thin {colors[policy]}", policy)
        for x, y, n in bins:
            radius = min(9.0, 2 + 0.9 * math.log10(n) ** 2 / 1.5)
            title = f"{policy}: predicted {100 * x:.0f} %, observed {100 * y:.0f} % of {n}"
            frame.add(_dot(frame.x(x), frame.y(y), radius, colors[policy], title))
    return frame.svg()


def _shown(found: Bin) -> tuple[float, float, int]:
    assert found.predicted is not None  # noqa: S101  # n > 0
    assert found.observed is not None  # noqa: S101
    return found.predicted, found.observed, found.n


def _dot(x: float, y: float, radius: float, css_class: str, title: str) -> str:
    return (
        f'<circle class="dot {css_class}" cx="{x}" cy="{y}" r="{radius:.1f}">'
        f"<title>{escape(title)}</title></circle>"
    )


def _back_to_front(colors: Mapping[str, str]) -> list[str]:
    """Gray curves first, so that they never cover a colored one."""
    order = ("rest", "bound", "c3", "c2", "c1", "cloud", "local", "own3", "own2", "own")
    return sorted(colors, key=lambda policy: order.index(colors[policy]))
