"""From encoded bytes to 8-bit RGB, within bounds.

Input is a JPEG, PNG or WebP. What has no single right way to 8-bit RGB (CMYK, 16 bits a
channel, translucent pixels, animations) is refused with a typed error, never converted
by guess. EXIF orientation is applied; gray and palette images become RGB exactly.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    ImageAnimated,
    ImageModeUnsupported,
    ImageTooLarge,
    ImageUnreadable,
)

__all__ = [
    "ACCEPTED_MEDIA_TYPES",
    "JPEG_TOLERANCE",
    "Decoded",
    "JpegDecoder",
    "decode_image",
    "decode_scaled",
    "sniff_media_type",
]

ACCEPTED_MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp")

JPEG_TOLERANCE = 4
"""Largest difference of one channel that two sound baseline JPEG decoders may show.

PNG and lossless WebP decode alike everywhere. Decoders differ in the inverse DCT (ISO/IEC
10918-1 leaves its rounding free) and in chroma upsampling; the reference is libjpeg-turbo
with the accurate integer DCT and fancy upsampling, which is Pillow's and Chromium's.
"""

JpegDecoder = Callable[[bytes, int], NDArray[np.uint8] | None]
"""Decodes a JPEG scaled down by 1, 2, 4 or 8 to RGB ``[ceil(H/f), ceil(W/f), 3]``, as it is
stored; None where it cannot. Its pixels must be those of Pillow's decoder."""


class Decoded(NamedTuple):
    """An image that may have been scaled down while it was decoded."""

    pixels: NDArray[np.uint8]
    """RGB, upright."""
    height: int
    """Of the upright original image."""
    width: int


_FORMATS = ("JPEG", "PNG", "WEBP")
_MAGIC = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
)


def sniff_media_type(data: bytes) -> str | None:
    """The media type that the first bytes claim, or None when it is none we take."""
    for magic, media_type in _MAGIC:
        if data.startswith(magic):
            return media_type
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return None


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Decode one encoded image to uint8 RGB ``[H, W, 3]``, upright.

    Size limits are checked on the header, before any pixel is decoded.

    Raises:
        ImageTooLarge: more bytes, pixels or a longer side than ``limits`` allow.
        ImageUnreadable: no JPEG, PNG or WebP, or truncated, or corrupt.
        ImageAnimated: more than one frame.
        ImageModeUnsupported: CMYK, 16 bits a channel, or translucent pixels.
    """
    return decode_scaled(data, _unscaled).pixels


def decode_scaled(
    data: bytes, factor_of: Callable[[int, int], int], jpeg: JpegDecoder | None = None
) -> Decoded:
    """``decode_image``, where a JPEG is scaled down by its decoder, in the frequency domain.

    ``factor_of`` gives the factor (1, 2, 4 or 8) for height and width of the upright image;
    other formats are not scaled. ``jpeg``: decodes in Pillow's stead. Raises the same errors.
    """
    if len(data) > limits.MAX_IMAGE_BYTES:
        raise ImageTooLarge(
            f"the image has {len(data)} bytes, more than {limits.MAX_IMAGE_BYTES}: "
            "send a smaller or more strongly compressed one"
        )
    if sniff_media_type(data) is None:
        raise ImageUnreadable("these bytes are no JPEG, PNG or WebP image: send one of those")
    try:
        with warnings.catch_warnings():
            # Our own, lower bounds are checked below; Pillow's warning would be noise.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise _too_many_pixels() from None
    except Exception as error:  # Pillow raises many types on corrupt headers
        raise ImageUnreadable(
            f"the image header is corrupt ({type(error).__name__}): encode the image anew"
        ) from None
    with picture:
        _check_header(picture)
        width, height = picture.size
        if picture.format not in ("JPEG", "MPO"):
            return Decoded(_to_rgb(picture), *_upright_size(picture, height, width))
        height, width = _upright_size(picture, height, width)
        factor = factor_of(height, width)
        pixels = None if jpeg is None else jpeg(data, factor)
        if pixels is not None and pixels.shape == _scaled_shape(picture, factor):
            return Decoded(_turned(pixels, _orientation(picture)), height, width)
        if factor > 1:
            picture.draft(None, (picture.width // factor, picture.height // factor))
        return Decoded(_to_rgb(picture), height, width)


def _unscaled(_height: int, _width: int) -> int:
    return 1


def _scaled_shape(picture: Image.Image, factor: int) -> tuple[int, int, int]:
    return -(-picture.height // factor), -(-picture.width // factor), 3


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation (tag 0x0112), 1 to 8; a broken EXIF block counts as upright."""
    try:
        value = picture.getexif().get(0x0112, 1)
    except Exception:  # as in _upright
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright_size(picture: Image.Image, height: int, width: int) -> tuple[int, int]:
    return (width, height) if _orientation(picture) >= 5 else (height, width)


def _turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """What ``ImageOps.exif_transpose`` does, on an array ``[H, W, 3]``."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _too_many_pixels() -> ImageTooLarge:
    return ImageTooLarge(
        f"the image has more than {limits.MAX_IMAGE_PIXELS} pixels or a side over "
        f"{limits.MAX_IMAGE_SIDE}: scale it down before you send it"
    )


def _check_header(picture: Image.Image) -> None:
    """Everything that is refused before a pixel is decoded."""
    width, height = picture.size
    if (
        width * height > limits.MAX_IMAGE_PIXELS
        or max(width, height) > limits.MAX_IMAGE_SIDE
        or min(width, height) < 1
    ):
        raise _too_many_pixels()
    if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
        # An MPO is a camera's JPEG with a preview behind it: its first picture is the photo.
        raise ImageAnimated("the image is animated: send one frame as a still image")
    if picture.mode not in ("RGB", "L", "P", "1", "RGBA", "LA", "PA"):
        raise ImageModeUnsupported(
            f"the image has pixel mode {picture.mode}: convert it to 8-bit sRGB first"
        )
    if picture.format == "PNG" and _png_bit_depth(picture) > 8:
        raise ImageModeUnsupported(
            "the image has 16 bits a channel: convert it to 8-bit sRGB first"
        )


def _to_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    try:
        picture.load()
    except Exception as error:  # OSError, SyntaxError, struct.error, zlib.error ...
        raise ImageUnreadable(
            f"the image data are truncated or corrupt ({type(error).__name__}): encode it anew"
        ) from None
    upright = _upright(picture)
    if upright.has_transparency_data:
        rgba = np.asarray(upright.convert("RGBA"))
        if rgba[:, :, 3].min() < 255:
            raise ImageModeUnsupported(
                "the image has transparent pixels: flatten it onto a background first"
            )
        return np.ascontiguousarray(rgba[:, :, :3])
    return np.ascontiguousarray(np.asarray(upright.convert("RGB")))


def _png_bit_depth(picture: Image.Image) -> int:
    """Bits a channel of a PNG; Pillow 8-bit modes hide that RGB was stored with 16."""
    tiles = getattr(picture, "tile", ())
    raw_modes = [str(tile[3][0] if isinstance(tile[3], tuple) else tile[3]) for tile in tiles]
    return 16 if any("16" in mode for mode in raw_modes) else 8


def _upright(picture: Image.Image) -> Image.Image:
    """Apply EXIF orientation (tag 0x0112); a broken EXIF block counts as none."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # corrupt EXIF must not cost the user the picture
        return picture
