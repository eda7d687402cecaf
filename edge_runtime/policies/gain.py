"""What the cloud's answer is worth, given how sure the local one is of itself."""

from __future__ import annotations

from typing import Final, Protocol, runtime_checkable

import msgspec

from edge_runtime.policies.base import Policy

__all__ = ["CONFIDENCE_NODES", "Gain", "GainPrior", "TakesGain"]

CONFIDENCE_NODES: Final = (0.232, 0.445, 0.594, 0.711, 0.807, 0.885, 0.946, 0.989)
"""Mid-quantiles of Beta(1.6, 0.69), a typical spread of a small classifier's confidence;
each stands for one eighth of the images whose confidence is not yet known."""


class Gain(Protocol):
    """What is known of one pair of models; pure."""

    @property
    def local_right(self) -> float:
        """How often the local answer is right: taken for ``c`` where answers have no score."""

    @property
    def nodes(self) -> tuple[float, ...]:
        """Confidences to expect, each of as many images; none: ``CONFIDENCE_NODES``."""

    def cloud(self, confidence: float) -> float:
        """P(cloud right | c)."""

    def signed(self, confidence: float) -> float:
        """P(cloud right | c) less P(local right | c)."""

    def gain(self, confidence: float) -> float:
        """``signed``, at least 0."""


@runtime_checkable
class TakesGain(Protocol):
    """A policy that decides by a gain, and can be made anew with a measured one."""

    @property
    def gain_is_prior(self) -> bool:
        """False: its caller gave it a gain, which stands."""

    def with_gain(self, gain: Gain) -> Policy:
        """The same policy with this gain."""


class GainPrior(msgspec.Struct, frozen=True, kw_only=True):
    """How often the cloud model is right, given whether the local one is.

    The defaults describe a compact and a full-size ImageNet classifier (72 % and 81 % right
    on the same photos); measure your own pair where you can. ``c`` is taken to be
    calibrated: the local model is right in a share ``c`` of the images it gives ``c``.
    """

    cloud_right_if_local_right: float = 0.95
    cloud_right_if_local_wrong: float = 0.48
    local_right: float = 0.72
    """Taken for ``c`` where answers carry no score: that compact classifier's share."""

    @property
    def nodes(self) -> tuple[float, ...]:
        """Of a typical small classifier."""
        return CONFIDENCE_NODES

    def cloud(self, confidence: float) -> float:
        """P(cloud right | c)."""
        c = min(max(confidence, 0.0), 1.0)
        return self.cloud_right_if_local_right * c + self.cloud_right_if_local_wrong * (1.0 - c)

    def signed(self, confidence: float) -> float:
        """P(cloud right | c) - c: below zero where the local answer is the better one."""
        return self.cloud(confidence) - min(max(confidence, 0.0), 1.0)

    def gain(self, confidence: float) -> float:
        """g(c): right answers won per image by taking the cloud's answer where it is better."""
        return max(0.0, self.signed(confidence))
