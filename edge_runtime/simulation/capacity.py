"""A recorded uplink as a function of time: how many bytes pass, and when they have passed."""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

__all__ = ["BIN_S", "Capacity", "RoundTrips"]

BIN_S = 0.1
_STEP_S = 0.2
_BYTES_PER_MEGABIT = 125_000.0


class Capacity:
    """A rate of 100 ms bins, integrated, periodic, entered at ``phase_s``.

    Args:
        mbps: float64 [bins], megabits per second.
        phase_s: which time of the recording is time 0.
    """

    def __init__(self, mbps: NDArray[np.float64], phase_s: float) -> None:
        rates = np.asarray(mbps, dtype=np.float64) * _BYTES_PER_MEGABIT
        cumulative = np.concatenate([[0.0], np.cumsum(rates * BIN_S)])
        self._rates: list[float] = rates.tolist()
        self._cumulative: list[float] = cumulative.tolist()
        self._total: float = self._cumulative[-1]
        self._period_s = BIN_S * len(rates)
        self._phase_s = phase_s % self._period_s

    def _passed(self, time_s: float) -> tuple[float, float]:
        """Whole periods before ``time_s``, and the bytes of the one under way."""
        cycle, within = divmod(time_s + self._phase_s, self._period_s)
        index = min(int(within / BIN_S), len(self._rates) - 1)
        return cycle, self._cumulative[index] + (within - index * BIN_S) * self._rates[index]

    def between(self, start_s: float, end_s: float) -> float:
        """Bytes that can pass from ``start_s`` to ``end_s``."""
        cycle_a, bytes_a = self._passed(start_s)
        cycle_b, bytes_b = self._passed(end_s)
        return max(0.0, (cycle_b - cycle_a) * self._total + bytes_b - bytes_a)

    def drain(self, start_s: float, size_bytes: float) -> float:
        """When the last of ``size_bytes`` has passed; infinity on a link that never moves."""
        if size_bytes <= 0:
            return start_s
        if self._total <= 0:
            return math.inf
        cycle, have = self._passed(start_s)
        more, target = divmod(have + size_bytes, self._total)
        index = max(bisect_left(self._cumulative, target) - 1, 0)
        within = index * BIN_S
        if target > 0:
            within += (target - self._cumulative[index]) / self._rates[index]
        end_s = (cycle + more) * self._period_s + within - self._phase_s
        return end_s if end_s > start_s else start_s


class RoundTrips:
    """Round-trip times of 200 ms each, periodic, entered at ``phase_s``; in seconds."""

    def __init__(self, rtt_ms: NDArray[np.float64], phase_s: float) -> None:
        self._values_s: list[float] = (np.asarray(rtt_ms, dtype=np.float64) / 1e3).tolist()
        self._phase_s = phase_s

    def at(self, time_s: float) -> float:
        """The round trip that starts at ``time_s``."""
        return self._values_s[int((time_s + self._phase_s) / _STEP_S) % len(self._values_s)]
