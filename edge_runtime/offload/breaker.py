"""A circuit breaker: leave a broker that keeps failing alone, and find out gently.

    CLOSED ── 3 hard failures in a row, or half of the last 20 (5 at least) ──▶ OPEN
    OPEN ── back-off over, and somebody asks ──▶ HALF_OPEN (one health request)
    HALF_OPEN ── healthy ──▶ CLOSED;  ── not ──▶ OPEN, back-off doubled

Hard failures are refused, broken or timed-out connections, 5xx, and answers that make no
sense. A missed deadline is the estimators' business and a 4xx the caller's: neither counts.
The back-off is 1 s, doubles to 30 s, and is jittered over its upper half. The probe is a
health request, never a user's image.

Not thread-safe: one event loop owns it. The clock is passed in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from edge_runtime.policies.base import BreakerState

__all__ = ["Breaker"]

_WINDOW = 20
_MIN_OUTCOMES = 5
_FAILURE_SHARE = 0.5
_CONSECUTIVE = 3
_FIRST_BACKOFF_S = 1.0
_MAX_BACKOFF_S = 30.0


class Breaker:
    """``random`` gives floats in [0, 1); times are seconds of any monotonic clock."""

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._outcomes: deque[bool] = deque(maxlen=_WINDOW)
        self._consecutive = 0
        self._backoff_s = _FIRST_BACKOFF_S
        self._retry_at_s = 0.0
        self.state: BreakerState = "CLOSED"

    def probe_due(self, now_s: float) -> bool:
        """Whether a health request may be sent now."""
        return self.state == "OPEN" and now_s >= self._retry_at_s

    def begin_probe(self, now_s: float) -> None:
        """OPEN to HALF_OPEN. ``probe_due`` must hold."""
        if not self.probe_due(now_s):
            raise ValueError("no probe is due")
        self.state = "HALF_OPEN"

    def abandon_probe(self) -> None:
        """The probe ended without an outcome (it was cancelled): OPEN, due again."""
        if self.state == "HALF_OPEN":
            self.state = "OPEN"

    def succeed(self) -> None:
        """An exchange went well, whatever the broker thought of the request."""
        self._consecutive = 0
        if self.state == "CLOSED":
            self._outcomes.append(True)
        elif self.state == "HALF_OPEN":
            self._outcomes.clear()
            self._backoff_s = _FIRST_BACKOFF_S
            self.state = "CLOSED"
        # OPEN: a straggler from before; the probe decides.

    def fail(self, now_s: float) -> None:
        """A hard failure."""
        if self.state == "OPEN":
            return  # a straggler from before
        if self.state == "HALF_OPEN":
            self._backoff_s = min(2 * self._backoff_s, _MAX_BACKOFF_S)
            self._open(now_s)
            return
        self._outcomes.append(False)
        self._consecutive += 1
        failures = self._outcomes.count(False)
        many = len(self._outcomes) >= _MIN_OUTCOMES and (
            failures >= _FAILURE_SHARE * len(self._outcomes)
        )
        if self._consecutive >= _CONSECUTIVE or many:
            self._open(now_s)

    def _open(self, now_s: float) -> None:
        self.state = "OPEN"
        self._consecutive = 0
        self._outcomes.clear()
        self._retry_at_s = now_s + self._backoff_s * (0.5 + 0.5 * self._random())
