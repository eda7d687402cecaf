"""The simulated side: a world in which everything is measured and nothing is drawn.

What differs from the shipped constants, and why:

* TCP: the relay has no slow start, and opening a connection takes one round trip, without TLS;
  one is open before the start. What bounds an upload is the session's own send window
  (``offload/window.py``): ``SESSION_WINDOW_BYTES``, and once an upload was admitted within 5 s,
  the rate times the shortest round trip of the last 10 s more. Both are read off the trace at
  the times of requests. What the relay has taken of a cancelled upload still crosses the link.
* Radio: the relay promotes nothing. The device still believes what it believes of the link type.
* Broker: no overload, no outage. A request takes there what the live run of ``CloudOnly`` says it
  took, queue and model (``Server-Timing``), and ``overhead_ms`` more: what neither link nor
  broker accounts for, the two ends' own handling of a request, by its median over a flat fast
  link. The upload over that link is none of it: what the processes do meanwhile happens beside
  the link wherever that one is slower.
* Device: no heat, and the latencies of the live run of ``LocalOnly``, request by request: what
  else the machine does changes from minute to minute, and the runs of one link share it.
* Breaker: its back-offs are drawn from ``BREAKER_SEED`` on both sides.
* A request that holds no local answer waits until its deadline, as the runtime does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from benchmarks.live_check.material import Link
from edge_runtime.contract import limits
from edge_runtime.estimators.energy import RadioPower, radio_power
from edge_runtime.results import Timings
from edge_runtime.simulation.capacity import Capacity, RoundTrips
from edge_runtime.simulation.connection import BUFFER_BYTES
from edge_runtime.simulation.constants import Constants, DeviceConstants, load_constants
from edge_runtime.simulation.device import DeviceRun
from edge_runtime.simulation.lineup import make_policy
from edge_runtime.simulation.records import Event
from edge_runtime.simulation.requests import Outcome
from edge_runtime.simulation.transport import Path, fresh_path
from edge_runtime.simulation.world import World

__all__ = [
    "BREAKER_SEED",
    "MeasuredWorld",
    "Pair",
    "make_world",
    "open_path",
    "overhead_ms",
    "server_ms",
    "simulate_policy",
]

BREAKER_SEED: Final = 0
_ADMISSION_TRUSTED_S = 5.0
_FORGET_S, _SHORTEST_S = 10.0, 0.005
_SAMPLE_S = 0.1
_MAX_RECENT = 32
_GUARD_SHARE, _MAX_GUARD_S = 0.05, 0.010


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """Both models over the photos, once: one value per photo, but ``header_bytes``."""

    body_bytes: list[int]
    local_ms: list[float]
    confidence: list[float]
    local_right: list[bool]
    cloud_right: list[bool]
    server_ms: list[float]
    """In the broker, from the last byte to the answer: queue and model."""
    overhead_ms: float
    """Median of what is left of a request without link and broker."""
    header_bytes: float
    """On the link beside one body."""

    @property
    def local_median_ms(self) -> float:
        """Median of ``local_ms``."""
        return float(np.median(self.local_ms))

    @property
    def local_log_sigma(self) -> float:
        """Of the logarithm of ``local_ms``."""
        return float(np.std(np.log(self.local_ms)))


class MeasuredWorld(World, frozen=True, kw_only=True, eq=False):
    """A ``World`` that knows whether each side is right."""

    local_right: list[bool]
    cloud_right: list[bool]

    @property
    def radio_power(self) -> RadioPower:
        """The relay wakes nothing."""
        return msgspec.structs.replace(radio_power(self.radio), promotion_s=0.0)

    def max_window_bytes(self, time_s: float) -> float:
        """The session's send window, from what the last ten seconds' requests met."""
        number = bisect_left(self.arrived_s, time_s + 1e-9)
        recent = [
            at
            for at in self.arrived_s[max(0, number - _MAX_RECENT) : number]
            if time_s - at <= _FORGET_S
        ]
        if not recent:
            return float(limits.SESSION_WINDOW_BYTES)
        seen_s = [min(at + step * _SAMPLE_S, time_s) for at in recent for step in range(4)]
        shortest_s = max(min(self.round_trips.at(at) for at in seen_s), _SHORTEST_S)
        first = time_s - recent[-1] < _SAMPLE_S  # nothing of this upload is acknowledged yet
        rated_s = recent[-2] if first and len(recent) > 1 else time_s - _SAMPLE_S
        rate = self.capacity.between(rated_s, rated_s + _SAMPLE_S) / _SAMPLE_S
        return limits.SESSION_WINDOW_BYTES + rate * shortest_s

    def under_way_bytes(self, time_s: float) -> float:
        """The window's bytes cross the link, as far as the relay has taken them already."""
        return min(self.max_window_bytes(time_s), float(BUFFER_BYTES))

    def cloud_correct(self, index: int) -> float:
        """1 where the cloud's model was right, 0 where not."""
        return float(self.cloud_right[index])


def _constants(pair: Pair, deadline_s: float) -> Constants:
    known = load_constants()
    replace = msgspec.structs.replace
    return replace(
        known,
        run=replace(known.run, http_timeout_s=deadline_s),
        thermal=replace(known.thermal, max_slowdown=1.0, full_duty=1.0),
        tcp=replace(
            known.tcp,
            initial_window_bytes=float(limits.SESSION_WINDOW_BYTES),
            window_kept_s=_ADMISSION_TRUSTED_S,
            handshake_round_trips=1,
            handshake_bytes=0.0,
            overhead=1.0,
            header_bytes=pair.header_bytes,
            connection_kept_s=limits.MAX_SESSION_IDLE_MS / 1e3,
            unacknowledged_bytes=float(limits.SESSION_WINDOW_BYTES),
        ),
    )


def make_world(
    link: Link,
    pair: Pair,
    arrived_s: Sequence[float],
    shown: Sequence[int],
    *,
    deadline_ms: float,
    offset_s: float,
    local_ms: Sequence[float] | None = None,
    cloud_ms: Sequence[float | None] | None = None,
) -> MeasuredWorld:
    """Request ``i`` arrives at ``arrived_s[i]`` and shows photo ``shown[i]``.

    ``local_ms``: of each request; ``cloud_ms``: in the broker, None where it did not answer. None
    for all: as the pair was measured on these photos.
    """
    assert link.trace.rtt_ms is not None
    deadline_s = deadline_ms / 1e3
    taken_ms = [pair.local_ms[i] for i in shown] if local_ms is None else local_ms
    median_ms = float(np.median(taken_ms))
    served_ms = [pair.server_ms[i] for i in shown]
    known_ms = [value for value in cloud_ms or () if value is not None]
    if cloud_ms is not None and known_ms:
        usual_ms = float(np.median(known_ms))
        served_ms = [usual_ms if value is None else value for value in cloud_ms]
    zeros = [0.0] * len(arrived_s)
    return MeasuredWorld(
        constants=_constants(pair, deadline_s),
        device=DeviceConstants(
            local_median_ms=median_ms, local_log_sigma=pair.local_log_sigma, local_watts=2.0
        ),
        radio=link.trace.radio,
        deadline_s=deadline_s,
        guard_s=min(_MAX_GUARD_S, _GUARD_SHARE * deadline_s),
        capacity=Capacity(link.trace.uplink_mbps, offset_s),
        round_trips=RoundTrips(link.trace.rtt_ms, offset_s),
        arrived_s=list(arrived_s),
        body_bytes=[pair.body_bytes[i] for i in shown],
        confidence=[pair.confidence[i] for i in shown],
        local_factor=[value / median_ms for value in taken_ms],
        local_right=[pair.local_right[i] for i in shown],
        cloud_right=[pair.cloud_right[i] for i in shown],
        service_s=[(value + pair.overhead_ms) / 1e3 for value in served_ms],
        queue_s=zeros,
        overload_s=zeros,
        overloads=[],
        outages=[],
        seed=BREAKER_SEED,
    )


def open_path() -> Path:
    """A connection that was opened and used just before the start."""
    return fresh_path()._replace(connection_used_s=0.0, radio_until_s=0.0)


def simulate_policy(world: MeasuredWorld, policy: str) -> tuple[list[Outcome], list[Event]]:
    """What becomes of each request, and everything that happened."""
    run = DeviceRun(world, make_policy(policy), timeline=True, path=open_path())
    return run.run(), run.events


def server_ms(timings: Timings) -> float | None:
    """What the broker said it took; None: it did not answer."""
    if timings.server_inference_ms is None:
        return None
    return (timings.server_queue_ms or 0.0) + timings.server_inference_ms


def overhead_ms(total_ms: float, timings: Timings, rtt_ms: float) -> float:
    """What of a request over a flat link was neither the link's nor the broker's."""
    served_ms = server_ms(timings) or 0.0
    return max(0.1, total_ms - (timings.upload_ms or 0.0) - served_ms - rtt_ms)
