"""What Triton counts of a model, under the names its clients and dashboards know.

One request is one ``success`` or ``fail``; a row that was in a batch is an inference, also one
whose image turned out broken there, and a batch is one execution. Decoding and pre-processing
run inside the model's process: their time is in ``compute_infer``, and ``compute_input`` and
``compute_output`` stay 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

from broker.models.servable import ModelKey
from edge_runtime.contract.errors import (
    BrokerFault,
    DeadlineExceeded,
    InferenceError,
    ModelLoadError,
    Overloaded,
    UploadStalled,
    WorkerLost,
)

__all__ = ["FailureReason", "Statistics", "failure_reason"]

FailureReason = Literal["REJECTED", "CANCELED", "BACKEND", "OTHER"]
_REASONS: Final[tuple[FailureReason, ...]] = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
_BACKEND: Final = {e.code for e in (WorkerLost, InferenceError, ModelLoadError, BrokerFault)}
_REJECTED: Final = {e.code for e in (Overloaded, DeadlineExceeded, UploadStalled)}


def failure_reason(code: str | None) -> FailureReason:
    """Triton's reason for one of our error codes; None: the client left."""
    if code is None:
        return "CANCELED"
    if code in _BACKEND:
        return "BACKEND"
    return "REJECTED" if code in _REJECTED else "OTHER"


@dataclass(slots=True)
class _Duration:
    count: int = 0
    ms: float = 0.0

    def add(self, duration_ms: float) -> None:
        self.count += 1
        self.ms += duration_ms

    @property
    def ns(self) -> int:
        return round(self.ms * 1e6)

    @property
    def document(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


@dataclass(slots=True)
class _Record:
    """Of one model, since the start."""

    success: _Duration = field(default_factory=_Duration)
    fail: _Duration = field(default_factory=_Duration)
    queue: _Duration = field(default_factory=_Duration)
    infer: _Duration = field(default_factory=_Duration)
    batches: dict[int, _Duration] = field(default_factory=dict)
    failures: dict[FailureReason, int] = field(default_factory=lambda: dict.fromkeys(_REASONS, 0))
    last_inference_ms: int = 0

    @property
    def inferences(self) -> int:
        return sum(size * ran.count for size, ran in self.batches.items())

    @property
    def executions(self) -> int:
        return sum(ran.count for ran in self.batches.values())


class Statistics:
    """Counts of every model that was asked for anything. ``now_s``: seconds since the epoch."""

    def __init__(self, now_s: Callable[[], float] = time.time) -> None:
        self._now_s = now_s
        self._records: dict[ModelKey, _Record] = {}

    def _of(self, model: ModelKey) -> _Record:
        return self._records.setdefault(model, _Record())

    def batch_ran(self, model: ModelKey, images: int, duration_ms: float) -> None:
        """A batch came back."""
        self._of(model).batches.setdefault(images, _Duration()).add(duration_ms)

    def answered(
        self, model: ModelKey, total_ms: float, queue_ms: float, inference_ms: float
    ) -> None:
        """A request was answered: time in all, in the queue, and in its batch."""
        record = self._of(model)
        record.success.add(total_ms)
        record.queue.add(queue_ms)
        record.infer.add(inference_ms)
        record.last_inference_ms = int(self._now_s() * 1e3)

    def failed(self, model: ModelKey, reason: FailureReason, total_ms: float) -> None:
        """A request was not."""
        record = self._of(model)
        record.fail.add(total_ms)
        record.failures[reason] += 1
        record.last_inference_ms = int(self._now_s() * 1e3)

    def document(self, models: Iterable[ModelKey]) -> dict[str, object]:
        """The answer to ``GET /v2/models/{name}/stats``."""
        return {"model_stats": [_document(model, self._of(model)) for model in models]}

    def exposition(self, models: Iterable[ModelKey], pending: Callable[[ModelKey], int]) -> bytes:
        """Triton's metrics in the Prometheus text format, all models at 0 from the start.

        ``pending``: requests that upload or wait. Written here and not by the client
        library, which would call a counter ``..._total``.
        """
        known = list(models)
        lines: list[str] = []
        for name, kind, text, value in _METRICS:
            lines += (f"# HELP {name} {text}", f"# TYPE {name} {kind}")
            lines += (f"{name}{{{_labels(model)}}} {value(self._of(model))}" for model in known)
        name = "nv_inference_request_failure"
        lines += (f"# HELP {name} Requests that failed, by reason.", f"# TYPE {name} counter")
        lines += (
            f'{name}{{{_labels(model)},reason="{reason}"}} {count}'
            for model in known
            for reason, count in self._of(model).failures.items()
        )
        name = "nv_inference_pending_request_count"
        lines += (f"# HELP {name} Requests that upload or wait.", f"# TYPE {name} gauge")
        lines += (f"{name}{{{_labels(model)}}} {pending(model)}" for model in known)
        return ("\n".join(lines) + "\n").encode()


_METRICS: Final[tuple[tuple[str, str, str, Callable[[_Record], int]], ...]] = (
    ("nv_inference_request_success", "counter", "Requests that were answered.",
     lambda record: record.success.count),
    ("nv_inference_count", "counter", "Inferences: a batch of n counts as n.",
     lambda record: record.inferences),
    ("nv_inference_exec_count", "counter", "Batches that ran.",
     lambda record: record.executions),
    ("nv_inference_request_duration_us", "counter", "Of answered requests, from their headers on.",
     lambda record: record.success.ns // 1000),
    ("nv_inference_queue_duration_us", "counter", "Of answered requests, waiting for a batch.",
     lambda record: record.queue.ns // 1000),
    ("nv_inference_compute_infer_duration_us", "counter",
     "Of answered requests, in their batch, decoding and pre-processing included.",
     lambda record: record.infer.ns // 1000),
)  # fmt: skip


def _document(model: ModelKey, record: _Record) -> dict[str, object]:
    nothing = _Duration().document
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": record.last_inference_ms,
        "inference_count": record.inferences,
        "execution_count": record.executions,
        "inference_stats": {
            "success": record.success.document,
            "fail": record.fail.document,
            "queue": record.queue.document,
            "compute_input": nothing,
            "compute_infer": record.infer.document,
            "compute_output": nothing,
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": nothing,
                "compute_infer": ran.document,
                "compute_output": nothing,
            }
            for size, ran in sorted(record.batches.items())
        ],
        "memory_usage": [],
        "response_stats": {},
    }


def _labels(model: ModelKey) -> str:
    return f'model="{_escaped(model.name)}",version="{_escaped(model.version)}"'


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
