"""A recorded uplink as a ``LinkSchedule``: what the simulator replays, the relay plays."""

from __future__ import annotations

import math

from edge_runtime.contract.errors import ConfigError
from edge_runtime.simulation.capacity import BIN_S
from edge_runtime.simulation.links import LinkSchedule, LinkSegment
from edge_runtime.simulation.traces import Trace

__all__ = ["trace_schedule"]

_DOWNLINK_MBPS = 100.0
_MAX_SECONDS = 3600.0


def trace_schedule(
    trace: Trace, *, offset_s: float, seconds: float, downlink_mbps: float = _DOWNLINK_MBPS
) -> LinkSchedule:
    """``seconds`` of a trace from ``offset_s`` on, in segments of one 100 ms bin each.

    The trace repeats where it ends, and so do its round trips (one per 200 ms), entered at the
    same offset: until ``seconds`` the schedule passes what
    ``Capacity(trace.uplink_mbps, offset_s)`` passes and answers what
    ``RoundTrips(trace.rtt_ms, offset_s)`` does. Then it starts again at ``offset_s``.

    Args:
        trace: with round trips.
        offset_s: a multiple of 0.2 s, so that no segment holds two values.
        seconds: length of the schedule, up to an hour.
        downlink_mbps: traces record uplinks alone; answers are small.

    Raises ``ConfigError``: no round trips, an offset between two values, nothing passes.
    """
    if trace.rtt_ms is None or not len(trace.rtt_ms):
        raise ConfigError(f"the trace {trace.name} has no round trips to play")
    if not 0.0 < seconds <= _MAX_SECONDS:
        raise ConfigError(f"a trace is played for up to {_MAX_SECONDS:.0f} s, not {seconds}")
    first = round(offset_s / BIN_S)
    if first < 0 or first % 2 or not math.isclose(first * BIN_S, offset_s, abs_tol=1e-6):
        raise ConfigError(f"the offset must be a multiple of 0.2 s, not {offset_s}")
    rates, round_trips = trace.uplink_mbps.tolist(), trace.rtt_ms.tolist()
    return LinkSchedule(
        tuple(
            LinkSegment(
                duration_s=BIN_S,
                uplink_mbps=rates[number % len(rates)],
                downlink_mbps=downlink_mbps,
                rtt_ms=round_trips[number // 2 % len(round_trips)],
                name=trace.group[:64],
            )
            for number in range(first, first + math.ceil(seconds / BIN_S))
        )
    )
