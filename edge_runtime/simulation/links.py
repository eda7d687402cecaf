"""Mobile links as pure data: rate and round-trip time over time.

A ``LinkSchedule`` is a periodic list of short segments with a constant uplink rate,
downlink rate and round-trip time each. Synthetic ones come from a seeded mean-reverting
process of the logarithm of the rate, which is what measured mobile uplinks look like over
seconds.
"""

from __future__ import annotations

import bisect
import itertools
import math
from typing import Annotated, Final, Literal

import msgspec
import numpy as np

from edge_runtime.contract.errors import ConfigError

__all__ = [
    "SCHEDULE_NAMES",
    "Episode",
    "LinkSchedule",
    "LinkSegment",
    "find_schedule",
    "steady",
    "synthesize",
]

DirectionName = Literal["uplink", "downlink"]

_BYTES_PER_MEGABIT: Final = 125_000
_STEP_S: Final = 0.25
_MAX_SEGMENTS: Final = 100_000
_RATE_TAU_S: Final = 6.0
"""How fast a rate forgets: samples of real uplinks go stale within about ten seconds."""

Rate = Annotated[float, msgspec.Meta(ge=0, le=10_000)]


class LinkSegment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stretch of constant conditions. A rate of 0 is an outage: nothing passes."""

    duration_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)]
    uplink_mbps: Rate
    downlink_mbps: Rate
    rtt_ms: Annotated[float, msgspec.Meta(ge=0, le=60_000)]
    name: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """What kind of link this is, for people."""


class LinkSchedule:
    """Segments in order, repeated for ever. Times are seconds since the start.

    Raises ``ConfigError`` unless bytes pass at some time in both directions.
    """

    def __init__(self, segments: tuple[LinkSegment, ...]) -> None:
        if not 1 <= len(segments) <= _MAX_SEGMENTS:
            raise ConfigError(f"a link schedule needs 1 to {_MAX_SEGMENTS} segments")
        self.segments = segments
        self._ends_s = list(itertools.accumulate(segment.duration_s for segment in segments))
        self.period_s = self._ends_s[-1]
        """Seconds until the schedule starts again."""
        self._rates = {
            "uplink": [segment.uplink_mbps * _BYTES_PER_MEGABIT for segment in segments],
            "downlink": [segment.downlink_mbps * _BYTES_PER_MEGABIT for segment in segments],
        }
        self._period_bytes = {
            name: math.fsum(
                rate * segment.duration_s for rate, segment in zip(rates, segments, strict=True)
            )
            for name, rates in self._rates.items()
        }
        for name, total in self._period_bytes.items():
            if total <= 0:
                raise ConfigError(f"a link schedule needs a time with a {name} rate above 0")

    def at(self, time_s: float) -> LinkSegment:
        """The conditions at a time."""
        return self.segments[self._index(time_s % self.period_s)]

    def _index(self, phase_s: float) -> int:
        return min(bisect.bisect_right(self._ends_s, phase_s), len(self.segments) - 1)

    def transmit(self, direction: DirectionName, start_s: float, size_bytes: float) -> float:
        """When the last of ``size_bytes`` has left, the first leaving at ``start_s``.

        The rate is integrated over the segments; outages only wait.
        """
        rates = self._rates[direction]
        periods, left = divmod(size_bytes, self._period_bytes[direction])
        cycle, phase = divmod(start_s, self.period_s)
        base_s = (cycle + periods) * self.period_s
        index = self._index(phase)
        while True:
            rate, end_s = rates[index], self._ends_s[index]
            capacity = rate * (end_s - phase)
            if rate > 0 and left <= capacity:
                return base_s + phase + left / rate
            left -= capacity
            phase = end_s
            index += 1
            if index == len(rates):
                index, phase = 0, 0.0
                base_s += self.period_s


class Episode(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of one kind of link; rates and times are medians."""

    name: str
    duration_s: float
    uplink_mbps: float
    downlink_mbps: float
    rtt_ms: float
    deviation: float = 0.35
    """Long-run standard deviation of the natural logarithm of the rate."""


def synthesize(episodes: tuple[Episode, ...], seed: int) -> LinkSchedule:
    """Draw a schedule: the same arguments give the same segments.

    The log rate is an Ornstein-Uhlenbeck process around each episode's median, exact at
    steps of ``d`` = 0.25 s: ``x' = m + (x - m) e^(-d/tau) + s sqrt(1 - e^(-2d/tau)) N(0,1)``
    (Uhlenbeck and Ornstein 1930). Uplink and downlink share it. Round trips have a small
    gamma-distributed excess over their floor.
    """
    rng = np.random.default_rng(seed)
    keep = math.exp(-_STEP_S / _RATE_TAU_S)
    fresh = math.sqrt(1.0 - keep * keep)
    deviate = float(rng.standard_normal())
    segments = []
    for episode in episodes:
        for _ in range(max(1, round(episode.duration_s / _STEP_S))):
            deviate = keep * deviate + fresh * float(rng.standard_normal())
            factor = math.exp(episode.deviation * deviate)
            excess = float(rng.gamma(2.0, 0.07))
            segments.append(
                LinkSegment(
                    duration_s=_STEP_S,
                    uplink_mbps=round(episode.uplink_mbps * factor, 4),
                    downlink_mbps=round(episode.downlink_mbps * factor, 4),
                    rtt_ms=round(episode.rtt_ms * (0.9 + excess), 2),
                    name=episode.name,
                )
            )
    return LinkSchedule(tuple(segments))


def steady(uplink_mbps: float, downlink_mbps: float, rtt_ms: float) -> LinkSchedule:
    """A link that never changes."""
    return LinkSchedule(
        (
            LinkSegment(
                duration_s=60.0,
                uplink_mbps=uplink_mbps,
                downlink_mbps=downlink_mbps,
                rtt_ms=rtt_ms,
                name="steady",
            ),
        )
    )


def _episode(name: str, seconds: float, up: float, down: float, rtt_ms: float) -> Episode:
    return Episode(name=name, duration_s=seconds, uplink_mbps=up, downlink_mbps=down, rtt_ms=rtt_ms)


_LTE = _episode("LTE", 5.0, 12.0, 35.0, 45.0)
_SHORT_LTE = _episode("LTE", 3.5, 12.0, 35.0, 45.0)
_FADE = _episode("LTE fading", 3.0, 1.2, 6.0, 85.0)
_OUTAGE = _episode("outage", 1.5, 0.0, 0.0, 85.0)
_THREE_G = _episode("3G", 6.0, 0.7, 3.0, 140.0)
_WIFI = _episode("Wi-Fi", 5.0, 28.0, 60.0, 18.0)

_EPISODES: Final[dict[str, tuple[Episode, ...]]] = {
    # A way to work in 24 s: a station, a tunnel, the suburbs, a village, the office.
    "commuter": (_LTE, _FADE, _OUTAGE, _SHORT_LTE, _THREE_G, _WIFI),
    "lte": (_LTE, _LTE, _FADE, _LTE),
    "3g": (_THREE_G, _THREE_G),
    "wifi": (_WIFI, _WIFI),
}

SCHEDULE_NAMES: Final = tuple(_EPISODES)


def find_schedule(name: str, seed: int) -> LinkSchedule:
    """A built-in schedule by name. ``ConfigError`` names the ones there are."""
    episodes = _EPISODES.get(name)
    if episodes is None:
        raise ConfigError(f"no link schedule {name!r}: choose one of {', '.join(_EPISODES)}")
    if seed < 0:
        raise ConfigError("--seed must be 0 or more")
    return synthesize(episodes, seed)
