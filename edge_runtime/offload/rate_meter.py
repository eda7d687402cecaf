"""The uplink's rate while an upload goes on, from the broker's PROGRESS frames.

Whole uploads are measured by how long the broker took to read them. One that takes longer,
or is cancelled, says more on the way: after its first window, during which the path may be
idle for a round trip, each quarter of a second gives one sample. Other uploads of the same
connection count with it: they share the link.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from edge_runtime.contract import limits
from edge_runtime.offload.multiplexer import Sending

__all__ = ["RateMeter"]

_SPAN_MS: Final = 250.0


class RateMeter:
    """Follows one upload at a time."""

    def __init__(self) -> None:
        self._followed: int | None = None
        self._since_ms = 0.0
        self._since_bytes = 0
        self._reported: set[int] = set()

    def observe(self, open_now: Collection[Sending], delivered_bytes: int) -> float | None:
        """Bytes per second, when a span is over. ``delivered_bytes``: of the connection."""
        followed = next((s for s in open_now if s.request.id == self._followed), None)
        if followed is None:
            self._follow(open_now, delivered_bytes)
            return None
        if not followed.to_send_bytes and followed.under_way_bytes < limits.SESSION_WINDOW_BYTES:
            self._followed = None  # its end is no full pipe
            return None
        span_ms = followed.elapsed_ms - self._since_ms
        if span_ms < _SPAN_MS:
            return None
        rate = 1e3 * (delivered_bytes - self._since_bytes) / span_ms
        self._since_ms, self._since_bytes = followed.elapsed_ms, delivered_bytes
        self._reported.update(sending.request.id for sending in open_now)
        return rate

    def reported(self, request_id: int) -> bool:
        """Whether a sample was given while this upload went on."""
        return request_id in self._reported

    def forget(self, request_id: int) -> None:
        """It has ended."""
        self._reported.discard(request_id)

    def _follow(self, open_now: Collection[Sending], delivered_bytes: int) -> None:
        for sending in open_now:
            begun = sending.received_bytes >= limits.SESSION_WINDOW_BYTES
            if begun and sending.to_send_bytes:
                self._followed = sending.request.id
                self._since_ms, self._since_bytes = sending.elapsed_ms, delivered_bytes
                return
        self._followed = None
