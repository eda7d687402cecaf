"""Semantic segmentation: one image in, one class per pixel out."""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract import limits
from edge_runtime.contract.errors import TensorError

__all__ = ["SegmentationTask", "class_map"]


class SegmentationTask(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="segmentation"
):
    """The reference gives ``scores``, float32 ``[1, classes, H, W]``, one plane a class.

    A variant may carry the argmax in its graph: its output is then ``classes``, int32
    ``[1, H, W]``.
    """

    classes: Annotated[int, msgspec.Meta(ge=2, le=limits.MAX_MASK_CLASSES)]


def class_map(task: SegmentationTask, output: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Class of every pixel of the model's output, uint8 ``[H, W]``.

    ``output``: scores ``[1, classes, H, W]`` (the first of equal scores wins), or classes
    ``[1, H, W]``. Raises ``TensorError`` on another shape, NaN or an unknown class.
    """
    if output.ndim == 4 and output.shape[:2] == (1, task.classes):
        if not np.isfinite(output).all():
            raise TensorError("the model answered NaN or infinity: convert it again")
        return np.asarray(output[0].argmax(axis=0), dtype=np.uint8)
    if output.ndim == 3 and output.shape[0] == 1 and np.issubdtype(output.dtype, np.integer):
        plane = output[0]
        if int(plane.min()) < 0 or int(plane.max()) >= task.classes:
            raise TensorError(f"the model answered a class outside 0 to {task.classes - 1}")
        return np.asarray(plane, dtype=np.uint8)
    raise TensorError(
        f"segmentation needs [1, {task.classes}, H, W] scores or integer [1, H, W] classes, "
        f"got {output.dtype}{list(output.shape)}"
    )
