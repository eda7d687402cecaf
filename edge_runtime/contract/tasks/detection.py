"""Object detection: one image in, labeled boxes out.

The model's heads, ``deltas`` float32 ``[1, N, 4]`` and ``logits`` float32 ``[1, N, C]``,
answer for N fixed anchors. Decoding and non-maximum suppression (NMS) are defined here, so
that a quantized file only has to hold the network. A variant may also carry both in its
graph; its outputs are then ``boxes`` ``[1, K, 4]``, ``scores`` ``[1, K]`` (0: suppressed)
and ``classes`` ``[1, K]``, all float32, in the pixels of the model's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract import limits
from edge_runtime.contract.errors import TensorError
from edge_runtime.contract.geometry import Geometry

__all__ = [
    "MAX_LOG_SCALE",
    "AnchorsRecord",
    "Box",
    "Candidates",
    "DetectionTask",
    "box_iou",
    "candidates",
    "decode_boxes",
    "postprocess",
    "suppress",
]

Unit = Annotated[float, msgspec.Meta(ge=0, le=1)]
MAX_LOG_SCALE: Final = float(np.log(1000.0 / 16.0))
"""A box grows by at most this, in nats: torchvision's ``bbox_xform_clip``."""


class AnchorsRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Raw little-endian float32 ``[count, 4]`` at ``path``: x_min, y_min, x_max, y_max.

    In pixels of the model's input.
    """

    path: Annotated[str, msgspec.Meta(min_length=1, max_length=limits.MAX_PATH_CHARS)]
    count: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_ANCHORS)]


class DetectionTask(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="detection"
):
    """Boxes that score at least ``score_threshold`` after non-maximum suppression."""

    classes: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_LABELS)]
    """Without a background class."""
    activation: Literal["sigmoid", "softmax"]
    """Of the logits. ``softmax``: column 0 is the background, so C is ``classes + 1``."""
    anchors: AnchorsRecord
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    """Deltas are divided by these: x, y, width, height (Girshick et al., CVPR 2014)."""
    score_threshold: Unit = 0.25
    iou_threshold: Unit = 0.5
    candidates: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 200
    """How many of the best (anchor, class) pairs enter suppression."""
    max_boxes: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100

    @property
    def logit_columns(self) -> int:
        """C of the ``logits`` output."""
        return self.classes + 1 if self.activation == "softmax" else self.classes


class Box(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One object; corners in pixels of the upright original image."""

    index: int
    label: str
    score: float
    x_min: float
    y_min: float
    x_max: float
    y_max: float


class Candidates(msgspec.Struct, frozen=True, kw_only=True):
    """Boxes in input pixels, best first."""

    boxes: NDArray[np.float32]
    """``[K, 4]``."""
    scores: NDArray[np.float32]
    """``[K]``."""
    classes: NDArray[np.int64]
    """``[K]``, without background."""


def decode_boxes(
    task: DetectionTask, anchors: NDArray[np.float32], deltas: NDArray[np.floating]
) -> NDArray[np.float32]:
    """Corners ``[N, 4]`` from anchors ``[N, 4]`` and deltas ``[N, 4]``.

    R-CNN box regression (Girshick et al., CVPR 2014, appendix C): with anchor center (a_x,
    a_y), size (a_w, a_h) and weights w: x = d_x / w_x * a_w + a_x,
    width = a_w exp(min(d_w / w_w, MAX_LOG_SCALE)); likewise y and height.
    """
    exact = np.asarray(anchors, dtype=np.float32)
    scaled = np.asarray(deltas, dtype=np.float32) / np.array(task.box_weights, np.float32)
    size = exact[:, 2:] - exact[:, :2]
    center = exact[:, :2] + np.float32(0.5) * size
    middle = scaled[:, :2] * size + center
    half = np.float32(0.5) * size * np.exp(np.minimum(scaled[:, 2:], np.float32(MAX_LOG_SCALE)))
    return np.concatenate([middle - half, middle + half], axis=1)


def _probabilities(task: DetectionTask, logits: NDArray[np.floating]) -> NDArray[np.float32]:
    values = np.asarray(logits, dtype=np.float32)
    if task.activation == "sigmoid":
        return np.asarray(0.5 * (1.0 + np.tanh(0.5 * values)), dtype=np.float32)
    exponents = np.exp(values - values.max(axis=1, keepdims=True))
    return np.asarray((exponents / exponents.sum(axis=1, keepdims=True))[:, 1:], np.float32)


def candidates(
    task: DetectionTask, anchors: NDArray[np.float32], outputs: Sequence[NDArray[np.floating]]
) -> Candidates:
    """The best (anchor, class) pairs of one image, before suppression.

    ``outputs``: ``deltas`` and ``logits``, batch 1. Scores at or above the threshold, at
    most ``task.candidates``; equal scores in the order of anchor, then class. Raises
    ``TensorError`` on other shapes or NaN.
    """
    deltas, logits = (np.asarray(output) for output in outputs)
    count = task.anchors.count
    if (
        anchors.shape != (count, 4)
        or deltas.reshape(-1).shape[0] != count * 4
        or logits.reshape(-1).shape[0] != count * task.logit_columns
    ):
        raise TensorError(
            f"detection needs deltas [1, {count}, 4] and logits [1, {count}, "
            f"{task.logit_columns}], got {list(deltas.shape)} and {list(logits.shape)}"
        )
    deltas, logits = deltas.reshape(count, 4), logits.reshape(count, -1)
    if not (np.isfinite(deltas).all() and np.isfinite(logits).all()):
        raise TensorError("the model answered NaN or infinity: convert it again and verify it")
    scores = _probabilities(task, logits).reshape(-1)
    order = np.argsort(-scores, kind="stable")[: task.candidates]
    order = order[scores[order] >= task.score_threshold]
    rows = order // task.classes
    return Candidates(
        boxes=decode_boxes(task, anchors[rows], deltas[rows]),
        scores=scores[order],
        classes=np.asarray(order % task.classes, dtype=np.int64),
    )


def box_iou(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float32]:
    """Intersection over union of corner boxes ``[A, 4]`` and ``[B, 4]``: ``[A, B]``."""
    a, b = np.asarray(first, np.float32), np.asarray(second, np.float32)
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    size = np.maximum(high - low, 0.0)
    overlap = size[:, :, 0] * size[:, :, 1]
    area_a = np.prod(np.maximum(a[:, 2:] - a[:, :2], 0.0), axis=1)
    area_b = np.prod(np.maximum(b[:, 2:] - b[:, :2], 0.0), axis=1)
    union = area_a[:, None] + area_b[None, :] - overlap
    return np.asarray(overlap / np.maximum(union, 1e-9), dtype=np.float32)


def suppress(task: DetectionTask, found: Candidates) -> NDArray[np.int64]:
    """Greedy NMS inside each class: indices into ``found`` that stay, best first.

    A box is dropped when it overlaps a better one that stays by more than
    ``iou_threshold`` (as torchvision's ``batched_nms``).
    """
    overlaps = box_iou(found.boxes, found.boxes) > task.iou_threshold
    overlaps &= found.classes[:, None] == found.classes[None, :]
    kept: list[int] = []
    dropped = np.zeros(len(found.scores), dtype=bool)
    for index in range(len(found.scores)):
        if dropped[index]:
            continue
        kept.append(index)
        if len(kept) == task.max_boxes:
            break
        dropped |= overlaps[index]
    return np.array(kept, dtype=np.int64)


def postprocess(
    task: DetectionTask,
    outputs: Sequence[NDArray[np.floating]],
    anchors: NDArray[np.float32] | None,
    labels: tuple[str, ...],
    geometry: Geometry,
) -> tuple[Box, ...]:
    """The objects of one image, best first.

    ``outputs``: the two heads, or the three of a variant with NMS in its graph (then
    ``anchors`` may be None). Raises ``TensorError``.
    """
    if len(outputs) == 3:
        boxes, scores, classes = (np.asarray(output) for output in outputs)
        boxes, scores = boxes.reshape(-1, 4), scores.reshape(-1)
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise TensorError("the model answered NaN or infinity: convert it again")
        stay = np.flatnonzero((scores >= task.score_threshold) & (scores > 0))[: task.max_boxes]
        found = Candidates(
            boxes=boxes[stay].astype(np.float32),
            scores=scores[stay].astype(np.float32),
            classes=np.rint(classes.reshape(-1)[stay]).astype(np.int64),
        )
    elif len(outputs) == 2 and anchors is not None:
        every = candidates(task, anchors, outputs)
        stay = suppress(task, every)
        found = Candidates(
            boxes=every.boxes[stay], scores=every.scores[stay], classes=every.classes[stay]
        )
    else:
        raise TensorError(f"detection needs two heads and anchors, or NMS: {len(outputs)} outputs")
    if found.classes.size and not 0 <= found.classes.min() <= found.classes.max() < len(labels):
        raise TensorError("the model answered a class that has no label: convert it again")
    corners = geometry.boxes_to_original(found.boxes)
    return tuple(
        Box(
            index=int(index),
            label=labels[int(index)],
            score=float(score),
            x_min=float(x_min),
            y_min=float(y_min),
            x_max=float(x_max),
            y_max=float(y_max),
        )
        for (x_min, y_min, x_max, y_max), score, index in zip(
            corners, found.scores, found.classes, strict=True
        )
    )
