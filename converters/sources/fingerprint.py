"""Whether two processes built the same net: each child builds it anew, for its own format.

A source that draws random numbers gives other weights as soon as an import before it has drawn
some; what it then becomes is right in no format but the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from edge_runtime.contract.errors import SourceError

__all__ = ["fingerprint", "require_same"]

_SAMPLED = 4096
"""Numbers of one tensor that are looked at, evenly spaced."""
_TOLERANCE = 1e-3
"""Of a tensor's norm: batch norms that were measured may differ in their last digits."""


def fingerprint(module: Any) -> tuple[float, ...]:
    """Two numbers for each floating-point tensor of the net's state.

    Its norm, and its product with a cosine: two draws of the same distribution have about the
    same norm, and products that differ by as much as that.
    """
    import torch

    found: list[float] = []
    with torch.no_grad():
        for value in module.state_dict().values():
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                continue
            flat = value.detach().reshape(-1)
            few = flat[:: -(-flat.numel() // _SAMPLED) or 1].double()
            wave = torch.cos(torch.arange(few.numel(), dtype=torch.float64))
            found += [float(few.norm()), float(few @ wave)]
    return tuple(found)


def require_same(module: Any, expected: Sequence[float]) -> None:
    """Raise ``SourceError`` where ``module`` is not the net that ``expected`` was taken of.

    Empty: nobody knows.
    """
    found = fingerprint(module) if expected else ()
    if len(found) == len(expected) and not any(
        math.fabs(product - wanted) > _TOLERANCE * max(norm, 1e-6)
        for norm, product, wanted in zip(expected[::2], found[1::2], expected[1::2], strict=True)
    ):
        return
    raise SourceError(
        "the source builds other weights in each process, as its random numbers depend on what "
        "was imported before: save its weights and pass --weights FILE, or set the seed right "
        "before the net is built"
    )
