"""What a simulation leaves behind: one record per policy, trace and seed."""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["ACTION_CODES", "NET_ORACLES", "Event", "PolicyRun", "SimulationResult"]

ACTION_CODES: Final[dict[str, int]] = {
    "LOCAL": 0,
    "CASCADE": 1,
    "HEDGED": 2,
    "CLOUD_FIRST": 3,
    "CLOUD_ONLY": 4,
    "DROP": 5,
}
"""``PolicyRun.action``: the last action decided for a request, a cascade that stayed on the
device being LOCAL. DROP: the oracle's, for a request that nothing answers in time."""

NET_ORACLES: Final[dict[str, str]] = {
    "balanced": "Oracle:net",
    "saver": "Oracle:saver",
}
"""Which clairvoyant run bounds the net utility at a mode's prices. ``Oracle`` itself bounds
the accuracy in deadline."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened in one run, for a timeline."""

    time_s: float
    kind: str
    """``arrival``, ``decision``, ``local_start``, ``local_end``, ``upload_start``,
    ``local_expired``, ``upload_end``, ``abort``, ``answer`` or ``ping``."""
    request: int
    """Its number in the run; -1: of no request."""
    detail: str = ""


class PolicyRun(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One policy in one world. Arrays have one value per request, in order of arrival."""

    policy: str
    trace: str
    group: str
    seed: int
    arrived_s: NDArray[np.float64]
    deadline_ms: NDArray[np.float64]
    latency_ms: NDArray[np.float64]
    """Arrival to answer; infinity: none came."""
    correct: NDArray[np.float64]
    """Expected correctness of what was delivered in time, in [0, 1]; 0 when late."""
    uploaded_bytes: NDArray[np.float64]
    """On the wire because of this request, keep-warm pings and set-up included."""
    wasted_bytes: NDArray[np.float64]
    """The part of an upload's bytes whose answer was not delivered in time."""
    offloaded: NDArray[np.bool_]
    """An upload of the image was begun."""
    source_cloud: NDArray[np.bool_]
    """The cloud's answer was delivered, in time."""
    p_cloud: NDArray[np.float64]
    """Predicted P(cloud answer in time) at the last decision that made one; NaN: none."""
    cloud_in_time: NDArray[np.bool_]
    """Whether an upload begun at that decision would have been answered in time."""
    decision_us: NDArray[np.float64]
    """Wall time of all ``decide`` calls of the request divided by their number."""
    action: NDArray[np.int8]
    """``ACTION_CODES``."""
    joules: float
    """Device energy of the run: local model, radio active, promotions and tails."""
    events: tuple[Event, ...] = ()


class SimulationResult(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Every run of one cell, and the constants it was made with."""

    runs: tuple[PolicyRun, ...]
    policies: tuple[str, ...]
    traces: tuple[str, ...]
    seeds: tuple[int, ...]
    device: str
    deadline_ms: float
    arrivals: str
    constants: dict[str, Any]
