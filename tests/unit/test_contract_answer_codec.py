"""Answers as files: exact where they must be, refused where they make no sense."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from edge_runtime.contract.answer_codec import (
    class_colors,
    decode_answer_pixels,
    encode_answer,
    picture_of_file,
)
from edge_runtime.contract.errors import WireError
from edge_runtime.contract.tasks import ImageToImageTask, SegmentationTask
from edge_runtime.contract.tasks.answer import Answer
from edge_runtime.contract.wire import EncodedAnswer, Picture
from tests.support.images import animated, bomb, encode, photo, rgb16

REGION = (1.5, 0.0, 99.25, 48.0)
SEGMENTS = SegmentationTask(classes=4)
IMAGES = ImageToImageTask()


def picture(
    data: bytes, media_type: str = "image/png", size: tuple[int, int] = (64, 48)
) -> Picture:
    return Picture(media_type=media_type, width=size[0], height=size[1], data=data)  # type: ignore[arg-type]


GRAY = encode(photo().convert("L"))
RGB = encode(photo())


@pytest.mark.parametrize(
    "wrong",
    [
        picture(b""),
        picture(b"junk"),
        picture(RGB[:-200]),
        picture(RGB, size=(48, 64)),
        picture(RGB, media_type="image/jpeg"),
        picture(GRAY),
        picture(encode(photo().convert("RGBA"))),
        picture(rgb16(), size=(9, 9)),
        picture(encode(photo(), "BMP")),
        picture(bomb(30_000), size=(30_000, 30_000)),
        picture(animated("GIF"), size=(16, 16)),
    ],
)
def test_an_image_that_is_not_what_it_says_is_a_wire_error(wrong: Picture) -> None:
    with pytest.raises(WireError):
        decode_answer_pixels(EncodedAnswer(image=wrong), IMAGES)


def mask(values: np.ndarray, **changes: object) -> Picture:
    whole = encode_answer(Answer(class_map=values.astype(np.uint8)))
    assert whole.mask is not None
    return Picture(
        **{name: getattr(whole.mask, name) for name in whole.mask.__struct_fields__} | changes
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        mask(np.full((3, 4), 4)),
        mask(np.zeros((3, 4)), width=5),
        mask(np.zeros((3, 4)), data=encode(photo(4, 3))),
        mask(
            np.zeros((3, 4)), data=encode(photo(4, 3).convert("L"), "JPEG"), media_type="image/jpeg"
        ),
        mask(np.zeros((3, 4)), data=encode(photo(4, 3).convert("1"))),
        mask(np.zeros((3, 4)), data=b"\x89PNG\r\n\x1a\n"),
    ],
)
def test_a_mask_that_is_not_exact_or_names_unknown_classes_is_a_wire_error(wrong: Picture) -> None:
    with pytest.raises(WireError):
        decode_answer_pixels(EncodedAnswer(mask=wrong), SEGMENTS)


sides = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(arrays(np.uint8, sides, elements=st.integers(0, 3)), st.booleans())
def test_a_mask_comes_back_exactly_with_and_without_a_palette(
    class_map: np.ndarray, colored: bool
) -> None:
    encoded = encode_answer(Answer(class_map=class_map, region=REGION), colored=colored)
    assert encoded.mask is not None
    with Image.open(io.BytesIO(encoded.mask.data)) as file:
        assert file.format == "PNG"
        assert file.mode == ("P" if colored else "L")
        if colored:
            shown = np.asarray(file.convert("RGB"))
            np.testing.assert_array_equal(shown, class_colors()[class_map])
    back = decode_answer_pixels(encoded, SEGMENTS)
    np.testing.assert_array_equal(back.class_map, class_map)
    assert back.region == REGION


@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
def test_an_image_comes_back_exactly_as_png(pixels: np.ndarray) -> None:
    back = decode_answer_pixels(encode_answer(Answer(image=pixels, region=REGION)), IMAGES)
    np.testing.assert_array_equal(back.image, pixels)
    assert back.region == REGION


def test_a_jpeg_is_smaller_and_near() -> None:
    pixels = np.asarray(photo(320, 240))
    png = encode_answer(Answer(image=pixels)).image
    jpeg = encode_answer(Answer(image=pixels), media_type="image/jpeg")
    assert png is not None
    assert jpeg.image is not None
    assert len(jpeg.image.data) < 0.25 * len(png.data)
    back = decode_answer_pixels(jpeg, IMAGES)
    assert back.image is not None
    assert np.abs(back.image.astype(int) - pixels).mean() < 3


def test_a_file_alone_says_its_own_size() -> None:
    found = picture_of_file(RGB, "image/png", REGION)
    assert (found.width, found.height, found.region) == (64, 48, REGION)
    for data, media_type in (
        (b"", "image/png"),
        (RGB, "image/jpeg"),
        (b"\xff\xd8\xff", "image/jpeg"),
    ):
        with pytest.raises(WireError):
            picture_of_file(data, media_type, None)  # type: ignore[arg-type]


def test_lists_pass_through_untouched() -> None:
    encoded = encode_answer(Answer(boxes=()))
    assert encoded == EncodedAnswer(boxes=())
    assert decode_answer_pixels(encoded, IMAGES).boxes == ()


def test_the_colors_are_pascal_vocs() -> None:
    colors = class_colors()
    known = {
        0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128),
        8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192),
    }  # fmt: skip
    assert {index: tuple(colors[index].tolist()) for index in known} == known
    assert len(np.unique(colors, axis=0)) == 256
