"""When would a cloud answer arrive: a distribution, not a point.

    T = promotion + setup RTT + T_upload(r, RTT) + T_queue + T_model + RTT + T_answer

with a log-normal rate ``r``, weighted nodes for the RTT and for the broker's tail. ``T <= t``
holds exactly when the rate is at least ``required_rate``, so for each pair of nodes the
probability is one normal CDF: Phi((m - ln r*) / sigma).

This is where deciding takes its time. Budget: 6 us a chance (ten pairs of nodes) on a core
where all decisions of a request may take 79 us; ``benchmarks/decision_cost.py`` holds it.
"""

from __future__ import annotations

import math
from math import erfc, exp, log

import msgspec

from edge_runtime.estimators.transfer import INITIAL_WINDOW_BYTES, wire_bytes
from edge_runtime.policies.base import CloudOutlook, LinkOutlook, UploadProgress

__all__ = ["Forecast", "Way", "forecast", "setup_ms"]

_RTT_NODES = ((-math.sqrt(3.0), 1 / 6), (0.0, 2 / 3), (math.sqrt(3.0), 1 / 6))
"""Gauss-Hermite quadrature of a normal with three nodes: (deviations, weight)."""
_TAIL_NODES = ((0.5858, 0.8536), (3.4142, 0.1464))
"""Gauss-Laguerre quadrature of an exponential with two nodes: (means, weight)."""
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
) -> Forecast:
    """Predict one upload that starts now, or goes on.

    ``warm``: as if radio and connection were ready. ``progress``: of an upload that is under
    way; what is acknowledged left a round trip ago, so no further one is added.
    """
    way = Way(link, cloud, upload_bytes, warm, progress)
    return Forecast(
        p_in_time=way.chance(time_left_ms), upload_ms=way.upload_ms, cloud_ms=way.cloud_ms
    )


class Way:
    """What one upload has before it, and its chances: asked several times a decision.

    All of the turn's questions about other paths (a warm one, a cold one, one with a wider
    window) are asked of the same belief about rate, round trip and broker, so what follows
    from that is worked out once.
    """

    __slots__ = (
        "cloud_ms", "later", "link", "nodes", "normal", "round_trips", "server_ms", "size_bytes",
        "tail_ms", "trips", "upload_ms", "wait_ms",
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
        size_bytes = wire_bytes(upload_bytes) + link.in_flight_bytes
        round_trips = 1 if warm else 1 + link.setup_round_trips
        wait_ms = 0.0 if warm else link.promotion_ms
        window_bytes = link.window_bytes
        fresh = link.fresh_share if progress is None else 0.0
        if progress is not None and progress.sending:
            size_bytes = max(progress.wire_bytes - progress.acknowledged_bytes, 1.0)
            window_bytes += progress.acknowledged_bytes
            round_trips, wait_ms = 0, 0.0
        self.size_bytes, self.round_trips, self.wait_ms = size_bytes, round_trips, wait_ms
        self.later = _later_rounds(size_bytes, window_bytes)
        self.server_ms = cloud.queue_ms + cloud.inference_ms + cloud.answer_ms
        self.upload_ms = _median_ms(size_bytes, link, self.later)
        """From the first byte sent until the last one arrives, at the median rate."""
        self.cloud_ms = (
            wait_ms + round_trips * link.rtt_ms + self.upload_ms + self.server_ms + cloud.tail_ms
        )
        """Until the answer is there, likewise."""
        self.tail_ms = cloud.tail_ms
        self.trips = _trips(link)
        self.nodes = _nodes(self.trips, cloud.tail_ms)
        # half the weight of each normal; its mean in bytes per millisecond; the scale for erfc
        self.normal = (
            0.5 * (1.0 - fresh),
            link.log_rate_mean - _LOG_1E3,
            -1.0 / (_SQRT_2 * max(link.log_rate_deviation, _MIN_DEVIATION)),
            0.5 * fresh,
            link.long_run_mean - _LOG_1E3,
            -1.0 / (_SQRT_2 * max(link.long_run_deviation, _MIN_DEVIATION)),
        )

    def chance(self, time_left_ms: float) -> float:
        """P(the answer comes within ``time_left_ms``)."""
        budget_ms = time_left_ms - self.server_ms - self.wait_ms
        return self._within(budget_ms, self.round_trips, self.size_bytes, self.later)

    def chance_if(self, time_left_ms: float, wait_ms: float, setup_round_trips: int) -> float:
        """The same, were the radio ready in ``wait_ms``, the connection so far from open."""
        budget_ms = time_left_ms - self.server_ms - wait_ms
        return self._within(budget_ms, 1 + setup_round_trips, self.size_bytes, self.later)

    def _within(
        self,
        budget_ms: float,
        round_trips: int,
        size_bytes: float,
        later: list[tuple[int, float]],
    ) -> float:
        if budget_ms <= 0.0:
            return 0.0
        kept, mean, scale, fresh, fresh_mean, fresh_scale = self.normal
        last = len(later)
        found = 0.0
        for rtt_ms, queue_ms, weight in self.nodes:
            time_ms = budget_ms - round_trips * rtt_ms - queue_ms
            if time_ms <= last * rtt_ms:
                continue
            needed = size_bytes / time_ms
            for j, rest in later:
                # B_j falls ever faster and the time evenly: up, then down
                rate = rest / (time_ms - j * rtt_ms)
                if rate <= needed:
                    break
                needed = rate
            log_needed = log(needed)
            p = kept * erfc((mean - log_needed) * scale)
            if fresh > 0.0:
                p += fresh * erfc((fresh_mean - log_needed) * fresh_scale)
            found += weight * p
        return min(found, 1.0) * (1.0 - self.link.outage)

    def chances_by_window(self, upload_bytes: int, time_left_ms: float) -> tuple[float, float]:
        """On a warm path: with a window that an upload has opened, and with an initial one.

        Their difference counts: the mean of the broker's tail is enough for it.
        """
        budget_ms = time_left_ms - self.server_ms - self.tail_ms
        if budget_ms <= 0.0:
            return 0.0, 0.0
        size_bytes = wire_bytes(upload_bytes)
        later = _later_rounds(size_bytes, INITIAL_WINDOW_BYTES)
        kept, mean, scale, fresh, fresh_mean, fresh_scale = self.normal
        last = len(later)
        wide = narrow = 0.0
        for rtt_ms, weight in self.trips:
            time_ms = budget_ms - rtt_ms
            if time_ms <= 0.0:
                continue
            plain = needed = size_bytes / time_ms
            log_needed = log(plain)
            p = kept * erfc((mean - log_needed) * scale)
            if fresh > 0.0:
                p += fresh * erfc((fresh_mean - log_needed) * fresh_scale)
            wide += weight * p
            if time_ms <= last * rtt_ms:
                continue
            for j, rest in later:
                rate = rest / (time_ms - j * rtt_ms)
                if rate <= needed:
                    break
                needed = rate
            if needed > plain:
                log_needed = log(needed)
                p = kept * erfc((mean - log_needed) * scale)
                if fresh > 0.0:
                    p += fresh * erfc((fresh_mean - log_needed) * fresh_scale)
            narrow += weight * p
        there = 1.0 - self.link.outage
        return min(wide, 1.0) * there, min(narrow, 1.0) * there


def _later_rounds(size_bytes: float, window_bytes: float) -> list[tuple[int, float]]:
    """``transfer.slow_start_rounds``, the first one left out."""
    later = []
    left, window, j = size_bytes, window_bytes, 1
    while left > window:
        left -= window
        window *= 2
        later.append((j, left))
        j += 1
    return later


def _median_ms(size_bytes: float, link: LinkOutlook, later: list[tuple[int, float]]) -> float:
    """``transfer.upload_ms`` at the median rate."""
    rate = exp(link.log_rate_mean)
    if rate <= 0.0:
        return math.inf
    rtt_ms = link.rtt_ms
    longest_ms = 1000.0 * size_bytes / rate
    for j, left in later:
        time_ms = j * rtt_ms + 1000.0 * left / rate
        if time_ms <= longest_ms:
            break
        longest_ms = time_ms
    return longest_ms


def _nodes(trips: list[tuple[float, float]], tail_ms: float) -> list[tuple[float, float, float]]:
    """Round trips, waits for the broker, and their weights."""
    if not tail_ms > 0.0:
        return [(rtt_ms, 0.0, weight) for rtt_ms, weight in trips]
    (soon, likely), (late, rarely) = _TAIL_NODES
    soon_ms, late_ms = soon * tail_ms, late * tail_ms
    nodes = []
    for rtt_ms, weight in trips:
        nodes.append((rtt_ms, soon_ms, weight * likely))
        nodes.append((rtt_ms, late_ms, weight * rarely))
    return nodes


def _trips(link: LinkOutlook) -> list[tuple[float, float]]:
    """Round trips and their weights."""
    rtts = link.rtt_nodes_ms
    if rtts:
        weight = 1.0 / len(rtts)
        return [(rtt_ms, weight) for rtt_ms in rtts]
    floor_ms = link.rtt_ms / 4
    return [
        (max(link.rtt_ms + deviations * link.rtt_deviation_ms, floor_ms), weight)
        for deviations, weight in _RTT_NODES
    ]
