"""Tensors by name: what a model takes and gives."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract import limits
from edge_runtime.contract.errors import TensorError

__all__ = [
    "DType",
    "Layout",
    "TensorSpec",
    "canonical",
    "canonical_shape",
    "from_little_endian",
    "pack_image",
    "to_little_endian",
    "unpack_image",
]

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


def canonical_shape(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of ``canonical(array, spec)``."""
    if spec.layout == "NHWC":
        batch, height, width, channels = spec.shape
        return (batch, channels, height, width)
    return spec.shape


def canonical(array: NDArray[np.generic], spec: TensorSpec) -> NDArray[np.generic]:
    """An output in the reference's axis order: NHWC becomes NCHW, others stay.

    Raises ``TensorError`` when ``array`` is not what ``spec`` says.
    """
    spec.check(array)
    if spec.layout == "NHWC":
        return np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    return array


def pack_image(image: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
    """Lay one pre-processed image ``[H, W, C]`` out as ``spec`` wants it.

    Returns an array of ``spec.shape`` with batch 1 and the image's dtype: float32, or uint8
    pixels for a model with the normalization inside. Raises ``TensorError`` when the model
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


def from_little_endian(data: bytes, spec: TensorSpec) -> NDArray[np.generic]:
    """The tensor of ``spec`` whose numbers ``data`` holds in row-major order; read-only.

    Raises ``TensorError`` when there are more or fewer bytes.
    """
    if len(data) != spec.size_bytes:
        raise TensorError(
            f"tensor {spec.name!r} has {spec.size_bytes} bytes, got {len(data)}: "
            f"send {spec.dtype}{list(spec.shape)}"
        )
    stored = np.frombuffer(data, dtype=np.dtype(spec.dtype).newbyteorder("<"))
    return stored.astype(spec.dtype, copy=False).reshape(spec.shape)


def to_little_endian(array: NDArray[np.generic]) -> bytes:
    """The inverse: the numbers alone, row-major, without padding."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
