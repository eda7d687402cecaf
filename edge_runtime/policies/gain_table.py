"""What decisions need of a gain, tabulated once for each policy.

A gain is asked at the confidences to expect, which are the same for every request; sums of
which nothing but the gain enters are made here, and not in every decision.
"""

from __future__ import annotations

from edge_runtime.policies.gain import CONFIDENCE_NODES, Gain

__all__ = ["GainTable"]


class GainTable:
    """``gain`` at its nodes, each of which stands for as many images."""

    __slots__ = ("gain", "local_better", "mean_confidence", "pairs", "share", "signed")

    def __init__(self, gain: Gain) -> None:
        nodes = gain.nodes or CONFIDENCE_NODES
        self.gain = gain
        self.signed = tuple(gain.signed(c) for c in nodes)
        """P(cloud right) less P(local right), at each node."""
        self.pairs = tuple((gain.signed(c), gain.cloud(c)) for c in nodes)
        """The same, and P(cloud right)."""
        self.share = 1.0 / len(nodes)
        """Of the images, that one node stands for."""
        self.mean_confidence = sum(q - g for g, q in self.pairs) / len(nodes)
        """P(local right)."""
        self.local_better = sum(max(0.0, -g) for g in self.signed)
        """Sum of the losses where the local answer is the better one."""
