"""The gain as a function of confidence: what ``nearfar calibrate`` measured for one pair.

A ``GainCurve`` stands wherever a ``GainPrior`` does: it is pure, and the same confidence
always gives the same number.
"""

from __future__ import annotations

from bisect import bisect_right

import msgspec

__all__ = ["GainCurve"]


class GainCurve(msgspec.Struct, frozen=True, kw_only=True):
    """P(cloud right | c) - P(local right | c), linear between knots, constant outside them.

    ``c`` is the confidence as the runtime reports it (``edge_runtime/confidence.py``), before
    any calibration: what it really means is part of the curve.
    """

    knots: tuple[tuple[float, float], ...]
    """(confidence, signed gain): at least one, confidences rising, gains never rising."""
    local_right: float
    """How often the local answer is right: taken for ``c`` where answers carry no score."""

    def signed(self, confidence: float) -> float:
        """In [-1, 1]; below zero where the local answer is the better one."""
        knots = self.knots
        after = bisect_right(knots, confidence, key=lambda knot: knot[0])
        if after == 0:
            return knots[0][1]
        if after == len(knots):
            return knots[-1][1]
        (low, first), (high, second) = knots[after - 1], knots[after]
        share = (confidence - low) / (high - low)
        return first + share * (second - first)

    def gain(self, confidence: float) -> float:
        """g(c): right answers won per image by taking the cloud's answer where it is better."""
        return max(0.0, self.signed(confidence))
