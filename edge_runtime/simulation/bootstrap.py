"""Confidence intervals by resampling traces (Efron 1979, percentile intervals).

Traces, not requests, are drawn again: requests of one trace share its link and say little
about the next one's. A draw takes the same traces for a policy and for what it is compared
with, so what is hard for all cancels out.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["Bootstrap", "Estimate"]

_MAX_UNDEFINED: Final = 0.05
_LEAST_HEADROOM: Final = 1e-9


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A figure over traces of equal weight."""

    mean: float | None
    """None: undefined, as the share of a gain where there is nothing to gain."""
    ci95: tuple[float, float] | None
    """From the 2.5th to the 97.5th percentile over draws; None: fewer than two traces, or
    undefined in more than a twentieth of the draws."""


class Bootstrap:
    """Draws of ``traces`` traces (at least 1), the same for every figure and every policy."""

    def __init__(self, traces: int, *, seed: int = 0, draws: int = 2_000) -> None:
        rng = np.random.default_rng(seed)
        # How often each trace is in each draw: float64 [draws, traces], rows that sum to 1.
        counts = rng.multinomial(traces, np.full(traces, 1 / traces), size=draws)
        self._weights = counts.astype(np.float64) / traces
        self._traces = traces

    def mean(self, values: NDArray[np.float64]) -> Estimate:
        """Of one value per trace, float64 [traces]."""
        if not values.size:
            return Estimate(mean=None, ci95=None)
        return Estimate(mean=float(values.mean()), ci95=self._interval(self._weights @ values))

    def capture(
        self,
        policy: NDArray[np.float64],
        baseline: NDArray[np.float64],
        bound: NDArray[np.float64],
        *,
        least: float,
    ) -> Estimate:
        """Share of what can be gained: ``sum(policy - baseline) / sum(bound - baseline)``.

        One value per trace each, float64 [traces]. Sums come before the ratio, so a trace
        with nothing to gain weighs nothing instead of dividing by nothing. None where the
        mean of ``bound - baseline`` is below ``least``.
        """
        gained, possible = policy - baseline, bound - baseline
        if not possible.size or possible.mean() < least:
            return Estimate(mean=None, ci95=None)
        above = self._weights @ possible
        defined = above > max(least / 10, _LEAST_HEADROOM)
        ratios = np.full(above.shape, np.nan)
        np.divide(self._weights @ gained, above, out=ratios, where=defined)
        return Estimate(mean=float(gained.sum() / possible.sum()), ci95=self._interval(ratios))

    def _interval(self, draws: NDArray[np.float64]) -> tuple[float, float] | None:
        usable = draws[np.isfinite(draws)]
        if self._traces < 2 or usable.size < (1 - _MAX_UNDEFINED) * draws.size:
            return None
        low, high = np.percentile(usable, (2.5, 97.5))
        return float(low), float(high)
