"""Answers as pictures, for people: boxes drawn on the photo, a mask laid over it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from edge_runtime.contract.answer_codec import class_colors
from edge_runtime.contract.tasks import Box

__all__ = ["draw_boxes", "overlay_classes"]

_MASK_SHARE = 0.5
_LINES_A_SIDE = 240
"""A line is the longer side over this wide, at least 2 pixels."""
_LETTERS_A_SIDE = 40


def draw_boxes(photo: NDArray[np.uint8], boxes: Iterable[Box]) -> NDArray[np.uint8]:
    """``photo`` (uint8 RGB ``[H, W, 3]``) with every box, its label and its score."""
    picture = Image.fromarray(photo)
    pen = ImageDraw.Draw(picture)
    longer = max(picture.size)
    width = max(2, longer // _LINES_A_SIDE)
    font = ImageFont.load_default(max(10, longer // _LETTERS_A_SIDE))
    # The best one last, so that it lies on top.
    for box in reversed(tuple(boxes)):
        color = _color(box.index)
        corners = (box.x_min, box.y_min, box.x_max, box.y_max)
        pen.rectangle(corners, outline=color, width=width)
        text = f"{_printable(box.label)} {box.score:.2f}"
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        y = max(0.0, box.y_min - (bottom - top) - 2 * width)
        pen.rectangle(
            (box.x_min, y, box.x_min + right - left + 2 * width, y + bottom - top + 2 * width),
            fill=color,
        )
        dark = sum(color) > 382  # half of white: dark letters on a light ground
        letters = (0, 0, 0) if dark else (255, 255, 255)
        pen.text((box.x_min + width - left, y + width - top), text, fill=letters, font=font)
    return np.asarray(picture)


def _color(index: int) -> tuple[int, int, int]:
    """Class 0 of the color map is black: that is the background's, so start at 1."""
    red, green, blue = (int(value) for value in class_colors()[1 + index % 255])
    return red, green, blue


def _printable(label: str) -> str:
    """Pillow's own font has Latin letters only, and control characters draw nothing good."""
    return label.encode("latin-1", "replace").decode("latin-1") if label.isprintable() else "?"


def overlay_classes(
    photo: NDArray[np.uint8], class_map: NDArray[np.uint8], *, outside: int = 255
) -> NDArray[np.uint8]:
    """``photo`` (uint8 RGB ``[H, W, 3]``) half covered by the colors of its classes.

    ``class_map``: uint8 ``[H, W]`` (``Result.class_map_for``); class 0 and ``outside`` stay
    as they are.
    """
    colors = class_colors()[class_map]
    mixed = np.rint((1 - _MASK_SHARE) * photo + _MASK_SHARE * colors).astype(np.uint8)
    plain = (class_map == 0) | (class_map == outside)
    return np.where(plain[:, :, None], photo, mixed)
