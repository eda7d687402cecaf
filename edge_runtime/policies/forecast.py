"""When would a cloud answer arrive: a distribution, not a point.

    T = setup RTT + T_upload(r, RTT) + T_queue + T_model + RTT + T_answer

with a log-normal rate ``r`` and three weighted nodes for the RTT. ``T <= t`` holds exactly
when the rate is at least ``required_rate``, so for each node the probability is one normal
CDF: Phi((m - ln r*) / sigma).
"""

from __future__ import annotations

import math

import msgspec

from edge_runtime.estimators.transfer import required_rate, upload_ms, wire_bytes
from edge_runtime.policies.base import CloudOutlook, LinkOutlook

__all__ = ["Forecast", "forecast"]

_RTT_NODES = ((-math.sqrt(3.0), 1 / 6), (0.0, 2 / 3), (math.sqrt(3.0), 1 / 6))
"""Gauss-Hermite quadrature of a normal with three nodes: (deviations, weight)."""
_MIN_DEVIATION = 0.05


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """Probability of an answer in time, and what to expect at the median rate."""

    p_in_time: float
    upload_ms: float
    cloud_ms: float


def forecast(
    link: LinkOutlook,
    cloud: CloudOutlook,
    upload_bytes: int,
    time_left_ms: float,
    *,
    warm: bool = False,
) -> Forecast:
    """Predict one upload that starts now; ``warm``: as if the connection were open."""
    size_bytes = wire_bytes(upload_bytes) + link.in_flight_bytes
    round_trips = 1 if warm else 1 + link.setup_round_trips
    server_ms = cloud.queue_ms + cloud.inference_ms + cloud.answer_ms
    deviation = max(link.log_rate_deviation, _MIN_DEVIATION)
    p_in_time = 0.0
    for deviations, weight in _RTT_NODES:
        rtt_ms = max(link.rtt_ms + deviations * link.rtt_deviation_ms, link.rtt_ms / 4)
        budget_ms = time_left_ms - server_ms - round_trips * rtt_ms
        needed = required_rate(size_bytes, budget_ms, rtt_ms, link.window_bytes)
        if needed < math.inf:
            z = (link.log_rate_mean - math.log(needed)) / deviation
            p_in_time += weight * 0.5 * math.erfc(-z / math.sqrt(2.0))
    median_ms = upload_ms(size_bytes, math.exp(link.log_rate_mean), link.rtt_ms, link.window_bytes)
    return Forecast(
        p_in_time=min(p_in_time, 1.0),
        upload_ms=median_ms,
        cloud_ms=round_trips * link.rtt_ms + median_ms + server_ms,
    )
