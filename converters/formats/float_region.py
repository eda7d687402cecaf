"""Which arithmetic int8 cannot hold: means, variances, and what divides by their roots.

A variance spans orders of magnitude between channels; 255 steps leave the small ones zero,
and a division by zero behind them (7 dB on a style network whose normalization is written
out; LiteRT's int8 DIV stops with an error). Layers that normalize as one operator are
fine. So the arithmetic around every root or division by a computed value stays in float:
all that leads to it from the nearest layer, and all that follows up to the next one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

__all__ = ["arithmetic_region"]

Node = TypeVar("Node", bound=Hashable)


def arithmetic_region(
    seeds: Iterable[Node],
    before: Mapping[Node, Iterable[Node]],
    after: Mapping[Node, Iterable[Node]],
    arithmetic: set[Node],
) -> set[Node]:
    """``seeds`` and the arithmetic connected to them.

    ``before``, ``after``: producers of a node's inputs, consumers of its outputs.
    ``arithmetic``: the nodes that may be walked through; all others end the walk.
    """
    start = set(seeds)
    region = set(start)
    for neighbors in (before, after):
        waiting = list(start)
        seen = set(start)
        while waiting:
            for node in neighbors.get(waiting.pop(), ()):
                if node in arithmetic and node not in seen:
                    seen.add(node)
                    waiting.append(node)
        region |= seen
    return region
