"""Tensors by name: what a model takes and gives."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract import limits
from edge_runtime.contract.errors import TensorError

__all__ = ["DType", "Layout", "TensorSpec", "pack_image", "unpack_image"]

DType = Literal["float32", "float16", "int8", "uint8", "int16", "int32", "int64", "bool"]
Layout = Literal["NCHW", "NHWC", "NC", "OTHER"]
"""Axis order: N batch, C channel, H height, W width. ``NC``: one vector an image."""

Dim = Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_TENSOR_DIM)]


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One input or output of a model. ``shape`` is static and includes the batch axis."""

    name: Annotated[str, msgspec.Meta(max_length=limits.MAX_NAME_CHARS)]
    dtype: DType
    shape: Annotated[tuple[Dim, ...], msgspec.Meta(max_length=limits.MAX_TENSOR_RANK)]
    layout: Layout

    def check(self, array: NDArray[np.generic]) -> None:
        """Raise ``TensorError`` unless ``array`` has this spec's dtype and shape."""
        if array.dtype != np.dtype(self.dtype) or array.shape != self.shape:
            raise TensorError(
                f"tensor {self.name!r} must be {self.dtype}{list(self.shape)}, "
                f"got {array.dtype}{list(array.shape)}"
            )

    @property
    def size_bytes(self) -> int:
        """Bytes of one dense tensor of this spec."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def pack_image(image: NDArray[np.float32], spec: TensorSpec) -> NDArray[np.float32]:
    """Lay one pre-processed image, float32 ``[H, W, C]``, out as ``spec`` wants it.

    Returns float32 of ``spec.shape`` with batch 1. Raises ``TensorError`` when the model
    wants another size, channel count or layout: nothing is resized here.
    """
    if spec.layout == "NCHW":
        batch = np.ascontiguousarray(image.transpose(2, 0, 1))[None]
    elif spec.layout == "NHWC":
        batch = np.ascontiguousarray(image)[None]
    else:
        raise TensorError(f"tensor {spec.name!r} has layout {spec.layout}: not an image")
    spec.check(batch)
    return batch


def unpack_image(array: NDArray[np.float32], spec: TensorSpec) -> NDArray[np.float32]:
    """The inverse of ``pack_image``: the first image of a batch as ``[H, W, C]``."""
    spec.check(array)
    if spec.layout == "NCHW":
        return np.ascontiguousarray(array[0].transpose(1, 2, 0))
    if spec.layout == "NHWC":
        return np.ascontiguousarray(array[0])
    raise TensorError(f"tensor {spec.name!r} has layout {spec.layout}: not an image")
