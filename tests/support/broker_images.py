"""What devices send to a broker: good images, and the ones it must refuse."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.support.images import animated, bomb, encode, photo, rgb16

__all__ = [
    "animated_png",
    "animated_webp",
    "bomb_png",
    "cmyk_jpeg",
    "exif_rotated_png",
    "gif",
    "jpeg",
    "lossless_webp",
    "opaque_alpha_png",
    "png",
    "sixteen_bit_png",
    "sixteen_bit_rgb_png",
    "strip_png",
    "translucent_png",
]


def jpeg(seed: int = 0, width: int = 64, height: int = 48) -> bytes:
    return encode(photo(width, height, seed), "JPEG", quality=90)


def png(seed: int = 0, width: int = 64, height: int = 48) -> bytes:
    return encode(photo(width, height, seed))


def lossless_webp() -> bytes:
    return encode(photo(), "WEBP", lossless=True)


def bomb_png() -> bytes:
    """900 million pixels, announced in a few dozen bytes."""
    return bomb(30_000)


def strip_png() -> bytes:
    """32768 x 1 pixels in under 300 bytes: scaled up, the shorter side makes gigabytes."""
    return encode(Image.new("RGB", (32_768, 1)))


def sixteen_bit_png() -> bytes:
    return encode(Image.fromarray(np.full((20, 20), 40_000, dtype=np.uint16)))


def sixteen_bit_rgb_png() -> bytes:
    return rgb16()


def animated_png() -> bytes:
    return animated("PNG")


def animated_webp() -> bytes:
    return animated("WEBP")


def gif() -> bytes:
    return animated("GIF")


def cmyk_jpeg() -> bytes:
    return encode(photo().convert("CMYK"), "JPEG")


def translucent_png() -> bytes:
    picture = photo().convert("RGBA")
    picture.putalpha(128)
    return encode(picture)


def opaque_alpha_png(seed: int = 0) -> bytes:
    return encode(photo(seed=seed).convert("RGBA"))


def exif_rotated_png(seed: int = 0) -> bytes:
    """The same picture as ``png(seed)``, stored turned, with the tag that turns it back."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(photo(seed=seed).transpose(Image.Transpose.ROTATE_90), exif=exif)
