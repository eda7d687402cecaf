"""From encoded bytes to 8-bit RGB, within bounds.

Input is a JPEG, PNG or WebP. What has no single right way to 8-bit RGB (CMYK, 16 bits a
channel, translucent pixels, animations) is refused with a typed error, never converted
by guess. EXIF orientation is applied; gray and palette images become RGB exactly.
"""

from __future__ import annotations

import io
import warnings

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

__all__ = ["ACCEPTED_MEDIA_TYPES", "JPEG_TOLERANCE", "decode_image", "sniff_media_type"]

ACCEPTED_MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp")

JPEG_TOLERANCE = 4
"""Largest difference of one channel that two sound baseline JPEG decoders may show.

PNG and lossless WebP decode alike everywhere. Decoders differ in the inverse DCT (ISO/IEC
10918-1 leaves its rounding free) and in chroma upsampling; the reference is libjpeg-turbo
with the accurate integer DCT and fancy upsampling, which is Pillow's and Chromium's.
"""

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
        return _to_rgb(picture)


def _too_many_pixels() -> ImageTooLarge:
    return ImageTooLarge(
        f"the image has more than {limits.MAX_IMAGE_PIXELS} pixels or a side over "
        f"{limits.MAX_IMAGE_SIDE}: scale it down before you send it"
    )


def _to_rgb(picture: Image.Image) -> NDArray[np.uint8]:
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
