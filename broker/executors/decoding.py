"""JPEG by libjpeg-turbo directly: Pillow's pixels in half of its time.

Pillow decodes piece by piece into four bytes a pixel and packs them afterwards. simplejpeg
calls the same library on the whole file, outside the interpreter's lock.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["decode_jpeg"]


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
