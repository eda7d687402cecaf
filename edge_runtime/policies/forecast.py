"""When would a cloud answer arrive: a distribution, not a point.

    T = promotion + setup RTT + T_upload(r, RTT) + T_queue + T_model + RTT + T_answer

with a log-normal rate ``r``, weighted nodes for the RTT and for the broker's tail. ``T <= t``
holds exactly when the rate is at least ``required_rate``, so for each pair of nodes the
probability is one normal CDF: Phi((m - ln r*) / sigma).
"""

from __future__ import annotations

import math

import msgspec

from edge_runtime.estimators.transfer import upload_ms, wire_bytes
from edge_runtime.policies.base import CloudOutlook, LinkOutlook, UploadProgress

__all__ = ["Forecast", "Way", "chance", "forecast", "setup_ms"]

_RTT_NODES = ((-math.sqrt(3.0), 1 / 6), (0.0, 2 / 3), (math.sqrt(3.0), 1 / 6))
"""Gauss-Hermite quadrature of a normal with three nodes: (deviations, weight)."""
_TAIL_NODES = ((0.5858, 0.8536), (3.4142, 0.1464))
"""Gauss-Laguerre quadrature of an exponential with two nodes: (means, weight)."""
_NO_TAIL = ((0.0, 1.0),)
_MIN_DEVIATION = 0.05
_SQRT_2 = math.sqrt(2.0)
_LOG_1E3 = math.log(1e3)


class Forecast(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Probability of an answer in time, and what to expect at the median rate."""

    p_in_time: float
    upload_ms: float
    cloud_ms: float


def setup_ms(link: LinkOutlook) -> float:
    """Before the first byte of a body can leave."""
    return link.promotion_ms + link.setup_round_trips * link.rtt_ms


def forecast(
    link: LinkOutlook,
    cloud: CloudOutlook,
    upload_bytes: int,
    time_left_ms: float,
    *,
    warm: bool = False,
    progress: UploadProgress | None = None,
    tails: tuple[tuple[float, float], ...] | None = None,
) -> Forecast:
    """Predict one upload that starts now, or goes on.

    The rate that a pair of nodes needs is ``estimators.transfer.required_rate``, its rounds
    taken out of the loop. ``tails``: other nodes for the broker's tail.

    ``warm``: as if radio and connection were ready. ``progress``: of an upload that is under
    way; what is acknowledged left a round trip ago, so no further one is added.
    """
    return Way(link, cloud, upload_bytes, warm, progress).forecast(time_left_ms, tails)


def chance(link: LinkOutlook, cloud: CloudOutlook, upload_bytes: int, time_left_ms: float) -> float:
    """``forecast(...).p_in_time`` alone, for an upload that starts now."""
    return Way(link, cloud, upload_bytes).chance(time_left_ms)


class Way:
    """What an upload has before it. Asked several times a decision: plain loops throughout."""

    __slots__ = (
        "cloud", "fresh", "later", "link", "median_ms", "nodes", "round_trips", "server_ms",
        "size_bytes", "wait_ms", "window_bytes",
    )  # fmt: skip

    def __init__(
        self,
        link: LinkOutlook,
        cloud: CloudOutlook,
        upload_bytes: int,
        warm: bool = False,
        progress: UploadProgress | None = None,
    ) -> None:
        self.link = link
        self.cloud = cloud
        self.size_bytes = wire_bytes(upload_bytes) + link.in_flight_bytes
        self.round_trips = 1 if warm else 1 + link.setup_round_trips
        self.wait_ms = 0.0 if warm else link.promotion_ms
        self.window_bytes = link.window_bytes
        self.fresh = link.fresh_share if progress is None else 0.0
        if progress is not None and progress.sending:
            self.size_bytes = max(progress.wire_bytes - progress.acknowledged_bytes, 1.0)
            self.window_bytes += progress.acknowledged_bytes
            self.round_trips, self.wait_ms = 0, 0.0
        self.server_ms = cloud.queue_ms + cloud.inference_ms + cloud.answer_ms
        self.nodes = _rtt_nodes(link)
        self.later: list[tuple[int, float]] = []
        """``slow_start_rounds``, the first one left out."""
        left, window = self.size_bytes, self.window_bytes
        while left > window:
            left -= window
            window *= 2
            self.later.append((len(self.later) + 1, left))
        self.median_ms: float | None = None

    def forecast(
        self, time_left_ms: float, tails: tuple[tuple[float, float], ...] | None = None
    ) -> Forecast:
        """The chance within ``time_left_ms``, and what to expect at the median rate."""
        link = self.link
        if self.median_ms is None:
            self.median_ms = upload_ms(
                self.size_bytes, math.exp(link.log_rate_mean), link.rtt_ms, self.window_bytes
            )
        wait_ms = self.wait_ms + self.round_trips * link.rtt_ms
        return Forecast(
            p_in_time=self.chance(time_left_ms, tails),
            upload_ms=self.median_ms,
            cloud_ms=wait_ms + self.median_ms + self.server_ms + self.cloud.tail_ms,
        )

    def chance(
        self, time_left_ms: float, tails: tuple[tuple[float, float], ...] | None = None
    ) -> float:
        """P(the answer comes within ``time_left_ms``)."""
        link, fresh, tail_ms = self.link, self.fresh, self.cloud.tail_ms
        budget_ms = time_left_ms - self.server_ms - self.wait_ms
        if budget_ms <= 0.0:
            return 0.0
        if tails is None:
            tails = _TAIL_NODES if tail_ms > 0 else _NO_TAIL
        scale = -1.0 / (_SQRT_2 * max(link.log_rate_deviation, _MIN_DEVIATION))
        fresh_scale = -1.0 / (_SQRT_2 * max(link.long_run_deviation, _MIN_DEVIATION))
        # rates below are bytes per millisecond
        mean, long_run_mean = link.log_rate_mean - _LOG_1E3, link.long_run_mean - _LOG_1E3
        size_bytes, round_trips = self.size_bytes, self.round_trips
        later, log, erfc = self.later, math.log, math.erfc
        last = len(later)
        queues = [(means * tail_ms, weight) for means, weight in tails]
        found = 0.0
        for rtt_ms, rtt_weight in self.nodes:
            left_ms = budget_ms - round_trips * rtt_ms
            for queue_ms, weight in queues:
                time_ms = left_ms - queue_ms
                if time_ms - last * rtt_ms <= 0.0:
                    continue
                needed = size_bytes / time_ms  # by the slowest round
                for j, rest in later:
                    rate = rest / (time_ms - j * rtt_ms)
                    if rate > needed:
                        needed = rate
                log_needed = log(needed)
                p = 0.5 * erfc((mean - log_needed) * scale)
                if fresh > 0.0:
                    p += fresh * (0.5 * erfc((long_run_mean - log_needed) * fresh_scale) - p)
                found += rtt_weight * weight * p
        return min(found, 1.0) * (1.0 - link.outage)


def _rtt_nodes(link: LinkOutlook) -> tuple[tuple[float, float], ...]:
    nodes = link.rtt_nodes_ms
    if nodes:
        weight = 1.0 / len(nodes)
        return tuple((rtt_ms, weight) for rtt_ms in nodes)
    floor_ms = link.rtt_ms / 4
    return tuple(
        (max(link.rtt_ms + deviations * link.rtt_deviation_ms, floor_ms), weight)
        for deviations, weight in _RTT_NODES
    )
