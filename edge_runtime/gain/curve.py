"""The gain as a function of confidence: what ``nearfar calibrate`` measured for one pair.

A ``GainCurve`` stands wherever a ``GainPrior`` does: it is pure, and the same confidence
always gives the same number.
"""

from __future__ import annotations

from bisect import bisect_right

import msgspec

__all__ = ["GainCurve", "Knots"]


Knots = tuple[tuple[float, float], ...]
"""(confidence, value): confidences rising; linear between them, constant outside."""


class GainCurve(msgspec.Struct, frozen=True, kw_only=True):
    """P(cloud right | c) - P(local right | c) for one pair of models.

    ``c`` is the confidence as the runtime reports it (``edge_runtime/confidence.py``), before
    any calibration: what it really means is part of the curve.
    """

    knots: Knots
    """Of the signed gain: at least one; gains never rise."""
    own: Knots = ()
    """Of P(local right | c), never falling; none: the confidence is taken at its word."""
    nodes: tuple[float, ...] = ()
    """Mid-quantiles of the confidences that were measured, each for as many images: what to
    expect before an image's own is known. None: not measured."""
    local_right: float
    """How often the local answer is right: taken for ``c`` where answers carry no score."""

    def signed(self, confidence: float) -> float:
        """In [-1, 1]; below zero where the local answer is the better one."""
        return _at(self.knots, confidence)

    def gain(self, confidence: float) -> float:
        """g(c): right answers won per image by taking the cloud's answer where it is better."""
        return max(0.0, self.signed(confidence))

    def local(self, confidence: float) -> float:
        """P(local right | c): the calibrated confidence."""
        return _at(self.own, confidence) if self.own else min(max(confidence, 0.0), 1.0)

    def cloud(self, confidence: float) -> float:
        """P(cloud right | c)."""
        return min(max(self.local(confidence) + self.signed(confidence), 0.0), 1.0)


def _at(knots: Knots, position: float) -> float:
    after = bisect_right(knots, position, key=lambda knot: knot[0])
    if after == 0:
        return knots[0][1]
    if after == len(knots):
        return knots[-1][1]
    (low, first), (high, second) = knots[after - 1], knots[after]
    return first + (position - low) / (high - low) * (second - first)
