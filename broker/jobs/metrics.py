"""What Prometheus is told of jobs, asked at every scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from broker.jobs.jobs import Jobs

__all__ = ["JobMetrics"]


class JobMetrics(Collector):
    """Jobs that are there, and how those of this process ended."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def collect(self) -> Iterator[Metric]:
        """Two families; the second counts from the start of the process."""
        live = GaugeMetricFamily("nearfar_jobs", "Jobs that have not ended.", labels=("state",))
        for state, count in self._jobs.live().items():
            live.add_metric((state,), count)
        yield live
        ended = CounterMetricFamily(
            "nearfar_jobs_ended", "Jobs that ended, and how.", labels=("model", "state")
        )
        for (model, state), count in self._jobs.ended.items():
            ended.add_metric((model, state), count)
        yield ended
