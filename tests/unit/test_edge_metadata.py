"""Metadata leaves no device; pixels and orientation are what they were."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from edge_runtime.contract.errors import ImageError, ImageUnreadable
from edge_runtime.contract.imaging import decode_image
from edge_runtime.offload.metadata import strip_metadata

SECRET = b"SECRET-47.3769N-8.5417E"
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d" note="'
    + SECRET
    + b'"/></x:xmpmeta>'
)


def picture(mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    block[0x010F] = SECRET.decode()
    block.get_ifd(0x8825)[29] = SECRET.decode()
    return block.tobytes()


def encode(kind: str, orientation: int = 1, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, kind, exif=exif(orientation), **options)
    return buffer.getvalue()


def orientation_of(data: bytes) -> int:
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        return int(opened.getexif().get(0x0112, 1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_only_the_orientation_survives(kind: str, orientation: int) -> None:
    data = encode(kind, orientation)
    assert SECRET in data
    stripped = strip_metadata(data)
    assert SECRET not in stripped
    assert len(stripped) < len(data)
    assert orientation_of(stripped) == orientation
    assert np.array_equal(decode_image(stripped), decode_image(data))
    with Image.open(io.BytesIO(stripped)) as opened:
        opened.load()
        assert set(opened.getexif()) <= {0x0112}


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"subsampling": 0, "quality": 95},
        {"icc_profile": b"x" * 3000, "comment": SECRET},
        {"dpi": (300, 300)},
        {"restart_marker_blocks": 1},
        {"xmp": XMP % 6},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_kind_of_jpeg_keeps_its_pixels(options: dict[str, object]) -> None:
    data = encode("JPEG", 6, **options)
    stripped = strip_metadata(data)
    assert SECRET not in stripped
    assert np.array_equal(decode_image(stripped), decode_image(data))


def test_an_orientation_known_from_xmp_alone_stays_in_effect() -> None:
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG", xmp=XMP % 8)
    stripped = strip_metadata(buffer.getvalue())
    assert SECRET not in stripped
    assert np.array_equal(decode_image(stripped), decode_image(buffer.getvalue()))
    assert orientation_of(stripped) == 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_what_follows_the_picture_is_cut_off(kind: str) -> None:
    data = encode(kind) + b"motion photo " + SECRET
    stripped = strip_metadata(data)
    assert SECRET not in stripped
    assert stripped.endswith(b"\xff\xd9" if kind == "JPEG" else b"IEND\xaeB`\x82")


def test_png_text_chunks_go_and_an_old_style_orientation_stays() -> None:
    info = PngInfo()
    info.add_text("Author", SECRET.decode(), zip=True)
    info.add_itxt("Place", SECRET.decode())
    block = b"Exif\x00\x00" + exif(3)
    info.add_text("Raw profile type exif", f"\nexif\n{len(block):8d}\n{block.hex()}")
    buffer = io.BytesIO()
    picture().save(buffer, "PNG", pnginfo=info)
    stripped = strip_metadata(buffer.getvalue())
    kinds = {stripped[at : at + 4] for at in _chunk_types(stripped)}
    assert kinds == {b"IHDR", b"eXIf", b"IDAT", b"IEND"}
    assert np.array_equal(decode_image(stripped), decode_image(buffer.getvalue()))


def _chunk_types(png: bytes) -> list[int]:
    found, at = [], 8
    while at < len(png):
        found.append(at + 4)
        size = int.from_bytes(png[at : at + 4], "big")
        body = png[at + 4 : at + 8 + size]
        assert zlib.crc32(body) == int.from_bytes(png[at + 8 + size : at + 12 + size], "big")
        at += 12 + size
    return found


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_gray_and_palette_pictures_keep_their_pixels(mode: str) -> None:
    buffer = io.BytesIO()
    picture(mode).save(buffer, "PNG", exif=exif(5))
    assert np.array_equal(
        decode_image(strip_metadata(buffer.getvalue())), decode_image(buffer.getvalue())
    )


@pytest.mark.parametrize("lossless", [True, False])
def test_webp_metadata_goes_with_its_flags(lossless: bool) -> None:
    data = encode("WEBP", 1, lossless=lossless, xmp=XMP % 1, icc_profile=b"y" * 400)
    stripped = strip_metadata(data)
    assert SECRET not in stripped
    assert stripped[12:16] == b"VP8X"
    assert stripped[20] & (0x20 | 0x08 | 0x04) == 0
    assert int.from_bytes(stripped[4:8], "little") == len(stripped) - 8
    assert np.array_equal(decode_image(stripped), decode_image(data))


def test_a_second_pass_changes_nothing() -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        once = strip_metadata(encode(kind, 6))
        assert strip_metadata(once) == once


def test_a_broken_exif_block_counts_as_none() -> None:
    data = encode("JPEG", 6)
    at = data.index(b"Exif\x00\x00")
    broken = data[: at + 6] + b"\xff" * 8 + data[at + 14 :]
    stripped = strip_metadata(broken)
    assert b"Exif" not in stripped
    assert np.array_equal(decode_image(stripped), decode_image(broken))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_file_is_refused_before_upload(kind: str) -> None:
    data = encode(kind)
    for size in (12, len(data) // 3, len(data) - 3):
        with pytest.raises(ImageUnreadable, match="encode the image anew"):
            strip_metadata(data[:size])


def test_other_bytes_are_refused() -> None:
    with pytest.raises(ImageUnreadable):
        strip_metadata(b"GIF89a")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_gives_a_typed_error_or_a_file_without_the_secret(
    kind: str, data: st.DataObject
) -> None:
    original = bytearray(encode(kind, 6))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, len(original) - 1))
        original[at] = data.draw(st.integers(0, 255))
    try:
        stripped = strip_metadata(bytes(original))
    except ImageError:
        return
    assert len(stripped) <= len(original) + 64
    assert struct.pack(">I", 0x45786966) not in stripped or kind != "PNG"


def test_adobe_color_segments_stay() -> None:
    """APP14 says that the three channels are RGB and not YCbCr: without it colors change."""
    data = encode("JPEG", 6, keep_rgb=True, subsampling=0)
    assert np.array_equal(decode_image(strip_metadata(data)), decode_image(data))
