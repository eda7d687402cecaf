"""The rhythm of an app's requests: how likely the next one comes within some seconds.

Gaps between requests are counted in octaves of time with exponential forgetting. A
photographer's gaps have two humps (shots of a burst, pauses between bursts), so no single
rate describes them; octaves describe both.
"""

from __future__ import annotations

import math

import msgspec

__all__ = ["ArrivalEstimator"]

_SHORTEST_S = 0.125
_OCTAVES = 12
_FORGET = 0.97
_PRIOR_WEIGHT = 2.0
_PRIOR_MEAN_S = 10.0


def _prior() -> tuple[float, ...]:
    """Weight of an exponential gap of 10 s in each octave; the first and last are open."""
    edges = [_SHORTEST_S * 2.0**k for k in range(_OCTAVES - 1)]
    survival = [1.0, *(math.exp(-edge / _PRIOR_MEAN_S) for edge in edges), 0.0]
    return tuple(_PRIOR_WEIGHT * (survival[k] - survival[k + 1]) for k in range(_OCTAVES))


class ArrivalEstimator(msgspec.Struct, frozen=True, kw_only=True):
    """Forgetting counts of gaps; octave ``k`` ends at 0.125 s times 2^k."""

    weights: tuple[float, ...] = _prior()
    last_s: float | None = None

    def observe(self, now_s: float) -> ArrivalEstimator:
        """A request came at ``now_s``."""
        if self.last_s is None:
            return msgspec.structs.replace(self, last_s=now_s)
        gap_s = max(0.0, now_s - self.last_s)
        octave = 0
        if gap_s > _SHORTEST_S:
            octave = min(_OCTAVES - 1, math.ceil(math.log2(gap_s / _SHORTEST_S)))
        weights = [_FORGET * weight for weight in self.weights]
        weights[octave] += 1.0
        return ArrivalEstimator(weights=tuple(weights), last_s=now_s)

    def within(self, seconds: float) -> float:
        """P(the next gap is at most ``seconds``), linear within an octave."""
        if seconds <= 0:
            return 0.0
        total, below, start_s = sum(self.weights), 0.0, 0.0
        for octave, weight in enumerate(self.weights):
            end_s = _SHORTEST_S * 2.0**octave
            if octave == _OCTAVES - 1:
                end_s *= 8
            if seconds >= end_s:
                below += weight
            else:
                below += weight * max(0.0, seconds - start_s) / (end_s - start_s)
                break
            start_s = end_s
        return below / total

    def expected_within(self, seconds: float) -> float:
        """E[min(gap, seconds)]: the integral of the survival function, by octaves."""
        total, survival, passed_s, start_s = sum(self.weights), 1.0, 0.0, 0.0
        for octave, weight in enumerate(self.weights):
            end_s = _SHORTEST_S * 2.0**octave
            if octave == _OCTAVES - 1:
                end_s *= 8
            span_s = min(seconds, end_s) - start_s
            if span_s <= 0:
                break
            slope = weight / total / (end_s - start_s)
            passed_s += span_s * (survival - slope * span_s / 2)
            survival -= weight / total
            start_s = end_s
        return passed_s
