"""How long this device takes to answer: quantiles over the last runs of one variant."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

__all__ = ["LocalEstimator"]

_WINDOW = 64


class LocalEstimator(msgspec.Struct, frozen=True, kw_only=True):
    """The last 64 latencies in milliseconds, oldest first."""

    latencies_ms: tuple[float, ...] = ()

    @classmethod
    def of(cls, latencies_ms: Iterable[float]) -> LocalEstimator:
        """From measurements already made."""
        return cls(latencies_ms=tuple(latencies_ms)[-_WINDOW:])

    def observe(self, latency_ms: float) -> LocalEstimator:
        """One more run."""
        return LocalEstimator(latencies_ms=(*self.latencies_ms[1 - _WINDOW :], latency_ms))

    def quantile_ms(self, q: float) -> float:
        """The smallest latency that a share ``q`` of the runs did not exceed; NaN: no runs.

        Never interpolated: with few runs a high quantile is the slowest one, which is the
        safe side for a deadline.
        """
        if not self.latencies_ms:
            return math.nan
        ordered = sorted(self.latencies_ms)
        rank = math.ceil(q * len(ordered))
        return ordered[min(max(rank, 1), len(ordered)) - 1]

    def recent_quantile_ms(self, q: float, last: int = 12) -> float:
        """``quantile_ms`` of the last runs only: heat slows a device within seconds."""
        return LocalEstimator(latencies_ms=self.latencies_ms[-last:]).quantile_ms(q)
