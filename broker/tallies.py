"""Counters and histograms for what happens several times in each request.

The client library's own take a lock and two checks for every number; these are used from the
event loop's thread alone, and become the library's metrics when they are asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["TallyCounter", "TallyHistogram"]

Labels = tuple[str, ...]


class TallyCounter(Collector):
    """Sums by label values."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], registry: CollectorRegistry
    ) -> None:
        self._name, self._text, self._labels = name, text, tuple(labels)
        self._sums: dict[Labels, float] = {} if labels else {(): 0.0}
        registry.register(self)

    def add(self, labels: Labels, value: float = 1.0) -> None:
        """``labels``: values, in the order of the names."""
        self._sums[labels] = self._sums.get(labels, 0.0) + value

    def describe(self) -> list[Metric]:
        """Name and text, without numbers."""
        return [CounterMetricFamily(self._name, self._text, labels=self._labels)]

    def collect(self) -> Iterator[Metric]:
        """Asked at every scrape."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in self._sums.items():
            family.add_metric(labels, value)
        yield family


class _Row:
    __slots__ = ("counts", "total")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * buckets
        self.total = 0.0


class TallyHistogram(Collector):
    """Counts by bucket and label values. ``bounds``: upper ones, included, rising."""

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str],
        bounds: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._text, self._labels = name, text, tuple(labels)
        self._bounds = tuple(bounds)
        self._rows: dict[Labels, _Row] = {}
        registry.register(self)

    def add(self, labels: Labels, value: float) -> None:
        """``labels``: values, in the order of the names."""
        row = self._rows.get(labels)
        if row is None:
            row = self._rows[labels] = _Row(len(self._bounds) + 1)
        row.counts[bisect_left(self._bounds, value)] += 1
        row.total += value

    def describe(self) -> list[Metric]:
        """Name and text, without numbers."""
        return [HistogramMetricFamily(self._name, self._text, labels=self._labels)]

    def collect(self) -> Iterator[Metric]:
        """Asked at every scrape."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        names = [str(float(bound)) for bound in self._bounds] + ["+Inf"]
        for labels, row in self._rows.items():
            so_far, buckets = 0, []
            for name, count in zip(names, row.counts, strict=True):
                so_far += count
                buckets.append((name, float(so_far)))
            family.add_metric(labels, buckets, row.total)
        yield family
