"""What a simulated device knows: what it has observed, and the ``Situation`` that follows.

Nothing here looks at the world's future.
"""

from __future__ import annotations

import random

from edge_runtime.conditions import Conditions
from edge_runtime.estimators import LocalEstimator
from edge_runtime.estimators.arrivals import ArrivalEstimator
from edge_runtime.estimators.baselines import BaselineMemory
from edge_runtime.estimators.energy import radio_power
from edge_runtime.estimators.path import PathEstimator
from edge_runtime.offload.breaker import Breaker
from edge_runtime.policies.base import (
    CloudOutlook,
    LinkOutlook,
    LocalOutlook,
    Situation,
    UploadProgress,
)
from edge_runtime.simulation.executor import LocalWorker, thermal_state
from edge_runtime.simulation.requests import Request
from edge_runtime.simulation.transport import Path, crossed_bytes, fresh_path
from edge_runtime.simulation.world import World

__all__ = ["DeviceKnowledge"]


class DeviceKnowledge:
    """Estimates, the path and the local worker; ``DeviceRun`` moves them."""

    def __init__(self, world: World, path: Path | None) -> None:
        self._world = world
        self._now = 0.0
        self._path = path or fresh_path()
        self._active: list[Request] = []
        self._worker = LocalWorker(world)
        self._radio = radio_power(world.radio)
        self._estimates = PathEstimator.prior(world.radio)
        self._arrivals = ArrivalEstimator()
        self._memory = BaselineMemory()
        median_ms = world.device.local_median_ms
        self._local = LocalEstimator.of([0.9 * median_ms, median_ms, 1.1 * median_ms])
        self._latency_ms = (median_ms, 1.2 * median_ms)
        seeded = random.Random(world.seed)  # noqa: S311  # jitter of a breaker, no secret
        self._breaker = Breaker(seeded.random)

    def _situation(self, request: Request, confidence: float | None) -> Situation:
        now = self._now
        estimates = self._estimates
        upload = None
        if request.plan is not None and not request.cut:
            upload = self._progress(request)
            if upload.sending and not upload.answered:
                acknowledged = upload.acknowledged_bytes
                seen_s, seen = request.seen
                estimates = estimates.progressed(
                    acknowledged,
                    (now - self._world.round_trips.at(now) - request.plan.ready_s) * 1e3,
                    body_bytes=self._world.body_bytes[request.index],
                    window_bytes=request.plan.window_bytes,
                    now_s=now,
                    recent=(acknowledged - seen, (now - seen_s) * 1e3) if seen else None,
                )
                request.seen = (now, acknowledged)
        return Situation(
            upload_bytes=self._world.body_bytes[request.index],
            deadline_ms=self._world.deadline_s * 1e3,
            time_left_ms=(request.answer_by_s - now) * 1e3,
            local=self._local_outlook(request),
            link=self._link_outlook(request, estimates),
            cloud=self._cloud_outlook(),
            confidence=confidence,
            conditions=Conditions(
                link_type=self._world.radio,
                thermal=thermal_state(self._worker.heat.level),
            ),
            upload=upload,
            arrivals=self._arrivals,
            memory=self._memory,
        )

    def _progress(self, request: Request) -> UploadProgress:
        plan = request.plan
        assert plan is not None  # noqa: S101
        rtt_s = self._world.round_trips.at(self._now)
        return UploadProgress(
            elapsed_ms=(self._now - request.submitted_s) * 1e3,
            wire_bytes=plan.wire_bytes,
            acknowledged_bytes=crossed_bytes(self._world, plan, self._now - rtt_s),
            sending=self._now > plan.ready_s,
            answered=request.cloud_held,
        )

    def _local_outlook(self, request: Request) -> LocalOutlook:
        worker, now = self._worker, self._now
        p50_ms, p95_ms = self._latency_ms
        wait_ms = 0.0
        if worker.running is not None:
            wait_ms = max(p50_ms - (now - worker.started_s) * 1e3, 0.1 * p50_ms)
        left_ms = None
        if worker.running == request.index:
            left_ms = wait_ms
        elif request.index in worker.line:
            left_ms = wait_ms + (worker.line.index(request.index) + 1) * p50_ms
        first = worker.locked_out(request.index, now + p95_ms / 1e3)
        return LocalOutlook(
            p50_ms=p50_ms,
            p95_ms=p95_ms,
            queue_wait_ms=wait_ms + p50_ms * (len(worker.line) + len(first)),
            left_ms=left_ms,
            reserved_ms=tuple(
                sorted(
                    (start_s - now) * 1e3
                    for other, start_s in worker.held.items()
                    if other != request.index and other not in first
                )
            ),
            watts=self._world.device.local_watts,
        )

    def _link_outlook(self, request: Request, estimates: PathEstimator) -> LinkOutlook:
        now = self._now
        path = self._path
        tcp = self._world.constants.tcp
        belief, round_trip = estimates.link.at(now), estimates.round_trip(now)
        in_flight = 0.0
        for other in self._active:
            plan = other.plan
            if other is not request and plan is not None:
                in_flight += plan.wire_bytes - crossed_bytes(self._world, plan, now)
        busy = bool(self._active)
        used_s = max(path.radio_until_s, -1e9)
        open_ = busy or (now - path.connection_used_s <= tcp.connection_kept_s)
        asleep = not busy and now > path.radio_until_s + self._radio.tail_s
        promotion_s = self._radio.promotion_s
        if not asleep:
            promotion_s = max(0.0, path.radio_ready_s - now)
        return LinkOutlook(
            log_rate_mean=belief.log_rate_mean,
            log_rate_deviation=belief.log_rate_deviation,
            rtt_ms=round_trip.srtt_ms,
            rtt_deviation_ms=round_trip.deviation_ms,
            rtt_nodes_ms=round_trip.nodes_ms,
            connection_open=open_,
            idle_ms=None if used_s <= -1e8 else max(0.0, now - used_s) * 1e3,
            setup_round_trips=0 if open_ else tcp.handshake_round_trips,
            window_bytes=estimates.window(now) if open_ else tcp.initial_window_bytes,
            in_flight_bytes=int(in_flight),
            samples=estimates.link.samples,
            promotion_ms=promotion_s * 1e3,
            fresh_share=belief.fresh_share,
            outage=belief.outage,
            long_run_mean=belief.long_run_mean,
            long_run_deviation=belief.long_run_deviation,
        )

    def _cloud_outlook(self) -> CloudOutlook:
        cloud = self._estimates.cloud
        return CloudOutlook(
            queue_ms=0.0,
            tail_ms=cloud.recent_at(self._now),
            inference_ms=cloud.inference_mean_ms,
            breaker=self._breaker.state,
        )
