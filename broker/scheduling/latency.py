"""How long a batch takes: T(b), learned from the batches that ran.

For each batch size an exponentially weighted mean (for sums: the wait behind a queue) and a
high quantile of the latest runs (for promises: will this batch make its deadline).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence

__all__ = ["LatencyModel", "RecentQuantile"]

_MEAN_WEIGHT = 0.2
_WINDOW = 64
_QUANTILE = 0.95
_FEW = 3


class RecentQuantile:
    """A quantile of the latest ``window`` values, by nearest rank.

    value = x_(ceil(quantile * n)), the x sorted; but from three values on never the largest,
    which with few values would be the one slow start for a long time.
    """

    def __init__(self, quantile: float = _QUANTILE, window: int = _WINDOW) -> None:
        self._quantile = quantile
        self._recent: deque[float] = deque(maxlen=window)
        self._sorted: list[float] = []

    def observe(self, value: float) -> None:
        """Take a value in; the oldest one leaves when the window is full."""
        if len(self._recent) == self._recent.maxlen:
            del self._sorted[bisect_left(self._sorted, self._recent[0])]
        self._recent.append(value)
        insort(self._sorted, value)

    @property
    def recent(self) -> tuple[float, ...]:
        """The values it is of, oldest first."""
        return tuple(self._recent)

    @property
    def value(self) -> float | None:
        """The quantile; None before the first value."""
        if not self._sorted:
            return None
        count = len(self._sorted)
        rank = math.ceil(self._quantile * count)
        return self._sorted[(min(rank, count - 1) if count >= _FEW else rank) - 1]


class _Cell:
    """The runs of one batch size."""

    def __init__(self, duration_ms: float) -> None:
        self.mean_ms = duration_ms
        self.high = RecentQuantile()
        self.high.observe(duration_ms)

    def observe(self, duration_ms: float) -> None:
        self.mean_ms += _MEAN_WEIGHT * (duration_ms - self.mean_ms)
        self.high.observe(duration_ms)

    @property
    def high_ms(self) -> float:
        # Never below the mean, which a slowdown lifts before the quantile sees it.
        return max(self.high.value or 0.0, self.mean_ms)


class LatencyModel:
    """T(b) of one model on one executor, in milliseconds."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._cells: dict[int, _Cell] = {}
        self._last_observed_s = -math.inf

    def observe(self, batch: int, duration_ms: float, now_s: float) -> None:
        """A batch of this size took so long, and ended now."""
        if batch < 1 or not 0.0 <= duration_ms < math.inf:
            raise ValueError(f"no batch: {batch} images in {duration_ms} ms")
        self._last_observed_s = now_s
        if batch in self._cells:
            self._cells[batch].observe(duration_ms)
            return
        self._cells[batch] = _Cell(duration_ms)
        insort(self._sizes, batch)

    def runs(self) -> Iterator[tuple[int, float, tuple[float, ...]]]:
        """Batch size, mean and latest runs in milliseconds, of each size that ran."""
        for batch in self._sizes:
            cell = self._cells[batch]
            yield batch, cell.mean_ms, cell.high.recent

    def restore(self, batch: int, mean_ms: float, runs_ms: Sequence[float]) -> None:
        """Take in what ``runs`` gave, long ago: it is known, and old."""
        if batch in self._cells or not runs_ms:
            raise ValueError(f"nothing to restore for a batch of {batch}")
        cell = self._cells[batch] = _Cell(runs_ms[0])
        for duration_ms in runs_ms[1:]:
            cell.high.observe(duration_ms)
        cell.mean_ms = mean_ms
        insort(self._sizes, batch)

    def mean_ms(self, batch: int) -> float:
        """What a batch of this size takes on average; 0 when nothing ran yet."""
        return self._estimate(batch, lambda cell: cell.mean_ms)

    def high_ms(self, batch: int) -> float:
        """What it takes in 95 of 100 runs; 0 when nothing ran yet."""
        return self._estimate(batch, lambda cell: cell.high_ms)

    def drain_ms(self, images: int, max_batch: int) -> float:
        """The mean time to run so many images in batches as full as can be."""
        full, rest = divmod(images, max_batch)
        wait_ms = full * self.mean_ms(max_batch) if full else 0.0
        return wait_ms + (self.mean_ms(rest) if rest else 0.0)

    def age_s(self, now_s: float) -> float:
        """Seconds since the latest run; infinity when nothing ran yet."""
        return now_s - self._last_observed_s

    def _estimate(self, batch: int, read: Callable[[_Cell], float]) -> float:
        """Interpolate between the sizes that ran.

        Below the smallest its own time is a bound; above the largest the time grows in
        proportion, which is a bound too, as T(b) = a + c*b with a >= 0.
        """
        if not self._sizes:
            return 0.0
        at = bisect_left(self._sizes, batch)
        if at == len(self._sizes):
            largest = self._sizes[-1]
            return read(self._cells[largest]) * batch / largest
        upper = self._sizes[at]
        upper_ms = read(self._cells[upper])
        if upper == batch or at == 0:
            return upper_ms
        lower = self._sizes[at - 1]
        lower_ms = read(self._cells[lower])
        return lower_ms + (upper_ms - lower_ms) * (batch - lower) / (upper - lower)
