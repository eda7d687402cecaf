"""How many bytes may be under way on a session: enough for the link, and no more.

A cancelled upload loses what is under way, so little should be; a link that waits for an
acknowledgement is idle, so enough must be. What a link holds is rate times round trip (its
bandwidth-delay product); everything beyond waits in a queue on the way. So

    bytes under way <= SESSION_WINDOW_BYTES + rate * round trip

with both from the receiver's acknowledgements (Cardwell et al., BBR, ACM Queue 2016):

    rate        the largest of the last samples (max(0.25 s, 2 round trips)); a sample is the
                bytes that came between two PROGRESS frames, over the longer of the receiver's
                time between them and the sender's: a burst that a hole or a busy receiver
                held back is no fast link
    round trip  the smallest of the last 10 s, 5 ms at least: below, the two ends' own event
                loops are the path

Neither socket buffers nor TCP's own acknowledgements count: behind a proxy, a relay or a
modem with a long queue these say that bytes have left which have not. Without a sample of
the last 10 s the rate counts as unknown (recorded uplinks forget theirs in about that time),
and the first samples of the next upload, after one round trip, prove it anew: within the
first burst, bytes arrive at the link's own pace.

No clock here: times are seconds of any monotonic clock, passed in.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import Final, NamedTuple

from edge_runtime.contract import limits

__all__ = ["Arrival", "SendWindow"]

_MIN_SAMPLE_BYTES: Final = 16 * 1024
_SHORTEST_S: Final = 0.005
"""Closer arrivals are the receiver's own doing, one wake-up of its event loop, and so is a
shorter round trip. The first bytes of a fast link are nearer to each other: there a sample
grows with the window."""
_LONGEST_S: Final = 0.05
"""A slow link's samples are small."""
_MIN_RATE_SPAN_S: Final = 0.25
_FORGET_S: Final = 10.0
_MIN_CHUNK_BYTES: Final = 4 * 1024
_CHUNK_S: Final = 0.01
_MAX_ARRIVALS: Final = 64


class Arrival(NamedTuple):
    """One PROGRESS frame of one upload."""

    receiver_s: float
    """When its bytes had come, on the receiver's clock."""
    sent_s: float
    """When the last of them was handed to the connection."""
    delivered_bytes: int
    """Of all uploads of the connection until then."""


class SendWindow:
    """Of one connection, shared by its uploads."""

    def __init__(self) -> None:
        self.in_flight_bytes = 0
        self.delivered_bytes = 0
        self._rates: deque[tuple[float, float]] = deque()
        self._round_trips: deque[tuple[float, float]] = deque()
        self._rate = 0.0
        self._rated_s = float("-inf")

    def limit_bytes(self, now_s: float) -> int:
        """What may be under way."""
        return limits.SESSION_WINDOW_BYTES + self.proven_bytes(now_s)

    def proven_bytes(self, now_s: float) -> int:
        """What the link is known to hold; 0: nothing is known."""
        return int(self.rate(now_s) * max(self.round_trip_s(now_s) or 0.0, _SHORTEST_S))

    def room_bytes(self, now_s: float) -> int:
        """What may be sent now."""
        return self.limit_bytes(now_s) - self.in_flight_bytes

    def chunk_bytes(self, now_s: float) -> int:
        """The size of one DATA frame: about 10 ms of the link, so that uploads take turns.

        At most a quarter of the window, so that acknowledgements come while bytes still wait.
        """
        fitting = min(int(self.rate(now_s) * _CHUNK_S), self.limit_bytes(now_s) // 4)
        return min(max(fitting, _MIN_CHUNK_BYTES), limits.MAX_DATA_BYTES)

    def rate(self, now_s: float) -> float:
        """Bytes per second that the receiver saw; 0: not known, or too long ago."""
        return self._rate if now_s - self._rated_s <= _FORGET_S else 0.0

    def round_trip_s(self, now_s: float) -> float | None:
        """The shortest of late; None: not known."""
        while len(self._round_trips) > 1 and now_s - self._round_trips[0][0] > _FORGET_S:
            self._round_trips.popleft()
        return self._round_trips[0][1] if self._round_trips else None

    def sent(self, size_bytes: int) -> None:
        """Bytes were handed to the connection."""
        self.in_flight_bytes += size_bytes

    def delivered(self, size_bytes: int) -> None:
        """The receiver has them, or has said that it got all there were."""
        self.in_flight_bytes -= size_bytes
        self.delivered_bytes += size_bytes

    def observe_round_trip(self, round_trip_s: float, now_s: float) -> None:
        """One sample, queues and all: the smallest counts."""
        while self._round_trips and self._round_trips[-1][1] >= round_trip_s:
            self._round_trips.pop()
        self._round_trips.append((now_s, round_trip_s))

    def observe_arrivals(self, arrivals: deque[Arrival], now_s: float) -> None:
        """The last of one upload's ``arrivals`` is new: compare it with one before it."""
        while len(arrivals) > _MAX_ARRIVALS:
            arrivals.popleft()
        last = arrivals[-1]
        for earlier in itertools.islice(reversed(arrivals), 1, None):
            size_bytes = last.delivered_bytes - earlier.delivered_bytes
            received_s = last.receiver_s - earlier.receiver_s
            long_enough = received_s >= _SHORTEST_S or earlier is arrivals[0]
            if received_s >= _LONGEST_S or (size_bytes >= _MIN_SAMPLE_BYTES and long_enough):
                spent_s = max(received_s, last.sent_s - earlier.sent_s, _SHORTEST_S)
                self._observe_rate(size_bytes / spent_s, now_s)
                return

    def _observe_rate(self, rate: float, now_s: float) -> None:
        span_s = max(_MIN_RATE_SPAN_S, 2 * (self.round_trip_s(now_s) or 0.0))
        while self._rates and now_s - self._rates[0][0] > span_s:
            self._rates.popleft()
        while self._rates and self._rates[-1][1] <= rate:
            self._rates.pop()
        self._rates.append((now_s, rate))
        self._rate, self._rated_s = self._rates[0][1], now_s
