"""One logged decision in time: what was expected of each side, and what came."""

from __future__ import annotations

import math
from typing import Final

import msgspec

from edge_runtime.log.entries import LogEntry, Step
from edge_runtime.policies.base import CloudOutlook, LinkOutlook, Situation
from edge_runtime.policies.forecast import forecast

__all__ = [
    "Quantiles",
    "Timeline",
    "cloud_quantiles",
    "drawable",
    "elapsed_ms",
    "numbers_of",
    "timeline",
]

_FOREVER_MS: Final = 1e9

_HORIZON: Final = 4.0
"""Of the time left: later answers are only "later"."""
_STEPS: Final = 40
Quantiles = tuple[float | None, float | None, float | None]
"""Milliseconds at 10, 50 and 90 %; None: later than the horizon, or never."""


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds after the question that the step answers."""

    deadline_ms: float
    """When the answer must leave."""
    local_ms: tuple[float, float, float] | None
    """A local run as expected: its start, its median and its 95th percentile end."""
    cloud: Quantiles | None
    """When the cloud's answer was expected; None: there is no broker."""
    upload_ms: float | None
    """Median end of the upload itself."""


def drawable(milliseconds: float | None) -> float:
    """0 to eleven days: a log may hold any number, a picture only these. NaN counts as 0."""
    if milliseconds is None or math.isnan(milliseconds):
        return 0.0
    return min(max(milliseconds, 0.0), _FOREVER_MS)


def cloud_quantiles(
    link: LinkOutlook, cloud: CloudOutlook, upload_bytes: int, horizon_ms: float
) -> Quantiles:
    """When an upload that starts now is answered, by the policies' own forecast.

    The forecast gives P(answer by t), which rises with t: its inverse is found by halving.
    """

    def find(share: float) -> float | None:
        low, high = 0.0, horizon_ms
        if forecast(link, cloud, upload_bytes, high).p_in_time < share:
            return None
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if forecast(link, cloud, upload_bytes, middle).p_in_time < share:
                low = middle
            else:
                high = middle
        return high

    return find(0.1), find(0.5), find(0.9)


def timeline(step: Step) -> Timeline:
    """The expectations of one step."""
    situation: Situation = step.situation
    local, link, cloud = situation.local, situation.link, situation.cloud
    deadline_ms = drawable(situation.time_left_ms)
    expected = quantiles = None
    if local is not None and situation.confidence is None:
        start = drawable(local.queue_wait_ms + step.decision.local_start_ms)
        median = start + drawable(local.p50_ms)
        expected = (start, median, max(median, start + drawable(local.p95_ms)))
    if link is not None and cloud is not None:
        horizon_ms = _HORIZON * max(deadline_ms, 1.0)
        try:
            quantiles = cloud_quantiles(link, cloud, situation.upload_bytes, horizon_ms)
        except (ArithmeticError, ValueError):  # numbers that no runtime writes
            quantiles = None
    upload_ms = step.decision.predicted_upload_ms
    return Timeline(
        deadline_ms=deadline_ms,
        local_ms=expected,
        cloud=quantiles,
        upload_ms=None if upload_ms is None else drawable(upload_ms),
    )


def numbers_of(step: Step) -> tuple[tuple[str, float], ...]:
    """Every number and flag that the decision carries, nested ones by a dotted name."""
    found: list[tuple[str, float]] = []
    _collect(msgspec.to_builtins(step.decision), "", found)
    return tuple(found)


def _collect(value: object, name: str, found: list[tuple[str, float]]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _collect(item, f"{name}.{key}" if name else str(key), found)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _collect(item, f"{name}.{number}", found)
    elif isinstance(value, bool | int | float):
        found.append((name, float(value)))


def elapsed_ms(entry: LogEntry) -> tuple[float, ...]:
    """When each step's question was put, after the first one."""
    left = [step.situation.time_left_ms for step in entry.steps]
    return tuple(left[0] - one for one in left)
