"""Where a point of the model's input lies in the upright original image, and back.

The inverse of the geometric steps of ``preprocess.py``: resize, crop, flip. Coordinates are
continuous: pixel ``i`` covers ``[i, i + 1)``, so edges map onto edges.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.preprocess import Preprocess, ResizeExact
from edge_runtime.contract.resample import round_half_even, shorter_side_size

__all__ = ["Geometry", "geometry_of"]


class Geometry(msgspec.Struct, frozen=True, kw_only=True):
    """``original = (input + offset) / scale``, x mirrored first when ``flipped``."""

    scale_x: float
    scale_y: float
    offset_x: float
    """Columns that the crop cut off on the left, in resized pixels."""
    offset_y: float
    input_width: int
    flipped: bool
    width: int
    """Of the upright original image."""
    height: int

    def boxes_to_original(self, boxes: NDArray[np.floating]) -> NDArray[np.float64]:
        """``[N, 4]`` (x_min, y_min, x_max, y_max) in input pixels to original pixels.

        Clipped to the original image.
        """
        values = np.asarray(boxes, dtype=np.float64)
        x = values[:, [0, 2]]
        if self.flipped:
            x = self.input_width - x[:, ::-1]
        x = np.clip((x + self.offset_x) / self.scale_x, 0.0, self.width)
        y = np.clip((values[:, [1, 3]] + self.offset_y) / self.scale_y, 0.0, self.height)
        return np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)


def geometry_of(record: Preprocess, height: int, width: int) -> Geometry:
    """How ``record`` maps an upright image of ``height`` x ``width`` pixels."""
    if isinstance(record.resize, ResizeExact):
        resized = record.resize.height, record.resize.width
    else:
        resized = shorter_side_size(height, width, record.resize.size)
    top = left = 0
    if record.crop is not None:
        top = round_half_even(resized[0] - record.crop.height)
        left = round_half_even(resized[1] - record.crop.width)
    return Geometry(
        scale_x=resized[1] / width,
        scale_y=resized[0] / height,
        offset_x=float(left),
        offset_y=float(top),
        input_width=record.size[1],
        flipped=record.flip_horizontal,
        width=width,
        height=height,
    )
