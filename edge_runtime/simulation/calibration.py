"""Whether predicted chances are kept, and quantiles of weighted values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["Bin", "calibration", "weighted_quantiles"]

_BINS: Final = 10


class Bin(msgspec.Struct, frozen=True, kw_only=True):
    """Predictions between two tenths, and what came of them."""

    low: float
    high: float
    n: int
    predicted: float | None
    """Their mean; None: there are none."""
    observed: float | None
    """Share that would have been, or was, answered in time."""


def weighted_quantiles(
    values: NDArray[np.float64], weights: NDArray[np.float64], shares: Sequence[float]
) -> NDArray[np.float64]:
    """The least values with at least these shares of the weight at or below them.

    Args:
        values: float64 [n], n > 0; infinity is a value.
        weights: float64 [n], positive.
        shares: from 0 to 1.

    Returns float64 [shares].
    """
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[order])
    places = np.searchsorted(below, np.asarray(shares) * below[-1] * (1 - 1e-12))
    found: NDArray[np.float64] = values[order][np.minimum(places, values.size - 1)]
    return found


def calibration(
    predicted: NDArray[np.float64], happened: NDArray[np.bool_]
) -> tuple[float | None, tuple[Bin, ...]]:
    """Brier score (Brier 1950) and a reliability diagram's bins, of requests with a prediction."""
    known = np.isfinite(predicted)
    p, y = predicted[known], happened[known].astype(np.float64)
    if not p.size:
        return None, ()
    place = np.clip((p * _BINS).astype(np.int64), 0, _BINS - 1)
    counts = np.bincount(place, minlength=_BINS)
    sums = np.bincount(place, weights=p, minlength=_BINS)
    hits = np.bincount(place, weights=y, minlength=_BINS)
    bins = tuple(
        Bin(
            low=i / _BINS,
            high=(i + 1) / _BINS,
            n=int(n),
            predicted=float(sums[i] / n) if n else None,
            observed=float(hits[i] / n) if n else None,
        )
        for i, n in enumerate(counts)
    )
    return float(((p - y) ** 2).mean()), bins
