"""Resizing equals its written definition, bit for bit, at every size."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_runtime.contract.resample import (
    resize,
    resize_bilinear_aa_spec,
    round_half_even,
    shorter_side_size,
)

SIDE = st.integers(1, 70)


def _image(height: int, width: int, channels: int, seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


@given(SIDE, SIDE, SIDE, SIDE, st.sampled_from([1, 3]), st.integers(0, 999))
@settings(max_examples=200, deadline=None)
def test_antialiased_resize_is_the_definition(
    h: int, w: int, height: int, width: int, channels: int, seed: int
) -> None:
    image = _image(h, w, channels, seed)
    fast = resize(image, height, width, "resize_bilinear_aa@1")
    np.testing.assert_array_equal(fast, resize_bilinear_aa_spec(image, height, width))


def _lerp_by_fractions(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """``resize_bilinear@1`` pixel by pixel with exact rationals, as the page writes it."""

    def position(out: int, size_in: int, size_out: int) -> tuple[int, int, int]:
        source = Fraction((2 * out + 1) * size_in - size_out, 2 * size_out)
        low = source.numerator // source.denominator
        weight = (source - low) * 2048 + Fraction(1, 2)
        clamp = lambda index: min(max(index, 0), size_in - 1)  # noqa: E731
        return clamp(low), clamp(low + 1), weight.numerator // weight.denominator

    result = np.empty((height, width, image.shape[2]), dtype=np.uint8)
    for y in range(height):
        y0, y1, wy = position(y, image.shape[0], height)
        for x in range(width):
            x0, x1, wx = position(x, image.shape[1], width)
            for c in range(image.shape[2]):
                p = [int(v) for v in (image[y0, x0, c], image[y0, x1, c])]
                q = [int(v) for v in (image[y1, x0, c], image[y1, x1, c])]
                top = p[0] * (2048 - wx) + p[1] * wx
                bottom = q[0] * (2048 - wx) + q[1] * wx
                result[y, x, c] = (top * (2048 - wy) + bottom * wy + (1 << 21)) >> 22
    return result


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_plain_bilinear_is_the_definition(h: int, w: int, height: int, width: int) -> None:
    image = _image(h, w, 3, h * 31 + w)
    fast = resize(image, height, width, "resize_bilinear@1")
    expected = image if (h, w) == (height, width) else _lerp_by_fractions(image, height, width)
    np.testing.assert_array_equal(fast, expected)


@given(SIDE, SIDE, SIDE, SIDE, st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_flat_pictures_stay_flat(h: int, w: int, height: int, width: int, value: int) -> None:
    image = np.full((h, w, 3), value, dtype=np.uint8)
    for algorithm in ("resize_bilinear_aa@1", "resize_bilinear@1"):
        assert (resize(image, height, width, algorithm) == value).all()


@given(st.integers(0, 10**6), st.integers(1, 1000))
def test_rounding_is_half_to_even(numerator: int, denominator: int) -> None:
    assert round_half_even(numerator, denominator) == round(Fraction(numerator, denominator))


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 600))
def test_shorter_side_becomes_the_size(height: int, width: int, size: int) -> None:
    new_height, new_width = shorter_side_size(height, width, size)
    assert min(new_height, new_width) == size
    long_in, short_in = max(height, width), min(height, width)
    assert max(new_height, new_width) == size * long_in // short_in
