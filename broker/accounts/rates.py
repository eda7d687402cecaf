"""How many requests a key may make: a token bucket for each, in memory.

A bucket holds at most ``burst`` tokens and gains ``rate_per_s`` of them a second; a request
takes one. (ITU-T I.371 calls the same rule the generic cell rate algorithm.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from broker.accounts.keys import Principal
from edge_runtime.contract import limits

__all__ = ["RateLimits"]


@dataclass(slots=True)
class _Bucket:
    tokens: float
    counted_s: float


class RateLimits:
    """Buckets of all keys. Used from one event loop; ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, principal: Principal) -> float:
        """Take a token: 0 where there was one, else the seconds until there is."""
        rate = principal.rate_per_s
        if rate is None:
            return 0.0
        now_s = self._clock()
        bucket = self._buckets.get(principal.key_id)
        if bucket is None:
            self._forget_full(now_s)
            bucket = self._buckets[principal.key_id] = _Bucket(float(principal.burst), now_s)
        bucket.tokens += max(now_s - bucket.counted_s, 0.0) * rate
        bucket.tokens = min(bucket.tokens, float(principal.burst))  # the file may have changed
        bucket.counted_s = now_s
        if bucket.tokens < 1.0:
            return (1.0 - bucket.tokens) / rate
        bucket.tokens -= 1.0
        return 0.0

    def _forget_full(self, now_s: float) -> None:
        """Make room: what was not used for longest goes, however many keys come and go."""
        while len(self._buckets) >= limits.MAX_KEYS:
            oldest = min(self._buckets, key=lambda key: self._buckets[key].counted_s)
            del self._buckets[oldest]
