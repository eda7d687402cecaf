"""JPEG decoding: one rule, two decoders, and what the scaled mode changes."""

from __future__ import annotations

import io

import msgspec
import numpy as np
import pytest
from PIL import Image, ImageOps

from broker.executors.decoding import decode_jpeg
from edge_runtime.contract import errors as e
from edge_runtime.contract import preprocess
from edge_runtime.contract.imaging import decode_image, decode_scaled
from edge_runtime.contract.manifest import canonical_json
from edge_runtime.contract.pipeline import prepare_image
from edge_runtime.contract.tensors import TensorSpec
from tests.support.images import encode, photo

SCALED = msgspec.structs.replace(preprocess.named("torchvision", 64, 64), decode="scaled")
SPEC = TensorSpec(name="images", dtype="uint8", shape=(1, 3, 64, 64), layout="NCHW")
SIZES = [(640, 480), (641, 479), (997, 1203), (64, 64), (65, 130)]


def jpeg(width: int, height: int, **options: object) -> bytes:
    return encode(photo(width, height), "JPEG", **({"quality": 90} | options))


def turned(data: bytes, orientation: int) -> bytes:
    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(data))
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(buffer, "JPEG", exif=exif, quality=90)
    return buffer.getvalue()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}])
def test_both_decoders_give_the_same_pixels_at_every_factor(
    size: tuple[int, int], factor: int, options: dict[str, object]
):
    data = jpeg(*size, **options)
    direct = decode_jpeg(data, factor)
    pillow = decode_scaled(data, lambda height, width: factor).pixels
    assert direct is not None
    assert pillow.shape == (-(-size[1] // factor), -(-size[0] // factor), 3)
    assert np.array_equal(direct, pillow)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_direct_decoder_turns_an_image_as_exif_says(orientation: int):
    data = turned(jpeg(48, 32), orientation)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    decoded = decode_scaled(data, lambda height, width: 1, decode_jpeg)
    assert np.array_equal(decoded.pixels, upright)
    assert (decoded.height, decoded.width) == upright.shape[:2]
    assert np.array_equal(decode_image(data), upright)


def test_gray_becomes_rgb_and_cmyk_is_refused_by_both():
    gray = encode(photo(60, 40).convert("L"), "JPEG", quality=90)
    assert np.array_equal(
        decode_scaled(gray, lambda height, width: 1, decode_jpeg).pixels, decode_image(gray)
    )
    cmyk = encode(photo(60, 40).convert("CMYK"), "JPEG", quality=90)
    with pytest.raises(e.ImageModeUnsupported):
        decode_scaled(cmyk, lambda height, width: 1, decode_jpeg)


@pytest.mark.parametrize("kept", [0.2, 0.6, 0.95])
def test_a_truncated_jpeg_is_refused_whoever_decodes(kept: float):
    data = jpeg(320, 240)
    cut = data[: int(len(data) * kept)]
    for factor in (1, 8):
        with pytest.raises(e.ImageUnreadable):
            decode_scaled(cut, lambda height, width, f=factor: f, decode_jpeg)


def test_too_many_pixels_are_refused_on_the_header_before_any_decoder_runs():
    data = bytearray(jpeg(64, 64))
    at = data.index(b"\xff\xc0") + 5  # height and width in the frame header
    data[at : at + 4] = b"\x40\x00\x40\x00"
    calls = []

    def decoder(data: bytes, factor: int):
        calls.append(factor)

    with pytest.raises(e.ImageTooLarge):
        decode_scaled(bytes(data), lambda height, width: 8, decoder)
    assert calls == []


@pytest.mark.parametrize(
    ("height", "width", "factor"),
    [(3024, 4032, 8), (511, 511, 4), (512, 600, 8), (128, 128, 2), (127, 127, 1), (64, 2000, 1)],
)
def test_the_factor_leaves_no_side_shorter_than_the_resized_image(
    height: int, width: int, factor: int
):
    """ceil(511 / 8) is 64 as well: the decoder rounds up."""
    wanted = {(511, 511): 8, (127, 127): 2}.get((height, width), factor)
    assert preprocess.decode_factor(SCALED, height, width) == wanted
    exact = preprocess.named("torchvision", 64, 64)
    assert preprocess.decode_factor(exact, height, width) == 1


@pytest.mark.parametrize("size", [(1280, 960), (961, 1283), (4000, 3000)])
def test_scaled_decoding_changes_the_input_within_the_stated_bounds(size: tuple[int, int]):
    """docs/preprocessing.md states them: 3 in the mean, 20 at most, on photos."""
    data = jpeg(*size)
    record = preprocess.named("torchvision", 64, 64)
    exact = prepare_image(record, SPEC, decode_image(data))
    decoded = decode_scaled(
        data, lambda height, width: preprocess.decode_factor(SCALED, height, width), decode_jpeg
    )
    assert decoded.pixels.shape[0] < size[1]
    scaled = prepare_image(SCALED, SPEC, decoded.pixels, (decoded.height, decoded.width))
    difference = np.abs(exact.array.astype(int) - scaled.array.astype(int))
    assert difference.mean() <= 3.0
    assert difference.max() <= 20
    assert scaled.geometry == exact.geometry
    assert scaled.region == exact.region


def test_only_a_record_that_declares_it_mentions_decoding():
    exact = preprocess.named("torchvision", 64, 64)
    assert b"decode" not in canonical_json(exact)
    assert b'"decode":"scaled"' in canonical_json(SCALED)
    decoded = msgspec.json.decode(canonical_json(SCALED), type=preprocess.Preprocess)
    assert decoded == SCALED
