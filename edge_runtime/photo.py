"""One image as the caller gave it: encoded bytes, a path, or an array of pixels."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    ImageTooLarge,
    ImageUnreadable,
    LimitExceeded,
    MissingFile,
    TensorError,
)
from edge_runtime.contract.files import read_bounded
from edge_runtime.contract.imaging import decode_image, sniff_media_type
from edge_runtime.offload.metadata import strip_metadata

__all__ = ["ImageInput", "Photo"]

ImageInput: TypeAlias = bytes | bytearray | memoryview | str | os.PathLike[str] | NDArray[np.uint8]
"""Encoded JPEG, PNG or WebP; a path to one; or uint8 RGB ``[height, width, 3]``."""

_JPEG_QUALITY = 90
_ENCODED_BYTES_PER_PIXEL = 0.25
"""A photo as JPEG of quality 90: what an array is taken to weigh until it is encoded."""


class Photo:
    """An image that is decoded, and made ready for upload, at most once and when needed."""

    def __init__(self, encoded: bytes | None, rgb: NDArray[np.uint8] | None) -> None:
        self._encoded = encoded
        self._rgb = rgb
        self._upload: tuple[bytes, str] | None = None

    @classmethod
    def read(cls, image: ImageInput) -> Photo:
        """Take any accepted input; a path is read here, nothing is decoded yet.

        Raises:
            ImageTooLarge: more bytes, pixels or a longer side than ``limits`` allow.
            ImageUnreadable: the first bytes are no JPEG, PNG or WebP; no such file.
            TensorError: an array that is not uint8 ``[height, width, 3]``.
        """
        if isinstance(image, np.ndarray):
            return cls(None, _check_pixels(image))
        if isinstance(image, bytes | bytearray | memoryview):
            return cls(_check_encoded(bytes(image)), None)
        if isinstance(image, str | os.PathLike):
            return cls(_check_encoded(_read_file(Path(image))), None)
        raise TensorError(
            f"an image is encoded bytes, a path or a uint8 RGB array, not {type(image).__name__}"
        )

    def pixels(self) -> NDArray[np.uint8]:
        """uint8 RGB ``[height, width, 3]``, upright. Raises ``ImageError``."""
        if self._rgb is None:
            assert self._encoded is not None  # noqa: S101  # one of both is always there
            self._rgb = decode_image(self._encoded)
        return self._rgb

    @property
    def upload_bytes(self) -> int:
        """Size of the body to upload; estimated while it has not been made."""
        if self._upload is not None:
            return len(self._upload[0])
        if self._encoded is not None:
            return len(self._encoded)
        assert self._rgb is not None  # noqa: S101  # one of both is always there
        return int(self._rgb.shape[0] * self._rgb.shape[1] * _ENCODED_BYTES_PER_PIXEL)

    def upload(self) -> tuple[bytes, str]:
        """The body to upload and its media type: no metadata but an orientation.

        An array becomes a JPEG of quality 90. Raises ``ImageUnreadable`` when the file's
        structure is broken, ``ImageTooLarge``.
        """
        if self._upload is None:
            if self._encoded is not None:
                media_type = sniff_media_type(self._encoded)
                assert media_type is not None  # noqa: S101  # checked by read()
                self._upload = (strip_metadata(self._encoded), media_type)
            else:
                buffer = io.BytesIO()
                Image.fromarray(self.pixels()).save(buffer, "JPEG", quality=_JPEG_QUALITY)
                self._upload = (_check_encoded(buffer.getvalue()), "image/jpeg")
        return self._upload


def _read_file(path: Path) -> bytes:
    try:
        return read_bounded(path, limits.MAX_IMAGE_BYTES)
    except LimitExceeded:
        raise ImageTooLarge(
            f"{path} has more than {limits.MAX_IMAGE_BYTES} bytes: "
            "use a smaller or more strongly compressed image"
        ) from None
    except MissingFile as error:
        raise ImageUnreadable(error.detail) from None


def _check_encoded(data: bytes) -> bytes:
    if len(data) > limits.MAX_IMAGE_BYTES:
        raise ImageTooLarge(
            f"the image has {len(data)} bytes, more than {limits.MAX_IMAGE_BYTES}: "
            "use a smaller or more strongly compressed one"
        )
    if sniff_media_type(data) is None:
        raise ImageUnreadable("these bytes are no JPEG, PNG or WebP image: use one of those")
    return data


def _check_pixels(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise TensorError(
            f"an image array must be uint8 RGB [height, width, 3], "
            f"got {array.dtype}{list(array.shape)}"
        )
    height, width = array.shape[:2]
    if min(height, width) < 1:
        raise TensorError("the image array has no pixels")
    if height * width > limits.MAX_IMAGE_PIXELS or max(height, width) > limits.MAX_IMAGE_SIDE:
        raise ImageTooLarge(
            f"the image array has {height} x {width} pixels, more than "
            f"{limits.MAX_IMAGE_PIXELS} in all or {limits.MAX_IMAGE_SIDE} a side: scale it down"
        )
    return np.ascontiguousarray(array)
