"""Images to a model's pixels; JPEG by libjpeg-turbo directly: Pillow's pixels in half its time.

Pillow decodes piece by piece into four bytes a pixel and packs them afterwards. simplejpeg
calls the same library on the whole file, outside the interpreter's lock.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import InferenceError, TensorError
from edge_runtime.contract.imaging import decode_scaled
from edge_runtime.contract.pipeline import Prepared, prepare_image
from edge_runtime.contract.preprocess import Preprocess, decode_factor
from edge_runtime.contract.tensors import TensorSpec

__all__ = ["decode_jpeg", "prepare_pixels"]


def prepare_pixels(record: Preprocess, spec: TensorSpec, body: bytes) -> Prepared:
    """An encoded image to 8-bit pixels of ``spec`` with batch 1, not yet normalized.

    Raises what ``decode_scaled`` raises, and ``InferenceError`` where record and ``spec``
    contradict each other.
    """
    decoded = decode_scaled(body, partial(decode_factor, record), decode_jpeg)
    try:
        return prepare_image(record, spec, decoded.pixels, (decoded.height, decoded.width))
    except TensorError as error:  # the servable contradicts itself: not the image's fault
        raise InferenceError(error.detail) from None


def decode_jpeg(data: bytes, factor: int) -> NDArray[np.uint8] | None:
    """A ``JpegDecoder``: RGB, not turned.

    None without simplejpeg, and for a file that it warns about: what is damaged is Pillow's
    to judge, so that there is one rule.
    """
    simplejpeg = _simplejpeg()
    if simplejpeg is None:
        return None
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data,
            "RGB",
            fastdct=False,
            fastupsample=False,
            min_height=-(-height // factor),
            min_width=-(-width // factor),
        )
    except ValueError:
        return None
    return pixels


def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg
