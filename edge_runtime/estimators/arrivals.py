"""The rhythm of an app's requests: how likely the next one comes within some seconds.

Gaps between requests are counted in octaves of time with exponential forgetting. A
photographer's gaps have two humps (shots of a burst, pauses between bursts), so no single
rate describes them; octaves describe both.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from operator import sub

import msgspec

__all__ = ["ArrivalEstimator"]

_SHORTEST_S = 0.125
_OCTAVES = 12
_ENDS_S = tuple(
    _SHORTEST_S * 2.0**octave * (8.0 if octave == _OCTAVES - 1 else 1.0)
    for octave in range(_OCTAVES)
)
_STARTS_S = (0.0, *_ENDS_S[:-1])
_LENGTHS_S = tuple(end_s - start_s for start_s, end_s in zip(_STARTS_S, _ENDS_S, strict=True))
_FORGET = 0.97
_PRIOR_WEIGHT = 2.0
_PRIOR_MEAN_S = 10.0


def _prior() -> tuple[float, ...]:
    """Weight of an exponential gap of 10 s in each octave; the first and last are open."""
    edges = [_SHORTEST_S * 2.0**k for k in range(_OCTAVES - 1)]
    survival = [1.0, *(math.exp(-edge / _PRIOR_MEAN_S) for edge in edges), 0.0]
    return tuple(_PRIOR_WEIGHT * (survival[k] - survival[k + 1]) for k in range(_OCTAVES))


class ArrivalEstimator(msgspec.Struct, frozen=True, kw_only=True, dict=True):
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
        total, below, _, _ = self._sums
        octave = bisect_right(_ENDS_S, seconds)
        if octave == _OCTAVES:
            return below[octave] / total
        within = self.weights[octave] * (seconds - _STARTS_S[octave]) / _LENGTHS_S[octave]
        return (below[octave] + within) / total

    def expected_within(self, seconds: float) -> float:
        """E[min(gap, seconds)]: the integral of the survival function, by octaves."""
        if seconds <= 0.0:
            return 0.0
        total, _, survival, passed_s = self._sums
        octave = bisect_right(_ENDS_S, seconds)
        if octave == _OCTAVES:
            return passed_s[octave]
        share = self.weights[octave] / total
        span_s = seconds - _STARTS_S[octave]
        inside = survival[octave] - share * span_s / _LENGTHS_S[octave] / 2
        return passed_s[octave] + span_s * inside

    @cached_property
    def _sums(self) -> tuple[float, list[float], list[float], list[float]]:
        """The sum of all; then, before each octave and after the last one, three running ones.

        Those are of the weights, the survival function, and its integral. The decisions of
        one request ask for them two dozen times.
        """
        weights = self.weights
        total = sum(weights)
        shares = [weight / total for weight in weights]
        survival = list(accumulate(shares, sub, initial=1.0))
        passed_s = [
            length_s * (alive - share / 2)
            for length_s, alive, share in zip(_LENGTHS_S, survival, shares, strict=False)
        ]
        return (
            total,
            list(accumulate(weights, initial=0.0)),
            survival,
            list(accumulate(passed_s, initial=0.0)),
        )
