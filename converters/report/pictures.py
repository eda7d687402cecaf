"""Small pictures for the HTML page: encoded photos, boxes, class colors, differences."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from converters.report.records import Picture

__all__ = [
    "MAX_SIDE",
    "class_color",
    "draw_boxes",
    "encode_difference",
    "encode_picture",
    "overlay_classes",
    "tell_apart",
]

Pixels = NDArray[np.uint8]
Corners = tuple[float, float, float, float]

MAX_SIDE = 256
"""Longer side of an embedded picture."""

_LOSSLESS_PIXELS = 64 * 64
_FEW = 0.01
_MISSING = (230, 30, 50)
# Okabe and Ito (2008): told apart by color-blind readers too. Red is for what differs.
_COLORS = (
    (0, 158, 115), (0, 114, 178), (230, 159, 0), (204, 121, 167), (86, 180, 233), (240, 228, 66),
)  # fmt: skip


def class_color(index: int) -> tuple[int, int, int]:
    """Red, green and blue of a class; after six they come again, darker."""
    base = _COLORS[index % len(_COLORS)]
    turn = index // len(_COLORS) % 4
    return tuple(round(channel * (1.0 - 0.2 * turn)) for channel in base)  # type: ignore[return-value]


def _shrink(picture: Image.Image, resample: Image.Resampling) -> Image.Image:
    longer = max(picture.size)
    if longer <= MAX_SIDE:
        return picture
    width, height = (max(1, round(side * MAX_SIDE / longer)) for side in picture.size)
    return picture.resize((width, height), resample)


def encode_picture(pixels: Pixels) -> Picture:
    """``pixels`` uint8 ``[H, W, 3]``, at most ``MAX_SIDE`` long; tiny ones stay lossless."""
    return _encode(_shrink(Image.fromarray(pixels), Image.Resampling.LANCZOS))


def _encode(picture: Image.Image) -> Picture:
    file = io.BytesIO()
    lossless = picture.width * picture.height <= _LOSSLESS_PIXELS
    if lossless:
        picture.save(file, "PNG", optimize=True)
    else:
        picture.save(file, "JPEG", quality=80, subsampling="4:2:2", optimize=True)
    return Picture(
        media_type="image/png" if lossless else "image/jpeg",
        data=file.getvalue(),
        width=picture.width,
        height=picture.height,
    )


def draw_boxes(
    pixels: Pixels,
    boxes: Sequence[tuple[Corners, int, str]],
    *,
    extra: Sequence[bool] = (),
    missing: Sequence[tuple[Corners, str]] = (),
) -> Picture:
    """The photo with boxes: (corners in its pixels, class, text) each.

    ``extra``: which of them the reference does not have (drawn red); ``missing``: those
    that only the reference has (red and dashed).
    """
    picture = Image.fromarray(pixels)
    height, width = pixels.shape[:2]
    scale = min(1.0, MAX_SIDE / max(height, width))
    if max(height, width) < MAX_SIDE / 2:  # lines and text need room
        scale = MAX_SIDE / 2 / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    marks = [*extra, *[False] * (len(boxes) - len(extra))]
    # The best boxes come first and are drawn last, on top.
    for (corners, index, text), is_extra in reversed(list(zip(boxes, marks, strict=True))):
        color = _MISSING if is_extra else class_color(index)
        place = _scaled(corners, scale, size)
        draw.rectangle(place, outline=color, width=2)
        _label(draw, place, text, color, size)
    for corners, text in missing:
        place = _scaled(corners, scale, size)
        _dashed(draw, place)
        _label(draw, place, text, _MISSING, size)
    return _encode(picture)


def _scaled(corners: Corners, scale: float, size: tuple[int, int]) -> Corners:
    x_low, y_low, x_high, y_high = (value * scale for value in corners)
    right, bottom = size[0] - 1.0, size[1] - 1.0
    x_low, y_low = min(max(x_low, 0.0), right), min(max(y_low, 0.0), bottom)
    return x_low, y_low, min(max(x_high, x_low), right), min(max(y_high, y_low), bottom)


def _dashed(draw: ImageDraw.ImageDraw, corners: Corners) -> None:
    x_low, y_low, x_high, y_high = corners
    for y in (y_low, y_high):
        for start in np.arange(x_low, x_high, 8.0):
            draw.line((start, y, min(start + 4.0, x_high), y), fill=_MISSING, width=2)
    for x in (x_low, x_high):
        for start in np.arange(y_low, y_high, 8.0):
            draw.line((x, start, x, min(start + 4.0, y_high)), fill=_MISSING, width=2)


def _label(
    draw: ImageDraw.ImageDraw,
    corners: Corners,
    text: str,
    color: tuple[int, int, int],
    size: tuple[int, int],
) -> None:
    font = ImageFont.load_default(11)
    shown = "".join(char if char.isprintable() else "?" for char in text)[:24]
    left, top, right, bottom = draw.textbbox((0, 0), shown, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(0.0, corners[0]), max(0.0, size[0] - width))
    y = corners[1] - height if corners[1] >= height else corners[1]
    draw.rectangle((x, y, x + width, y + height), fill=color)
    dark = color[0] * 0.3 + color[1] * 0.59 + color[2] * 0.11 > 140
    draw.text((x + 2 - left, y + 2 - top), shown, font=font, fill="black" if dark else "white")


def overlay_classes(pixels: Pixels, class_map: Pixels, *, plain: int | None) -> Picture:
    """``class_map`` uint8 ``[h, w]`` in colors over the photo; class ``plain`` stays clear."""
    photo = _shrink(Image.fromarray(pixels), Image.Resampling.LANCZOS)
    small = Image.fromarray(class_map).resize(photo.size, Image.Resampling.NEAREST)
    classes = np.asarray(small)
    table = np.array([class_color(index) for index in range(256)], dtype=np.float32)
    share = np.full((*classes.shape, 1), 0.6, dtype=np.float32)
    if plain is not None:
        share[classes == plain] = 0.0
    mixed = np.asarray(photo, np.float32) * (1.0 - share) + table[classes] * share
    return _encode(Image.fromarray(np.rint(mixed).astype(np.uint8)))


def tell_apart(pixels: Pixels, differs: NDArray[np.bool_]) -> Picture:
    """The photo in gray, with the pixels red where ``differs`` ``[h, w]`` is true.

    Where they are few, each is drawn as 3 x 3, to be seen at all.
    """
    photo = _shrink(Image.fromarray(pixels), Image.Resampling.LANCZOS)
    gray = np.asarray(photo.convert("L").convert("RGB")).copy()
    # Any share of a shrunken pixel counts: BOX gives the mean.
    mask = Image.fromarray(differs.astype(np.uint8) * 255)
    mask = mask.resize(photo.size, Image.Resampling.BOX).point(lambda value: 255 if value else 0)
    if float(differs.mean()) < _FEW:
        mask = mask.filter(ImageFilter.MaxFilter(3))
    gray[np.asarray(mask) > 0] = _MISSING
    return _encode(Image.fromarray(gray))


def encode_difference(reference: Pixels, answer: Pixels) -> tuple[Picture, int]:
    """|reference - answer| made brighter by a power of two, and that factor.

    At most one in a thousand values is cut off.
    """
    absolute = np.abs(reference.astype(np.int16) - answer.astype(np.int16))
    large = float(np.quantile(absolute, 0.999))
    factor = 1
    while factor < 128 and 2 * factor * large <= 255:
        factor *= 2
    bright = np.minimum(absolute.astype(np.int32) * factor, 255)
    return encode_picture(bright.astype(np.uint8)), factor
