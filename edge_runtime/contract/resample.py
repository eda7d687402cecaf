"""Image resizing in integer arithmetic, versioned, so that every language agrees.

``docs/preprocessing.md`` writes both algorithms out; ``mobile_samples/conformance`` holds
vectors. A change of a single bit is a new version (``@2``), never an edit.

All functions take and give uint8 ``[H, W, C]`` with one or three channels.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = [
    "Algorithm",
    "resize",
    "resize_bilinear_aa_spec",
    "round_half_even",
    "shorter_side_size",
]

Algorithm = Literal["resize_bilinear_aa@1", "resize_bilinear@1"]

_AA_BITS = 22  # 32 - 8 - 2: Pillow's PRECISION_BITS for 8-bit images
_LERP_BITS = 11


def resize(
    image: NDArray[np.uint8], height: int, width: int, algorithm: Algorithm
) -> NDArray[np.uint8]:
    """Resize uint8 ``[H, W, C]`` to ``[height, width, C]``."""
    if image.shape[:2] == (height, width):
        return image
    if algorithm == "resize_bilinear_aa@1":
        return _resize_bilinear_aa(image, height, width)
    return _resize_bilinear(image, height, width)


def _resize_bilinear_aa(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """``resize_bilinear_aa@1`` by Pillow, one axis a call.

    Pillow 13 picks the cheaper pass order by size and so rounds differently from Pillow
    12; two calls pin the order. ``resize_bilinear_aa_spec`` is the definition, and a
    property test holds this function to it.
    """
    channels = image.shape[2]
    picture = Image.fromarray(image[:, :, 0] if channels == 1 else image)
    picture = picture.resize((width, picture.height), Image.Resampling.BILINEAR)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(picture).reshape(height, width, channels))


def _aa_coefficients(size_in: int, size_out: int) -> list[tuple[int, NDArray[np.int64]]]:
    """First source index and fixed-point weights of each output sample.

    Triangle filter of support 1, stretched by the scale when shrinking; weights are
    normalized in double precision, then rounded half away from zero to 22 bits.
    """
    scale = size_in / size_out
    filter_scale = max(scale, 1.0)
    support = filter_scale
    inverse = 1.0 / filter_scale
    rows = []
    for out in range(size_out):
        center = (out + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), size_in)
        weights = []
        total = 0.0
        for index in range(first, last):
            distance = abs((index - center + 0.5) * inverse)
            weight = 1.0 - distance if distance < 1.0 else 0.0
            weights.append(weight)
            total += weight
        normal = [w / total if total != 0.0 else w for w in weights]
        fixed = [int(0.5 + w * (1 << _AA_BITS)) for w in normal]
        rows.append((first, np.asarray(fixed, dtype=np.int64)))
    return rows


def _aa_pass(image: NDArray[np.uint8], size_out: int) -> NDArray[np.uint8]:
    """Resample axis 0; every pass rounds half up and clips to 8 bits."""
    out = np.empty((size_out, *image.shape[1:]), dtype=np.uint8)
    wide = image.astype(np.int64)
    half = 1 << (_AA_BITS - 1)
    for row, (first, weights) in enumerate(_aa_coefficients(image.shape[0], size_out)):
        span = wide[first : first + len(weights)]
        total: NDArray[np.int64] = np.einsum("k,kij->ij", weights, span) + half
        out[row] = np.clip(total >> _AA_BITS, 0, 255).astype(np.uint8)
    return out


def resize_bilinear_aa_spec(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """``resize_bilinear_aa@1`` as defined: Pillow's fixed-point resampling, written out.

    Horizontal pass first, then vertical, each rounding to 8 bits; a pass whose size does
    not change is left out. Source of the algorithm: Pillow ``src/libImaging/Resample.c``.
    Slow; for tests and for ports to other languages.
    """
    if image.shape[1] != width:
        image = np.ascontiguousarray(_aa_pass(image.transpose(1, 0, 2), width).transpose(1, 0, 2))
    if image.shape[0] != height:
        image = _aa_pass(image, height)
    return image


def _lerp_positions(
    size_in: int, size_out: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Both neighbors and the 11-bit weight of the upper one, for half-pixel centers.

    source = ((2*out + 1) * size_in - size_out) / (2 * size_out), kept as a fraction;
    weight = its fractional part times 2048, rounded half up. Neighbors clamp to the edge.
    """
    out = np.arange(size_out, dtype=np.int64)
    numerator = (2 * out + 1) * size_in - size_out
    denominator = 2 * size_out
    low = numerator // denominator  # floor, also below zero
    fraction = numerator - low * denominator
    weight = (fraction * (2 << _LERP_BITS) + denominator) // (2 * denominator)
    return np.clip(low, 0, size_in - 1), np.clip(low + 1, 0, size_in - 1), weight


def _resize_bilinear(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """``resize_bilinear@1``: two neighbors an axis, half-pixel centers, no antialias."""
    one = 1 << _LERP_BITS
    y0, y1, wy = _lerp_positions(image.shape[0], height)
    x0, x1, wx = _lerp_positions(image.shape[1], width)
    wx = wx[None, :, None]
    wy = wy[:, None, None]

    def row(y: NDArray[np.int64]) -> NDArray[np.int64]:
        # Pick before widening: memory follows the output's size, not the input's.
        left, right = image[y][:, x0].astype(np.int64), image[y][:, x1].astype(np.int64)
        return left * (one - wx) + right * wx

    top, bottom = row(y0), row(y1)
    total: NDArray[np.int64] = top * (one - wy) + bottom * wy
    rounded: NDArray[np.int64] = (total + (1 << (2 * _LERP_BITS - 1))) >> (2 * _LERP_BITS)
    return rounded.astype(np.uint8)


def shorter_side_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width once the shorter side is ``size``; the longer one is floored.

    As torchvision: ``floor(size * long / short)`` in integers.
    """
    if height <= width:
        return size, size * width // height
    return size * height // width, size


def round_half_even(numerator: int, denominator: int = 2) -> int:
    """``numerator / denominator`` rounded to nearest, ties to even, in integers."""
    quotient, rest = divmod(numerator, denominator)
    twice = 2 * rest
    if twice > denominator or (twice == denominator and quotient % 2 == 1):
        return quotient + 1
    return quotient
