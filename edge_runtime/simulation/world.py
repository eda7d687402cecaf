"""One world: everything that happens whatever a policy does.

The same trace and seed give the same arrivals, images, confidences, slow runs, server times
and episodes to every policy (common random numbers): draws are keyed by the number of the
request or by time, never by the order in which a policy asks.
"""

from __future__ import annotations

import math
import zlib
from bisect import bisect_right
from typing import Final, Literal

import msgspec
import numpy as np

from edge_runtime.contract.errors import ConfigError
from edge_runtime.estimators.energy import RadioPower, radio_power
from edge_runtime.simulation.capacity import BIN_S, Capacity, RoundTrips
from edge_runtime.simulation.constants import Constants, DeviceConstants
from edge_runtime.simulation.traces import Trace

__all__ = ["ARRIVALS", "Episode", "Outage", "World", "draw_world"]

ARRIVALS: Final = ("poisson", "bursty", "sparse")
_SYNTHETIC_RTTS = 3000
_RTT_STEP_S = 0.2


class Outage(msgspec.Struct, frozen=True):
    """The broker is away. ``refuse``: connections are reset; else packets vanish."""

    start_s: float
    end_s: float
    refuses: bool


class Episode(msgspec.Struct, frozen=True):
    """A stretch of overload at the broker."""

    start_s: float
    end_s: float


class World(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Lists have one value per request; times in seconds from the start of the run."""

    constants: Constants
    device: DeviceConstants
    radio: Literal["3g", "lte", "5g", "wifi"]
    deadline_s: float
    capacity: Capacity
    round_trips: RoundTrips
    arrived_s: list[float]
    body_bytes: list[int]
    confidence: list[float]
    """Of the local answer; calibrated."""
    local_factor: list[float]
    """Log-normal, median 1: this image's share in the local latency."""
    service_s: list[float]
    queue_s: list[float]
    overload_s: list[float]
    """Queue instead of ``queue_s``, should the request fall into an overload episode."""
    overloads: list[Episode]
    outages: list[Outage]
    seed: int
    guard_s: float = 0.0
    """How long before the deadline a held answer leaves."""

    @property
    def radio_power(self) -> RadioPower:
        """What the radio does; what the device believes of it goes by ``radio``."""
        return radio_power(self.radio)

    def max_window_bytes(self, time_s: float) -> float:
        """What may be under way at ``time_s`` at most."""
        return self.constants.tcp.max_window_bytes

    def under_way_bytes(self, time_s: float) -> float:
        """What of an upload that is cancelled at ``time_s`` still crosses the link, at most."""
        return self.constants.tcp.unacknowledged_bytes

    def cloud_correct(self, index: int) -> float:
        """P(cloud right | confidence of the local answer)."""
        accuracy = self.constants.accuracy
        c = self.confidence[index]
        return accuracy.cloud_right_if_local_right * c + accuracy.cloud_right_if_local_wrong * (
            1.0 - c
        )

    def wire_bytes(self, index: int) -> float:
        """Bytes on the wire of one image."""
        tcp = self.constants.tcp
        return tcp.overhead * self.body_bytes[index] + tcp.header_bytes

    def queue_at(self, index: int, time_s: float) -> float:
        """Seconds that the request waits at the broker when it arrives at ``time_s``."""
        for episode in self.overloads:
            if episode.start_s <= time_s < episode.end_s:
                return self.overload_s[index]
        return self.queue_s[index]

    def outage_at(self, start_s: float, end_s: float) -> Outage | None:
        """The first outage that touches the span."""
        for outage in self.outages:
            if outage.start_s <= end_s and start_s < outage.end_s:
                return outage
        return None


def draw_world(
    trace: Trace, seed: int, *, device: str, deadline_ms: float, arrivals: str, constants: Constants
) -> World:
    """The world of one trace and seed. Raises ``ConfigError`` for unknown names.

    Each kind of draw has a generator of its own, so that another arrival pattern or deadline
    changes nothing else.
    """
    if device not in constants.devices:
        raise ConfigError(f"no device {device!r}: choose one of {', '.join(constants.devices)}")
    if arrivals not in ARRIVALS:
        raise ConfigError(f"no arrival pattern {arrivals!r}: choose one of {', '.join(ARRIVALS)}")
    if not math.isfinite(deadline_ms) or not 1 <= deadline_ms <= 60_000:
        raise ConfigError(f"deadline_ms must be 1 to 60000, not {deadline_ms}")
    key = (seed, zlib.crc32(trace.name.encode()))
    streams = [np.random.default_rng((*key, number)) for number in range(8)]
    duration_s = constants.run.duration_s
    arrived_s = _arrivals(streams[0], arrivals, constants)
    count = len(arrived_s)
    images, accuracy, server = constants.images, constants.accuracy, constants.server
    size_bytes = images.median_bytes * np.exp(images.log_sigma * streams[1].standard_normal(count))
    body_bytes = np.clip(np.round(size_bytes), images.min_bytes, images.max_bytes).astype(int)
    confidence = streams[2].beta(accuracy.confidence_alpha, accuracy.confidence_beta, count)
    model = constants.devices[device]
    local_factor = np.exp(model.local_log_sigma * streams[3].standard_normal(count))
    shape = server.service_shape
    service_ms = streams[4].gamma(shape, server.service_mean_ms / shape, count)
    waits = streams[5].standard_exponential((count, 2))
    starts = streams[6].uniform(size=2)
    rtt_ms = trace.rtt_ms
    if rtt_ms is None or len(rtt_ms) == 0:
        synthetic = constants.rtt[trace.radio]
        draws = streams[7].gamma(synthetic.shape, 1.0, _SYNTHETIC_RTTS)
        rtt_ms = synthetic.base_ms + synthetic.scale_ms * draws
    episodes = np.random.default_rng((*key, 8))
    return World(
        constants=constants,
        device=model,
        radio=trace.radio,
        deadline_s=deadline_ms / 1e3,
        capacity=Capacity(trace.uplink_mbps, float(starts[0]) * BIN_S * len(trace.uplink_mbps)),
        round_trips=RoundTrips(rtt_ms, float(starts[1]) * _RTT_STEP_S * len(rtt_ms)),
        arrived_s=arrived_s,
        body_bytes=body_bytes.tolist(),
        confidence=confidence.tolist(),
        local_factor=local_factor.tolist(),
        service_s=(service_ms / 1e3).tolist(),
        queue_s=(waits[:, 0] * server.queue_mean_ms / 1e3).tolist(),
        overload_s=(waits[:, 1] * server.overload_queue_mean_ms / 1e3).tolist(),
        overloads=[
            Episode(start, end)
            for start, end in _episodes(
                episodes, server.overload_every_s, server.overload_mean_s, duration_s
            )
        ],
        outages=[
            Outage(start, end, bool(episodes.uniform() < server.outage_refuses))
            for start, end in _episodes(
                episodes, server.outage_every_s, server.outage_mean_s, duration_s
            )
        ],
        seed=seed,
    )


def _arrivals(rng: np.random.Generator, pattern: str, constants: Constants) -> list[float]:
    duration_s = constants.run.duration_s
    times: list[float] = []
    if pattern == "bursty":
        burst = constants.arrivals.bursty
        now = float(rng.exponential(burst.mean_pause_s))
        while now < duration_s:
            for _ in range(int(rng.integers(burst.min_shots, burst.max_shots + 1))):
                times.append(now)
                now += float(rng.uniform(burst.min_gap_s, burst.max_gap_s))
            now += float(rng.exponential(burst.mean_pause_s))
        return times[: bisect_right(times, duration_s)]
    poisson = constants.arrivals.poisson if pattern == "poisson" else constants.arrivals.sparse
    now = float(rng.exponential(1.0 / poisson.rate_per_s))
    while now < duration_s:
        times.append(now)
        now += float(rng.exponential(1.0 / poisson.rate_per_s))
    return times


def _episodes(
    rng: np.random.Generator, every_s: float, mean_s: float, duration_s: float
) -> list[tuple[float, float]]:
    """Exponential pauses of ``every_s`` and lengths of ``mean_s``, until the end of the run."""
    found = []
    now = float(rng.exponential(every_s))
    while now < duration_s:
        end = now + float(rng.exponential(mean_s))
        found.append((now, end))
        now = end + float(rng.exponential(every_s))
    return found
