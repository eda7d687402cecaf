"""What ``EdgeRuntime`` gives back: answers and its own state, as frozen structs."""

from __future__ import annotations

from enum import StrEnum

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.conditions import Conditions
from edge_runtime.contract.answer_codec import class_colors
from edge_runtime.contract.tasks import Box, Prediction, Task, TaskName, task_name
from edge_runtime.contract.tasks.answer import Answer
from edge_runtime.contract.wire import ModelRef, Region
from edge_runtime.policies.base import BreakerState, Decision, Situation

__all__ = [
    "BrokerStatus",
    "Counts",
    "InferenceSource",
    "Measured",
    "Result",
    "Status",
    "Timings",
    "VariantStatus",
    "make_result",
]


class InferenceSource(StrEnum):
    """Which side answered."""

    ON_DEVICE = "ON_DEVICE"
    IN_CLOUD = "IN_CLOUD"


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds; None: did not happen, or not known."""

    total_ms: float
    """From the call to the answer."""
    local_wait_ms: float | None = None
    local_ms: float | None = None
    """Decode, pre-processing, model, post-processing."""
    cloud_ms: float | None = None
    """From the start of the offload to its answer."""
    upload_ms: float | None = None
    """What the broker took to read the body (``Server-Timing: recv``)."""
    server_queue_ms: float | None = None
    server_inference_ms: float | None = None


class Result(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One answered image or seed; which of the answers is there depends on ``task``."""

    task: TaskName
    label: str | None
    """Of the first prediction or box; None: there is none, or the task names no classes."""
    score: float | None
    """Of the same."""
    predictions: tuple[Prediction, ...] = ()
    """Classification, best first."""
    boxes: tuple[Box, ...] = ()
    """Detection, best first, in pixels of the upright image; may be empty."""
    class_map: NDArray[np.uint8] | None = None
    """Segmentation: the class of every pixel, ``[H, W]`` at the size the model gives."""
    image: NDArray[np.uint8] | None = None
    """Image to image, generation, reconstruction: RGB ``[H, W, 3]``."""
    region: Region | None = None
    """What ``class_map`` or ``image`` shows: x_min, y_min, x_max, y_max in pixels of the
    upright image, as a crop may leave its edges out. None: all of it."""
    inference_source: InferenceSource
    model: str | ModelRef
    """The variant's id, or which cloud model answered."""
    deadline_met: bool
    timings: Timings
    decision: Decision
    """The last one made for this image: after a cascade, the one that knew the confidence."""
    situation: Situation
    """What that decision was made from."""
    error: str | None = None
    """Code of the side that was tried and failed while the other one answered."""

    def class_map_for(self, height: int, width: int, *, outside: int = 255) -> NDArray[np.uint8]:
        """The class of every pixel of the photo, uint8 ``[height, width]``.

        The nearest value of ``class_map``; ``outside`` where the model did not look.
        ``height`` and ``width`` are those of the upright photo. Raises ``ValueError`` when
        there is no class map.
        """
        if self.class_map is None:
            raise ValueError(f"{self.task} answers no class map")
        x_min, y_min, x_max, y_max = self.region or (0.0, 0.0, width, height)
        rows, rows_in = _nearest(height, y_min, y_max, self.class_map.shape[0])
        columns, columns_in = _nearest(width, x_min, x_max, self.class_map.shape[1])
        found = self.class_map[np.ix_(rows, columns)]
        return np.where(np.outer(rows_in, columns_in), found, np.uint8(outside))

    def colored_class_map(self) -> NDArray[np.uint8]:
        """``class_map`` as uint8 RGB ``[H, W, 3]``, for people.

        Raises ``ValueError`` when there is no class map.
        """
        if self.class_map is None:
            raise ValueError(f"{self.task} answers no class map")
        return np.asarray(class_colors()[self.class_map])


def make_result(
    task: Task,
    answer: Answer,
    source: InferenceSource,
    model: str | ModelRef,
    *,
    top_k: int | None,
    deadline_ms: float,
    timings: Timings,
    decision: Decision,
    situation: Situation,
    error: str | None,
) -> Result:
    """An answer of either side as the caller gets it; ``top_k``: None: all of it."""
    predictions = (answer.predictions or ())[:top_k]
    boxes = (answer.boxes or ())[:top_k]
    first: Prediction | Box | None = None
    if predictions or boxes:
        first = predictions[0] if predictions else boxes[0]
    return Result(
        task=task_name(task),
        label=None if first is None else first.label,
        score=None if first is None else first.score,
        predictions=predictions,
        boxes=boxes,
        class_map=answer.class_map,
        image=answer.image,
        region=answer.region,
        inference_source=source,
        model=model,
        deadline_met=timings.total_ms <= deadline_ms,
        timings=timings,
        decision=decision,
        situation=situation,
        error=error,
    )


def _nearest(
    size: int, low: float, high: float, cells: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The cell between ``low`` and ``high`` over each pixel's center, and whether one is."""
    position = (np.arange(size) + 0.5 - low) * (cells / max(high - low, 1e-9))
    inside = (position >= 0) & (position < cells)
    return np.clip(np.floor(position), 0, cells - 1).astype(np.int64), inside


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One variant that was loaded and timed, or why it could not be."""

    variant: str
    p50_ms: float | None = None
    p95_ms: float | None = None
    error: str | None = None


class VariantStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The local model."""

    variant: str
    format: str
    precision: str
    reason: str
    """Why this one."""
    measured: tuple[Measured, ...]
    """In the order tried."""
    p50_ms: float
    p95_ms: float
    pending: int
    """Requests waiting for the local model or in it."""


class BrokerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The way to the broker, and the broker."""

    url: str | None = None
    """Which one; of a transport of the app's own, its number."""
    model: str | None
    """The cloud model in use; None: not yet found."""
    breaker: BreakerState
    obstacle: str | None
    last_error: str | None
    connection_open: bool
    rate_bytes_per_s: float
    """Median of the belief about the upload rate."""
    rate_log_deviation: float
    rate_samples: int
    rtt_ms: float
    rtt_samples: int
    queue_ms: float
    inference_ms: float


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Since the runtime was made."""

    requests: int = 0
    on_device: int = 0
    in_cloud: int = 0
    failed: int = 0
    """Ended in an error."""
    deadline_missed: int = 0
    uploads: int = 0
    """Uploads started, whether or not their answer came in time."""
    uploaded_bytes: int = 0
    """Bodies of these."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of one ``EdgeRuntime``."""

    bundle: str
    policy: str
    closed: bool
    variant: VariantStatus | None
    """None: the policy uses no local model, or none could be loaded."""
    variant_error: str | None
    """Why no local model could be loaded."""
    broker: BrokerStatus | None
    """The one that would be asked now."""
    conditions: Conditions
    counts: Counts
    brokers: tuple[BrokerStatus, ...] = ()
    """All of them, in the order they were given."""
