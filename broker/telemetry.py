"""Metrics for Prometheus, in a registry of the broker's own.

Label values come from bounded sets (routes, statuses, error codes, served models): never a
tenant, a key, an address or anything of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from broker.executors.base import Executor, LoadedModel
from broker.models.servable import ModelKey
from broker.oip.statistics import Statistics, failure_reason
from broker.scheduling.residency import Residency
from broker.scheduling.scheduler import Scheduler
from broker.tallies import TallyCounter, TallyHistogram

__all__ = ["METRICS_CONTENT_TYPE", "Telemetry"]

METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class _Loaded(Collector):
    """Which models are in memory, and which were."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._seen: dict[ModelKey, LoadedModel] = {}

    def collect(self) -> Iterator[Metric]:
        """Asked at every scrape."""
        now = self._executor.stats().models
        self._seen |= now
        family = GaugeMetricFamily(
            "nearfar_model_loaded",
            "1 while a model is in memory, by what computes it; 0 when it was there before.",
            labels=("model", "version", "runtime", "precision"),
        )
        for model, how in self._seen.items():
            labels = (model.name, model.version, how.runtime, how.precision)
            family.add_metric(labels, float(model in now))
        yield family


class Telemetry:
    """What the broker counts. Also the scheduler's ``Observer``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.statistics = Statistics()
        self._models: tuple[ModelKey, ...] = ()
        self._pending: Callable[[ModelKey], int] = lambda _: 0
        self._requests = TallyCounter(
            "nearfar_requests",
            "Requests answered, by route and HTTP status.",
            ("route", "status"),
            self.registry,
        )
        self._request_seconds = TallyHistogram(
            "nearfar_request_seconds",
            "From the end of the headers to the end of the answer.",
            ("route",),
            _SECONDS,
            self.registry,
        )
        self._errors = Counter(
            "nearfar_errors", "Error answers, by code.", ("code",), registry=self.registry
        )
        self._upload_bytes = TallyCounter(
            "nearfar_upload_bytes", "Bytes of image bodies read.", (), self.registry
        )
        self._queue_seconds = TallyHistogram(
            "nearfar_queue_seconds",
            "Wait of an answered request for its batch.",
            ("model",),
            _SECONDS,
            self.registry,
        )
        self._batch_seconds = Histogram(
            "nearfar_batch_seconds",
            "One batch in its executor, decoding included.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._batch_images = Histogram(
            "nearfar_batch_images",
            "Images of one batch.",
            ("model",),
            buckets=_BATCH_SIZES,
            registry=self.registry,
        )
        self._batches_lost = Counter(
            "nearfar_batches_lost",
            "Batches that failed as a whole.",
            ("model",),
            registry=self.registry,
        )
        self._dropped = Counter(
            "nearfar_dropped",
            "Requests that left the queue because they would be late.",
            ("model",),
            registry=self.registry,
        )
        self._malformed = Counter(
            "nearfar_malformed_requests",
            "Connections closed because what came was no HTTP.",
            registry=self.registry,
        )
        self._sessions = Gauge("nearfar_sessions", "Open sessions.", registry=self.registry)
        self._sessions_closed = Counter(
            "nearfar_sessions_closed",
            "Sessions that ended, by reason.",
            ("reason",),
            registry=self.registry,
        )
        self._session_frames = Counter(
            "nearfar_session_frames",
            "Frames of sessions, by direction and type.",
            ("direction", "frame"),
            registry=self.registry,
        )
        self._session_cancels = Counter(
            "nearfar_session_cancels",
            "Requests that devices withdrew, by how far they were.",
            ("phase",),
            registry=self.registry,
        )
        self._replays = Counter(
            "nearfar_replays",
            "Retries that joined their first try or got its answer.",
            registry=self.registry,
        )
        self._rollbacks = Counter(
            "nearfar_rollbacks",
            "Canaries that were found worse than the stable version and ended.",
            ("model",),
            registry=self.registry,
        )
        self._shadows = Counter(
            "nearfar_shadows",
            "Requests offered to a shadow version: agreed, differed, failed, skipped.",
            ("model", "version", "result"),
            registry=self.registry,
        )
        self._version_requests = TallyCounter(
            "nearfar_version_requests",
            "Requests to run a model, by version and HTTP status.",
            ("model", "version", "status"),
            self.registry,
        )
        self._connections = Gauge(
            "nearfar_connections", "Open connections.", registry=self.registry
        )

    def watch(self, scheduler: Scheduler, executor: Executor, models: tuple[ModelKey, ...]) -> None:
        """Show what these say of themselves, asked at every scrape."""
        self._models, self._pending = models, scheduler.queued
        queued = Gauge(
            "nearfar_queued", "Requests that upload or wait.", ("model",), registry=self.registry
        )
        for name in sorted({model.name for model in models}):
            versions = [model for model in models if model.name == name]
            queued.labels(name).set_function(
                lambda versions=versions: sum(map(scheduler.queued, versions))  # type: ignore[misc]
            )
        ready = Gauge(
            "nearfar_executor_ready", "1 when a batch can run now.", registry=self.registry
        )
        ready.set_function(lambda: float(executor.stats().ready))
        quarantined = Gauge(
            "nearfar_executor_quarantined",
            "Inputs that are not taken again.",
            registry=self.registry,
        )
        quarantined.set_function(lambda: executor.stats().quarantined)
        self.registry.register(_Loaded(executor))
        restarts = Gauge(
            "nearfar_executor_restarts", "Restarts of the worker.", registry=self.registry
        )
        restarts.set_function(lambda: executor.stats().restarts)

    def watch_memory(self, residency: Residency) -> None:
        """Show what the memory budget does."""
        for name, text, read in (
            ("nearfar_memory_budget_bytes", "Room for models.", lambda: residency.budget_bytes),
            ("nearfar_memory_used_bytes", "Program files in memory.", lambda: residency.used_bytes),
            ("nearfar_model_loads", "Models brought into memory.", lambda: residency.loads),
            ("nearfar_model_evictions", "Models that made room.", lambda: residency.evictions),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    # What the HTTP layer tells ---------------------------------------------------

    def request_answered(self, route: str, status: int, seconds: float) -> None:
        """One answer went out."""
        self._requests.add((route, str(status)))
        self._request_seconds.add((route,), seconds)

    def inference_ended(
        self,
        model: ModelKey,
        *,
        status: int,
        code: str | None,
        total_ms: float,
        queue_ms: float | None,
        inference_ms: float | None,
    ) -> None:
        """A request to run a model got its answer, or the error of ``code``.

        ``code`` None beside an error: its client left. ``queue_ms`` and ``inference_ms``: in the
        queue and in its batch.
        """
        self._version_requests.add((model.name, model.version, str(status)))
        if status < 400:
            self.statistics.answered(model, total_ms, queue_ms or 0.0, inference_ms or 0.0)
        else:
            self.statistics.failed(model, failure_reason(code), total_ms)

    def error_answered(self, code: str) -> None:
        """It was an error."""
        self._errors.labels(code).inc()

    def body_read(self, size_bytes: int) -> None:
        """One image arrived."""
        self._upload_bytes.add((), size_bytes)

    def image_answered(self, model: str, queue_ms: float) -> None:
        """One image was answered after waiting so long for its batch."""
        self._queue_seconds.add((model,), queue_ms / 1e3)

    def session_ended(self, route: str, status: int) -> None:
        """The upgraded connection of a session is closed."""
        self._requests.add((route, str(status)))

    def sessions_changed(self, open_now: int) -> None:
        """A session came or went."""
        self._sessions.set(open_now)

    def session_closed(self, reason: str) -> None:
        """Why one went."""
        self._sessions_closed.labels(reason).inc()

    def session_frame(self, direction: str, frame: str) -> None:
        """One frame was read (``in``) or written (``out``)."""
        self._session_frames.labels(direction, frame).inc()

    def session_cancel(self, phase: str) -> None:
        """A device withdrew a request: ``uploading``, ``waiting`` or ``ended``."""
        self._session_cancels.labels(phase).inc()

    def replayed(self) -> None:
        """A retry needed no run of its own."""
        self._replays.inc()

    def malformed_request(self) -> None:
        """Something came that is no HTTP."""
        self._malformed.inc()

    def connections_changed(self, open_now: int) -> None:
        """A connection came or went."""
        self._connections.set(open_now)

    def rolled_back(self, model: str) -> None:
        """A canary of this model was ended for its errors or its latency."""
        self._rollbacks.labels(model).inc()

    def shadowed(self, model: ModelKey, result: str) -> None:
        """A request was offered to this version: what became of it."""
        self._shadows.labels(model.name, model.version, result).inc()

    # What the scheduler tells ------------------------------------------------------

    def batch_ran(self, model: ModelKey, images: int, duration_ms: float) -> None:
        """A batch came back."""
        self._batch_images.labels(model.name).observe(images)
        self._batch_seconds.labels(model.name).observe(duration_ms / 1e3)
        self.statistics.batch_ran(model, images, duration_ms)

    def batch_interrupted(
        self, model: ModelKey, images: int, duration_ms: float, *, at_fault: bool
    ) -> None:
        """A batch came back late: its requests have waited so long."""
        self.batch_ran(model, images, duration_ms)

    def batch_lost(self, model: ModelKey, images: int) -> None:
        """A batch failed as a whole."""
        self._batches_lost.labels(model.name).inc()

    def dropped(self, model: ModelKey) -> None:
        """A request left the queue because it would be late."""
        self._dropped.labels(model.name).inc()

    def exposition(self) -> bytes:
        """All metrics in the Prometheus text format, Triton's names after ours."""
        ours = generate_latest(self.registry)
        return ours + self.statistics.exposition(self._models, self._pending)
