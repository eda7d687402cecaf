"""How long an upload takes over TCP, and the rate it needs to end in time.

A connection starts with a window of ten segments (RFC 6928) and doubles it every round
trip (RFC 5681, slow start) until the link itself is the limit. With window ``w``, size
``S`` and rate ``r``, the bytes left after ``j`` rounds are ``B_j = S - w (2^j - 1)`` and

    T(r) = max over j with B_j > 0 of (j RTT + B_j / r)

because round ``k`` costs ``max(w 2^k / r, RTT)`` and the rounds only grow. So T(r) <= t
holds exactly when ``r >= max over j of B_j / (t - j RTT)``: the inverse is closed too.
Sizes are bytes, rates bytes per second, times milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

__all__ = [
    "CONNECTION_KEPT_S",
    "INITIAL_WINDOW_BYTES",
    "required_rate",
    "slow_start_rounds",
    "upload_ms",
    "window_limited",
    "wire_bytes",
]

INITIAL_WINDOW_BYTES = 10 * 1460
"""Ten segments of 1460 bytes: RFC 6928."""

CONNECTION_KEPT_S = 15.0
"""Silence after which HTTP clients and servers commonly close a connection."""

_HEADER_BYTES = 700
_OVERHEAD = 1.04


def wire_bytes(body_bytes: float) -> float:
    """Bytes on the wire for a body: TCP/IP and TLS framing (4 %) and the HTTP head."""
    return _OVERHEAD * body_bytes + _HEADER_BYTES


def slow_start_rounds(size_bytes: float, window_bytes: float) -> Iterator[tuple[int, float]]:
    """``(j, B_j)`` while bytes are left: rounds done, and bytes after them."""
    rounds, left, window = 0, size_bytes, window_bytes
    while left > 0:
        yield rounds, left
        left -= window
        window *= 2
        rounds += 1


def upload_ms(
    size_bytes: float, rate: float, rtt_ms: float, window_bytes: float = INITIAL_WINDOW_BYTES
) -> float:
    """Milliseconds from the first byte sent until the last one arrives, one-way delay aside."""
    if rate <= 0:
        return math.inf
    return max(
        (
            j * rtt_ms + 1000.0 * left / rate
            for j, left in slow_start_rounds(size_bytes, window_bytes)
        ),
        default=0.0,
    )


def required_rate(
    size_bytes: float, budget_ms: float, rtt_ms: float, window_bytes: float = INITIAL_WINDOW_BYTES
) -> float:
    """The slowest rate at which ``upload_ms`` is at most ``budget_ms``; infinity: none is."""
    needed = 0.0
    for j, left in slow_start_rounds(size_bytes, window_bytes):
        time_ms = budget_ms - j * rtt_ms
        if time_ms <= 0:
            return math.inf
        needed = max(needed, 1000.0 * left / time_ms)
    return needed


def window_limited(acknowledged_bytes: float, window_bytes: float = INITIAL_WINDOW_BYTES) -> bool:
    """Whether TCP waits at the end of a round: all it was allowed to send has arrived.

    Then the time since says nothing of the link but that it is fast enough.
    """
    left, step = acknowledged_bytes, window_bytes
    while left > 1.02 * step:
        left -= step
        step *= 2
    return left >= 0.98 * step
