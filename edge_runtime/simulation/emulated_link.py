"""The link itself: when which byte has crossed."""

from __future__ import annotations

import asyncio
from typing import Final

from edge_runtime.simulation.links import DirectionName, LinkSchedule

__all__ = ["EmulatedLink", "Lane"]

_SEGMENT_BYTES: Final = 1448
"""One full TCP segment on Ethernet."""
_SLICE_S: Final = 0.002
"""On a fast link, several segments go at once: timers are no finer than about this."""


class Lane:
    """One direction of the link, shared by all connections."""

    def __init__(self, name: DirectionName) -> None:
        self.name: DirectionName = name
        self.free_s = 0.0
        """When the bytes accepted so far have crossed (loop time)."""
        self.crossed_bytes = 0


class EmulatedLink:
    """A ``LinkSchedule`` that runs since ``started_s``. Times are the event loop's."""

    def __init__(self, schedule: LinkSchedule) -> None:
        self._schedule = schedule
        self.uplink = Lane("uplink")
        self.downlink = Lane("downlink")
        self.discarded_bytes = 0
        self.restart()

    def restart(self) -> None:
        """Start the schedule anew; counters stay."""
        self.started_s = asyncio.get_running_loop().time()
        self.uplink.free_s = self.downlink.free_s = self.started_s

    def slice_bytes(self, lane: Lane, now_s: float) -> int:
        """How much to send at once: one segment, or what passes in two milliseconds."""
        segment = self._schedule.at(max(0.0, now_s - self.started_s))
        mbps = segment.uplink_mbps if lane.name == "uplink" else segment.downlink_mbps
        return max(_SEGMENT_BYTES, int(mbps * 125_000 * _SLICE_S))

    def reserve(self, lane: Lane, arrived_s: float, size_bytes: int) -> float:
        """Put bytes that arrived at a time in the lane; when the last of them has crossed."""
        start_s = max(lane.free_s, arrived_s) - self.started_s
        lane.free_s = self._schedule.transmit(lane.name, start_s, size_bytes) + self.started_s
        return lane.free_s

    def one_way_s(self, now_s: float) -> float:
        """Half of the round-trip time at a time."""
        return self._schedule.at(max(0.0, now_s - self.started_s)).rtt_ms / 2e3
