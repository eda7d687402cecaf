"""From a model's image output to 8-bit pixels, for every task that answers an image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import TensorError

__all__ = ["to_pixels"]


def to_pixels(output: NDArray[np.floating], scale: float, offset: float) -> NDArray[np.uint8]:
    """``clip(rint(value * scale + offset), 0, 255)`` in IEEE double, ties to even.

    ``output``: ``[1, 1 or 3, H, W]``; gives uint8 RGB ``[H, W, 3]``. Raises
    ``TensorError`` on another shape or NaN.
    """
    if output.ndim != 4 or output.shape[0] != 1 or output.shape[1] not in (1, 3):
        raise TensorError(f"an image output is [1, 1 or 3, H, W], got {list(output.shape)}")
    if not np.isfinite(output).all():
        raise TensorError("the model answered NaN or infinity: convert it again and verify it")
    values = np.rint(np.asarray(output[0], dtype=np.float64) * scale + offset)
    pixels = np.clip(values, 0.0, 255.0).astype(np.uint8).transpose(1, 2, 0)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
