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
_ENDS_S = tuple(
    _SHORTEST_S * 2.0**octave * (8.0 if octave == _OCTAVES - 1 else 1.0)
    for octave in range(_OCTAVES)
)
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
        below, start_s = 0.0, 0.0
        for weight, end_s in zip(self.weights, _ENDS_S, strict=True):
            if seconds < end_s:
                below += weight * (seconds - start_s) / (end_s - start_s)
                break
            below += weight
            start_s = end_s
        return below / sum(self.weights)

    def expected_within(self, seconds: float) -> float:
        """E[min(gap, seconds)]: the integral of the survival function, by octaves."""
        if seconds <= 0.0:
            return 0.0
        total, survival, passed_s, start_s = sum(self.weights), 1.0, 0.0, 0.0
        for weight, end_s in zip(self.weights, _ENDS_S, strict=True):
            share = weight / total
            if seconds < end_s:
                span_s = seconds - start_s
                return passed_s + span_s * (survival - share * span_s / (end_s - start_s) / 2)
            passed_s += (end_s - start_s) * (survival - share / 2)
            survival -= share
            start_s = end_s
        return passed_s
