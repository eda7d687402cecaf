"""From the values a tensor took to the range that 8 bits span: min/max, percentile or MSE.

``minmax`` clips nothing and is the default: on trained image nets it is within noise of the
best, and it is the only one whose error has no tail. A few outliers can waste most of the
levels, though; then a clipped range costs less than it saves:

* ``percentile:P`` keeps the middle P percent of the values;
* ``mse`` minimizes the expected squared error (Banner et al., NeurIPS 2019; Krishnamoorthi
  2018, section 3.1): with step ``d = (high - low) / 255``, values inside cost ``d^2 / 12``
  each, values outside the square of what is cut off, zeros nothing.

Values are gathered into one histogram a tensor, so the memory does not grow with images.
"""

from __future__ import annotations

import math
import re
from typing import Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import ConfigError

__all__ = ["MINMAX", "Histogram", "RangeMethod", "parse_ranges"]

_BINS: Final = 2048
_STEPS: Final = 100
"""How many limits are tried on each side."""
_LEVELS: Final = 255
_MIN_PERCENT: Final = 90.0


class RangeMethod(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to choose the range of an activation."""

    kind: Literal["minmax", "percentile", "mse"] = "minmax"
    percent: float = 100.0
    """Share of the values inside, for ``percentile``."""

    @property
    def sentence(self) -> str:
        """For reports."""
        if self.kind == "percentile":
            return f"the middle {self.percent:g} % of the values"
        return "least squared error" if self.kind == "mse" else "min-max over all inputs"


MINMAX: Final = RangeMethod()


def parse_ranges(text: str) -> RangeMethod:
    """``minmax``, ``mse`` or ``percentile:99.99``. Raises ``ConfigError``."""
    if text in ("minmax", "mse"):
        return RangeMethod(kind="mse" if text == "mse" else "minmax")
    found = re.fullmatch(r"percentile:([0-9]{1,3}(?:\.[0-9]{1,6})?)", text)
    if found is None or not _MIN_PERCENT <= float(found[1]) <= 100.0:
        raise ConfigError(
            f"ranges {text!r}: take minmax, mse, or percentile:P with P from "
            f"{_MIN_PERCENT:g} to 100, for example percentile:99.99"
        )
    return RangeMethod(kind="percentile", percent=float(found[1]))


class Histogram:
    """The values of one tensor, exact at both ends.

    Bins are ``2^k`` wide and begin at multiples of that, so a growing range merges pairs of
    bins and moves nothing.
    """

    def __init__(self) -> None:
        self.low = math.inf
        self.high = -math.inf
        self._zeros = 0
        self._width = 0.0
        self._first = 0
        """Number of the first bin: it begins at ``_first * _width``."""
        self._counts: NDArray[np.int64] = np.zeros(0, np.int64)

    def observe(self, values: NDArray[np.floating]) -> None:
        """Values of any shape; those that are not finite are left out."""
        flat = np.asarray(values, np.float64).reshape(-1)
        flat = flat[np.isfinite(flat)]
        if not flat.size:
            return
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        flat = flat[flat != 0.0]
        self._zeros += int(values.size) - int(flat.size)
        if not flat.size:
            return
        # Zero is in every range that 8 bits span, and so always an edge of a bin.
        self._cover(min(float(flat.min()), 0.0), max(float(flat.max()), 0.0))
        index = np.floor(flat / self._width).astype(np.int64) - self._first
        self._counts += np.bincount(index, minlength=len(self._counts))

    def _cover(self, low: float, high: float) -> None:
        """Make room for values from ``low`` to ``high``."""
        if not self._width:
            self._width = 2.0 ** math.ceil(math.log2((high - low) / (_BINS / 2)))
            self._first = math.floor(low / self._width)
        while True:
            first = min(math.floor(low / self._width), self._first)
            last = max(math.floor(high / self._width), self._first + len(self._counts) - 1)
            if last - first < _BINS:
                break
            self._halve()
        before = self._first - first
        after = last - (self._first + len(self._counts) - 1)
        if before or after:
            self._counts = np.pad(self._counts, (before, after))
            self._first = first

    def _halve(self) -> None:
        counts = np.pad(self._counts, (self._first % 2, 0))
        counts = np.pad(counts, (0, len(counts) % 2))
        self._first //= 2
        self._width *= 2.0
        self._counts = counts.reshape(-1, 2).sum(axis=1)

    def bounds(self, method: RangeMethod) -> tuple[float, float]:
        """The range to quantize; (0, 0) when nothing was observed."""
        if self.low > self.high:
            return 0.0, 0.0
        if method.kind == "minmax" or not self._counts.sum():
            return self.low, self.high
        if method.kind == "percentile":
            return self._percentile(method.percent / 100.0)
        return self._least_error()

    @property
    def _centers(self) -> NDArray[np.float64]:
        middle = (self._first + np.arange(len(self._counts)) + 0.5) * self._width
        return np.clip(middle, self.low, self.high)

    def _percentile(self, share: float) -> tuple[float, float]:
        counts = self._counts.astype(np.float64)
        edges = (self._first + np.arange(len(counts) + 1)) * self._width
        if self._zeros:  # a spike: no width of its own
            at = int(np.searchsorted(edges, 0.0))
            counts = np.insert(counts, at, self._zeros)
            edges = np.insert(edges, at, 0.0)
        reached = np.concatenate([[0.0], np.cumsum(counts)])
        tail = (1.0 - share) / 2.0 * reached[-1]
        low, high = np.interp([tail, reached[-1] - tail], reached, edges)
        # Bins reach beyond the values at both ends.
        return min(max(float(low), self.low), self.high), max(min(float(high), self.high), self.low)

    def _least_error(self) -> tuple[float, float]:
        """The cheapest of ``_STEPS`` lower and ``_STEPS`` upper limits; zero is inside."""
        fractions = np.linspace(1.0, 1.0 / _STEPS, _STEPS)
        lows, highs = fractions * min(self.low, 0.0), fractions * max(self.high, 0.0)
        over, above = self._cut(highs)
        under, below = self._cut(lows)
        inside = self._counts.sum() - above[None, :] - below[:, None]
        step = (highs[None, :] - lows[:, None]) / _LEVELS
        cost = inside * step**2 / 12.0 + over[None, :] + under[:, None]
        row, column = np.unravel_index(int(cost.argmin()), cost.shape)
        return float(lows[row]), float(highs[column])

    def _cut(self, limits: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For each limit, on its side of zero: squared error of what lies beyond, and count."""
        values, counts = self._centers, self._counts.astype(np.float64)
        beyond = values[None, :] - limits[:, None]
        if limits[0] <= 0.0:
            beyond = -beyond
        if not limits[0]:  # no value on this side
            return np.zeros(len(limits)), np.zeros(len(limits))
        outside = np.where(beyond > 0, counts[None, :], 0.0)
        return (outside * beyond**2).sum(axis=1), outside.sum(axis=1)
