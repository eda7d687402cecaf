"""One logged decision in time: what was expected of each side, and what came."""

from __future__ import annotations

from typing import Final

import msgspec

from edge_runtime.log.entries import LogEntry, Step
from edge_runtime.policies.base import CloudOutlook, LinkOutlook, Situation
from edge_runtime.policies.forecast import forecast

__all__ = ["Quantiles", "Timeline", "cloud_quantiles", "numbers_of", "timeline"]

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
    deadline_ms = max(situation.time_left_ms, 0.0)
    expected = quantiles = None
    if local is not None and situation.confidence is None:
        start = local.queue_wait_ms + step.decision.local_start_ms
        expected = (start, start + local.p50_ms, start + max(local.p95_ms, local.p50_ms))
    if link is not None and cloud is not None:
        horizon_ms = _HORIZON * max(deadline_ms, 1.0)
        quantiles = cloud_quantiles(link, cloud, situation.upload_bytes, horizon_ms)
    return Timeline(
        deadline_ms=deadline_ms,
        local_ms=expected,
        cloud=quantiles,
        upload_ms=step.decision.predicted_upload_ms,
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
