"""One image's answer, whatever the task: what the device and the broker both give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import ConfigError, TensorError
from edge_runtime.contract.geometry import Geometry
from edge_runtime.contract.tasks import classification, detection, segmentation
from edge_runtime.contract.tasks.classification import ClassificationTask, Prediction
from edge_runtime.contract.tasks.detection import Box, DetectionTask
from edge_runtime.contract.tasks.pixels import to_pixels
from edge_runtime.contract.tasks.segmentation import SegmentationTask

if TYPE_CHECKING:
    from edge_runtime.contract.tasks import Task

__all__ = ["Answer", "answer"]


class Answer(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Exactly one of the first four is set."""

    predictions: tuple[Prediction, ...] | None = None
    """Classification, best first."""
    boxes: tuple[Box, ...] | None = None
    """Detection, best first; in pixels of the upright original image."""
    class_map: NDArray[np.uint8] | None = None
    """Segmentation: ``[H, W]`` at the model's output size."""
    image: NDArray[np.uint8] | None = None
    """Image to image, generation, reconstruction: RGB ``[H, W, 3]``."""
    region: tuple[float, float, float, float] | None = None
    """What the pixels of ``class_map`` or ``image`` show: x_min, y_min, x_max, y_max in
    pixels of the upright original image, for the crop leaves its edges out."""


def answer(
    task: Task,
    outputs: Sequence[NDArray[np.generic]],
    *,
    labels: tuple[str, ...] = (),
    anchors: NDArray[np.float32] | None = None,
    geometry: Geometry | None = None,
    top_k: int | None = None,
) -> Answer:
    """Post-process one image's outputs (batch 1, images as NCHW; see ``tensors.canonical``).

    ``labels``: of a task with classes. ``anchors`` and ``geometry``: detection only. Raises
    ``TensorError`` when the outputs do not fit the task or are not finite.
    """
    if not outputs:
        raise TensorError("the model answered nothing")
    first = np.asarray(outputs[0])
    if isinstance(task, ClassificationTask):
        return Answer(
            predictions=classification.postprocess(task, first.astype(np.float32), labels, top_k)
        )
    if isinstance(task, DetectionTask):
        if geometry is None:
            raise ConfigError("detection needs the geometry of the image")
        floats = [np.asarray(output, dtype=np.float32) for output in outputs]
        boxes = detection.postprocess(task, floats, anchors, labels, geometry)
        return Answer(boxes=boxes[:top_k])
    if isinstance(task, SegmentationTask):
        return Answer(class_map=segmentation.class_map(task, first))
    return Answer(image=to_pixels(first.astype(np.float32), task.output_scale, task.output_offset))
