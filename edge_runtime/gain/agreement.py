"""How much of the cloud's answer a local one shares, 0 to 1, by task.

Classification: whether the first classes are the same. Detection: F1 of the local boxes
against the cloud's, matched one to one in the order of their scores at an IoU of at least
0.5 and the same class; two empty answers agree. Segmentation: the share of the photo that
both show where both name one class.

Answers that are images are not right or wrong: no agreement is defined for them.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import ConfigError, TensorError
from edge_runtime.contract.tasks import Box, Task, has_labels, task_name
from edge_runtime.contract.tasks.answer import Answer
from edge_runtime.contract.tasks.detection import box_iou

__all__ = ["METRICS", "agreement", "require_agreement"]

METRICS: Final = {
    "classification": "share of images with the same first class",
    "detection": "mean F1 of boxes, IoU at least 0.5 and the same class",
    "segmentation": "mean share of pixels with the same class",
}
_MATCH_IOU: Final = 0.5
_GRID: Final = 128


def require_agreement(task: Task) -> str:
    """What agreement means for ``task``. ``ConfigError``: nothing."""
    if not has_labels(task):
        raise ConfigError(
            f"answers of {task_name(task)} are images, which are not right or wrong: there is no "
            "gain to measure, and a policy goes by its prior (GainPrior.local_right)"
        )
    return METRICS[task_name(task)]


def agreement(local: Answer, cloud: Answer) -> float:
    """0 to 1. Raises ``TensorError`` when both are not answers of one such task."""
    if local.predictions is not None and cloud.predictions is not None:
        return float(local.predictions[0].index == cloud.predictions[0].index)
    if local.boxes is not None and cloud.boxes is not None:
        return _f1(local.boxes, cloud.boxes)
    if local.class_map is not None and cloud.class_map is not None:
        return _same_pixels(local, cloud)
    raise TensorError("both answers must be of one task with classes")


def _f1(local: tuple[Box, ...], cloud: tuple[Box, ...]) -> float:
    if not local and not cloud:
        return 1.0
    if not local or not cloud:
        return 0.0
    overlap = box_iou(_corners(local), _corners(cloud))
    same = np.array([[a.index == b.index for b in cloud] for a in local])
    overlap = np.where(same, overlap, 0.0)
    matched = 0
    for row in overlap:  # best score first
        best = int(row.argmax())
        if row[best] >= _MATCH_IOU:
            matched += 1
            overlap[:, best] = 0.0
    return 2.0 * matched / (len(local) + len(cloud))


def _corners(boxes: tuple[Box, ...]) -> NDArray[np.float64]:
    return np.array([(b.x_min, b.y_min, b.x_max, b.y_max) for b in boxes])


def _same_pixels(local: Answer, cloud: Answer) -> float:
    """On a grid over what both show; pre-processing may have cropped each differently."""
    regions = [a.region for a in (local, cloud) if a.region is not None]
    if len(regions) < 2:
        raise TensorError("a class map without its region cannot be compared")
    (x0, y0, x1, y1), (u0, v0, u1, v1) = regions
    x = _centers(max(x0, u0), min(x1, u1))
    y = _centers(max(y0, v0), min(y1, v1))
    first, second = _sampled(local, x, y), _sampled(cloud, x, y)
    return float((first == second).mean())


def _centers(low: float, high: float) -> NDArray[np.float64]:
    if high <= low:
        raise TensorError("the two class maps show no common part of the photo")
    return low + (np.arange(_GRID) + 0.5) * (high - low) / _GRID


def _sampled(answer: Answer, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The nearest class at each grid point, uint8 ``[grid, grid]``."""
    assert answer.class_map is not None  # noqa: S101  # the caller looked
    assert answer.region is not None  # noqa: S101
    x_min, y_min, x_max, y_max = answer.region
    height, width = answer.class_map.shape
    rows = np.floor((y - y_min) / (y_max - y_min) * height).astype(np.int64)
    columns = np.floor((x - x_min) / (x_max - x_min) * width).astype(np.int64)
    cells = np.ix_(np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1))
    return np.asarray(answer.class_map[cells], dtype=np.uint8)
