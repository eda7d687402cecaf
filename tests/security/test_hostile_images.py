"""Every unusable image is refused with its own typed error, before it costs anything."""

from __future__ import annotations

import resource
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    ImageAnimated,
    ImageError,
    ImageModeUnsupported,
    ImageTooLarge,
    ImageUnreadable,
)
from edge_runtime.contract.imaging import decode_image, sniff_media_type
from tests.support import images


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("empty", b"", ImageUnreadable),
        ("text", b"hello, this is no image at all", ImageUnreadable),
        ("gif", images.encode(images.photo(), "GIF"), ImageUnreadable),
        ("bmp", images.encode(images.photo(), "BMP"), ImageUnreadable),
        ("tiff", images.encode(images.photo(), "TIFF"), ImageUnreadable),
        ("jpeg header only", images.encode(images.photo(), "JPEG")[:200], ImageUnreadable),
        ("png without data", images.encode(images.photo(), "PNG")[:60], ImageUnreadable),
        ("animated png", images.animated("PNG"), ImageAnimated),
        ("animated webp", images.animated("WEBP"), ImageAnimated),
        ("cmyk", images.encode(images.photo().convert("CMYK"), "JPEG"), ImageModeUnsupported),
        ("16-bit rgb", images.rgb16(), ImageModeUnsupported),
        (
            "16-bit gray",
            images.encode(Image.fromarray(np.full((8, 8), 40000, np.uint16)), "PNG"),
            ImageModeUnsupported,
        ),
        (
            "translucent",
            images.encode(Image.new("RGBA", (8, 8), (1, 2, 3, 128)), "PNG"),
            ImageModeUnsupported,
        ),
        ("bomb", images.bomb(), ImageTooLarge),
    ],
)
def test_unusable_image_has_its_own_error(name: str, data: bytes, error: type[ImageError]) -> None:
    with pytest.raises(error) as caught:
        decode_image(data)
    assert type(caught.value) is error
    assert len(caught.value.detail) > 20, "says what to do"


def test_bomb_is_refused_on_its_header() -> None:
    data = images.bomb()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with pytest.raises(ImageTooLarge):
        decode_image(data)
    assert time.perf_counter() - start < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_too_many_bytes_are_refused_unread() -> None:
    with pytest.raises(ImageTooLarge):
        decode_image(b"\xff\xd8\xff" + bytes(limits.MAX_IMAGE_BYTES))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncation_anywhere_is_a_typed_error_or_the_whole_image(kind: str) -> None:
    data = images.encode(images.photo(40, 30), kind)
    whole = decode_image(data)
    for length in range(0, len(data), max(1, len(data) // 64)):
        try:
            again = decode_image(data[:length])
        except ImageError:
            continue
        assert again.shape == whole.shape


@given(data=st.binary(max_size=2048), kind=st.sampled_from(["JPEG", "PNG", "WEBP"]))
@settings(max_examples=150, deadline=None)
def test_noise_behind_a_real_header_never_escapes_the_error_tree(data: bytes, kind: str) -> None:
    start = images.encode(images.photo(20, 20), kind)[:40]
    try:
        image = decode_image(start + data)
    except ImageError:
        return
    assert image.dtype == np.uint8


@given(seed=st.integers(0, 2**32 - 1), flips=st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_flipped_bytes_never_escape_the_error_tree(seed: int, flips: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(images.encode(images.photo(32, 32), ("JPEG", "PNG", "WEBP")[seed % 3]))
    for position in rng.integers(0, len(data), flips):
        data[position] ^= int(rng.integers(1, 256))
    try:
        image = decode_image(bytes(data))
    except ImageError:
        return
    assert image.shape[2] == 3


def test_all_eight_exif_orientations_come_out_upright() -> None:
    upright = images.photo(40, 24)
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }
    wanted = np.asarray(upright)
    for orientation, picture in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        np.testing.assert_array_equal(decode_image(images.encode(picture, exif=exif)), wanted)


def test_broken_exif_does_not_cost_the_picture() -> None:
    data = images.encode(images.photo(), "JPEG", exif=b"Exif\x00\x00garbage-that-is-no-tiff")
    assert decode_image(data).shape == (48, 64, 3)


def test_gray_palette_and_opaque_alpha_become_the_same_rgb() -> None:
    gray = images.photo().convert("L")
    rgb = np.repeat(np.asarray(gray)[:, :, None], 3, axis=2)
    opaque = gray.convert("RGBA")
    for picture in (gray, gray.convert("P"), gray.convert("LA"), opaque):
        np.testing.assert_array_equal(decode_image(images.encode(picture)), rgb)


def test_media_type_comes_from_the_bytes() -> None:
    assert sniff_media_type(images.encode(images.photo(), "JPEG")) == "image/jpeg"
    assert sniff_media_type(images.encode(images.photo(), "PNG")) == "image/png"
    assert sniff_media_type(images.encode(images.photo(), "WEBP")) == "image/webp"
    assert sniff_media_type(images.animated("GIF")) is None
