"""Small worlds whose times can be worked out by hand."""

from __future__ import annotations

import msgspec
import numpy as np

from edge_runtime.simulation.constants import Constants, load_constants
from edge_runtime.simulation.traces import Trace
from edge_runtime.simulation.world import Outage, World, draw_world


def steady_trace(mbps: float = 8.0, rtt_ms: float = 50.0, name: str = "steady") -> Trace:
    """A link that never changes."""
    return Trace(
        name=name,
        group="steady",
        radio="lte",
        uplink_mbps=np.full(600, mbps),
        rtt_ms=np.full(300, rtt_ms),
    )


def short_constants(duration_s: float = 60.0) -> Constants:
    """The shipped constants, for a run of a minute."""
    known = load_constants()
    return msgspec.structs.replace(
        known, run=msgspec.structs.replace(known.run, duration_s=duration_s)
    )


def world(
    trace: Trace | None = None,
    *,
    seed: int = 0,
    device: str = "mid",
    deadline_ms: float = 400.0,
    arrivals: str = "poisson",
    duration_s: float = 60.0,
) -> World:
    """Drawn as the simulator draws it."""
    return draw_world(
        trace or steady_trace(),
        seed,
        device=device,
        deadline_ms=deadline_ms,
        arrivals=arrivals,
        constants=short_constants(duration_s),
    )


def plain_world(
    arrived_s: list[float],
    *,
    trace: Trace | None = None,
    confidence: float = 0.2,
    body_bytes: int = 100_000,
    outages: list[Outage] | None = None,
    device: str = "mid",
    deadline_ms: float = 400.0,
) -> World:
    """Given arrivals, equal images, a broker that takes 10 ms, no episodes but those given."""
    count = len(arrived_s)
    return msgspec.structs.replace(
        world(trace, device=device, deadline_ms=deadline_ms),
        arrived_s=arrived_s,
        body_bytes=[body_bytes] * count,
        confidence=[confidence] * count,
        local_factor=[1.0] * count,
        service_s=[0.010] * count,
        queue_s=[0.0] * count,
        overload_s=[0.2] * count,
        overloads=[],
        outages=outages or [],
    )
