"""The pre-processing record: declared once, run by every implementation.

From decoded RGB on, each step is exact (integer, or one IEEE double operation rounded
once), so Python, Kotlin, Swift and TypeScript agree bit for bit. Order of the steps:

    resize -> center crop -> horizontal flip -> color order -> normalize

``docs/preprocessing.md`` writes the steps out.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract import limits
from edge_runtime.contract.errors import ImageTooLarge, ManifestError
from edge_runtime.contract.resample import (
    Algorithm,
    resize,
    round_half_even,
    shorter_side_size,
)

__all__ = [
    "NAMED",
    "CenterCrop",
    "Normalization",
    "Preprocess",
    "ResizeExact",
    "ResizeShorterSide",
    "apply",
    "apply_uint8",
    "decode_factor",
    "named",
    "normalization_table",
    "normalize",
]

Size = Annotated[int, msgspec.Meta(ge=1, le=8192)]


class ResizeShorterSide(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="shorter_side"
):
    """Scale so that the shorter side becomes ``size``; the aspect ratio stays."""

    size: Size
    algorithm: Algorithm = "resize_bilinear_aa@1"


class ResizeExact(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="exact"
):
    """Scale to ``height`` x ``width``; the aspect ratio may change."""

    height: Size
    width: Size
    algorithm: Algorithm = "resize_bilinear_aa@1"


class CenterCrop(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Cut the middle out; offsets are ``(rest / 2)`` rounded half to even."""

    height: Size
    width: Size


class Normalization(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``float32((value / scale - mean[c]) / std[c])``, in IEEE double, rounded once.

    ``value`` is the 8-bit channel value; ``mean`` and ``std`` are in the order of the
    record's ``color``.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Preprocess(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How 8-bit RGB becomes the model's input."""

    version: Literal[1] = 1
    resize: ResizeShorterSide | ResizeExact
    crop: CenterCrop | None = None
    flip_horizontal: bool = False
    color: Literal["RGB", "BGR", "GRAY"] = "RGB"
    normalization: Normalization
    decode: Literal["scaled"] | msgspec.UnsetType = msgspec.UNSET
    """``scaled``: whoever decodes a JPEG for this model alone may have the decoder scale it down
    by ``decode_factor``, which changes pixels within stated bounds. Unset: exact pixels only."""

    @property
    def channels(self) -> int:
        """Channels of the result."""
        return 1 if self.color == "GRAY" else 3

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result."""
        if self.crop is not None:
            return self.crop.height, self.crop.width
        if isinstance(self.resize, ResizeExact):
            return self.resize.height, self.resize.width
        return self.resize.size, self.resize.size

    def check(self) -> None:
        """Raise ``ManifestError`` when the record contradicts itself."""
        table = self.normalization
        if len(table.mean) != self.channels or len(table.std) != self.channels:
            raise ManifestError(
                f"normalization needs {self.channels} means and deviations for {self.color}"
            )
        numbers = (table.scale, *table.mean, *table.std)
        if not all(abs(number) <= 1e6 for number in numbers) or not all(
            abs(number) >= 1e-6 for number in (table.scale, *table.std)
        ):
            raise ManifestError("normalization must be finite, with scale and std not zero")
        if isinstance(self.resize, ResizeShorterSide):
            if self.crop is None:
                raise ManifestError("resize shorter_side needs a crop to reach a fixed size")
            if max(self.crop.height, self.crop.width) > self.resize.size:
                raise ManifestError("the crop is larger than the resized image")
        elif self.crop is not None and (
            self.crop.height > self.resize.height or self.crop.width > self.resize.width
        ):
            raise ManifestError("the crop is larger than the resized image")


def normalization_table(record: Normalization) -> NDArray[np.float32]:
    """float32 ``[channels, 256]``: the normalized value of every 8-bit value."""
    values = np.arange(256, dtype=np.float64)
    rows = [
        (values / record.scale - mean) / std
        for mean, std in zip(record.mean, record.std, strict=True)
    ]
    return np.stack(rows).astype(np.float32)


def decode_factor(record: Preprocess, height: int, width: int) -> int:
    """By how much a JPEG of an upright ``height`` x ``width`` may be scaled while it is decoded.

    The largest of 8, 4, 2 and 1 that leaves no side shorter than after the resize; 1 unless the
    record says ``decode = "scaled"``.
    """
    if record.decode is msgspec.UNSET:
        return 1
    wanted_height, wanted_width = _resized(record, height, width)
    for factor in (8, 4, 2):
        if -(-height // factor) >= wanted_height and -(-width // factor) >= wanted_width:
            return factor
    return 1


def _resized(record: Preprocess, height: int, width: int) -> tuple[int, int]:
    if isinstance(record.resize, ResizeExact):
        return record.resize.height, record.resize.width
    return shorter_side_size(height, width, record.resize.size)


def apply_uint8(
    record: Preprocess, rgb: NDArray[np.uint8], original: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """All steps but the last: uint8 RGB ``[H, W, 3]`` to uint8 ``[h, w, channels]``.

    ``original``: height and width of the upright image where ``rgb`` was scaled while it was
    decoded; the steps then follow the ratio of the original.
    Raises ``ImageTooLarge`` for a strip longer than ``limits.MAX_ASPECT_RATIO`` times its
    width, where the resize keeps the ratio.
    """
    height, width = original or rgb.shape[:2]
    if isinstance(record.resize, ResizeShorterSide) and max(
        height, width
    ) > limits.MAX_ASPECT_RATIO * min(height, width):
        raise ImageTooLarge(
            f"the image is more than {limits.MAX_ASPECT_RATIO} times as long as it is wide: "
            "crop it first"
        )
    height, width = _resized(record, height, width)
    image = resize(rgb, height, width, record.resize.algorithm)
    if record.crop is not None:
        top = round_half_even(height - record.crop.height)
        left = round_half_even(width - record.crop.width)
        image = image[top : top + record.crop.height, left : left + record.crop.width]
    if record.flip_horizontal:
        image = image[:, ::-1]
    if record.color == "BGR":
        image = image[:, :, ::-1]
    elif record.color == "GRAY":
        image = _luma(image)
    return np.ascontiguousarray(image)


def _luma(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """ITU-R BT.601 luma in 16-bit fixed point: (19595 R + 38470 G + 7471 B + 32768) >> 16."""
    wide = rgb.astype(np.uint32)
    luma = (19595 * wide[:, :, 0] + 38470 * wide[:, :, 1] + 7471 * wide[:, :, 2] + 32768) >> 16
    return luma.astype(np.uint8)[:, :, None]


def apply(record: Preprocess, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 RGB ``[H, W, 3]`` to float32 ``[h, w, channels]``, ready for ``pack_image``."""
    return normalize(record, apply_uint8(record, rgb))


def normalize(record: Preprocess, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The last step: uint8 ``[h, w, channels]`` to float32 of the same shape."""
    table = normalization_table(record.normalization)
    return np.stack(
        [table[channel][image[:, :, channel]] for channel in range(image.shape[2])], axis=2
    )


# The names are Keras's (keras.applications.imagenet_utils.preprocess_input modes), with
# "torchvision" for what Keras calls "torch", "unit" for x / 255 and "raw" for 0..255.
NAMED: dict[str, tuple[Literal["RGB", "BGR"], Normalization]] = {
    "torchvision": (
        "RGB",
        Normalization(scale=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    ),
    "tf": ("RGB", Normalization(scale=127.5, mean=(1.0, 1.0, 1.0), std=(1.0, 1.0, 1.0))),
    "caffe": (
        "BGR",
        Normalization(scale=1.0, mean=(103.939, 116.779, 123.68), std=(1.0, 1.0, 1.0)),
    ),
    "unit": ("RGB", Normalization(scale=255.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))),
    "raw": ("RGB", Normalization(scale=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))),
}


def named(
    name: str,
    height: int,
    width: int,
    *,
    resize_shorter: int | None = None,
    algorithm: Algorithm = "resize_bilinear_aa@1",
) -> Preprocess:
    """The record for one of the ``NAMED`` normalizations at an input size.

    The shorter side becomes ``resize_shorter`` (default: the larger input side), then the
    center is cropped. Raises ``ManifestError`` when the crop would not fit.
    """
    color, normalization = NAMED[name]
    record = Preprocess(
        resize=ResizeShorterSide(size=resize_shorter or max(height, width), algorithm=algorithm),
        crop=CenterCrop(height=height, width=width),
        color=color,
        normalization=normalization,
    )
    record.check()
    return record
