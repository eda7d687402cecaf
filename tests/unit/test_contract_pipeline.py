"""From an image or a seed to an input, and back to the photo: the same way on both sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.contract.errors import ImageTooLarge, MissingFile, TensorError
from edge_runtime.contract.pipeline import (
    Prepared,
    finish,
    prepare_image,
    prepare_seed,
    prepare_tensor,
    read_anchors,
)
from edge_runtime.contract.preprocess import (
    CenterCrop,
    Normalization,
    Preprocess,
    ResizeExact,
    ResizeShorterSide,
    apply,
    apply_uint8,
)
from edge_runtime.contract.tasks import ImageToImageTask, SegmentationTask
from edge_runtime.contract.tasks.generation import latent_from_seed
from edge_runtime.contract.tensors import TensorSpec, from_little_endian, to_little_endian
from tests.support.tasks import anchors, task_of

UNIT = Normalization(scale=255.0, mean=(0.5,) * 3, std=(2.0,) * 3)
CROPPED = Preprocess(
    resize=ResizeShorterSide(size=20), crop=CenterCrop(height=16, width=12), normalization=UNIT
)
PHOTO = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def spec(dtype: str = "float32", layout: str = "NCHW") -> TensorSpec:
    shape = (1, 3, 16, 12) if layout == "NCHW" else (1, 16, 12, 3)
    return TensorSpec(name="x", dtype=dtype, shape=shape, layout=layout)  # type: ignore[arg-type]


def test_an_input_of_another_size_or_type_is_refused() -> None:
    other = TensorSpec(name="x", dtype="float32", shape=(1, 3, 12, 16), layout="NCHW")
    with pytest.raises(TensorError):
        prepare_image(CROPPED, other, PHOTO)
    with pytest.raises(TensorError):
        prepare_image(CROPPED, spec("int8"), PHOTO)
    with pytest.raises(ImageTooLarge):
        prepare_image(CROPPED, spec(), np.zeros((1, 2000, 3), np.uint8))


def test_a_float_input_gets_normalized_numbers_and_a_uint8_input_pixels() -> None:
    floats = prepare_image(CROPPED, spec(), PHOTO).array
    pixels = prepare_image(CROPPED, spec("uint8", "NHWC"), PHOTO).array
    assert (floats.dtype, pixels.dtype) == (np.float32, np.uint8)
    np.testing.assert_array_equal(floats[0].transpose(1, 2, 0), apply(CROPPED, PHOTO))
    np.testing.assert_array_equal(pixels[0], apply_uint8(CROPPED, PHOTO))


def test_the_region_is_what_the_crop_left() -> None:
    # 40 x 60 becomes 20 x 30; the crop takes 16 rows from 2 and 12 columns from 9.
    prepared = prepare_image(CROPPED, spec(), PHOTO)
    assert prepared.region == (18.0, 4.0, 42.0, 36.0)
    whole = Preprocess(resize=ResizeExact(height=16, width=12), normalization=UNIT)
    assert prepare_image(whole, spec(), PHOTO).region == (0.0, 0.0, 60.0, 40.0)


def test_a_seed_takes_the_shape_of_the_input() -> None:
    for shape in ((1, 6), (1, 6, 1, 1)):
        taken = TensorSpec(name="z", dtype="float32", shape=shape, layout="OTHER")
        prepared = prepare_seed(taken, 9)
        assert prepared.array.shape == shape
        np.testing.assert_array_equal(prepared.array.reshape(-1), latent_from_seed(9, 6))
        assert prepared.geometry is None
        assert prepared.region is None


@pytest.mark.parametrize("flip", [False, True])
def test_pixels_of_an_answer_lie_as_in_the_photo_even_where_the_input_was_mirrored(
    flip: bool,
) -> None:
    record = Preprocess(
        resize=ResizeExact(height=16, width=12), flip_horizontal=flip, normalization=UNIT
    )
    prepared = prepare_image(record, spec(), PHOTO)
    upright = prepare_image(
        Preprocess(resize=ResizeExact(height=16, width=12), normalization=UNIT), spec(), PHOTO
    )
    same = ImageToImageTask(output_scale=510.0, output_offset=127.5)  # undoes UNIT
    got = finish(same, [prepared.array], prepared, labels=(), anchors=None, top_k=None)
    want = finish(same, [upright.array], upright, labels=(), anchors=None, top_k=None)
    np.testing.assert_array_equal(got.image, want.image)
    assert got.region == (0.0, 0.0, 60.0, 40.0)
    scores = np.concatenate([prepared.array[:, :1], prepared.array[:, 1:2]], axis=1)
    labeled = finish(
        SegmentationTask(classes=2), [scores], prepared, labels=("a", "b"), anchors=None, top_k=None
    )
    green_wins = upright.array[0, 1] > upright.array[0, 0]
    np.testing.assert_array_equal(labeled.class_map, green_wins.astype(np.uint8))


def test_an_answer_from_a_seed_shows_no_region() -> None:
    prepared = Prepared(array=np.zeros((1, 6), np.float32))
    image = np.zeros((1, 3, 4, 4), np.float32)
    answer = finish(task_of("generation"), [image], prepared, labels=(), anchors=None, top_k=None)
    assert answer.image is not None
    assert answer.region is None


def test_anchors_are_read_as_they_were_written(tmp_path: Path) -> None:
    task = task_of("detection")
    assert read_anchors(tmp_path, task_of("segmentation")) is None
    with pytest.raises(MissingFile):
        read_anchors(tmp_path, task)
    (tmp_path / "anchors.f32").write_bytes(anchors().astype("<f4").tobytes())
    got = read_anchors(tmp_path, task)
    assert got is not None
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, anchors())


def test_a_tensor_of_the_callers_own_goes_in_as_it_is_and_says_nothing_of_a_photo():
    flipped = Preprocess(
        resize=ResizeExact(height=16, width=12), flip_horizontal=True, normalization=UNIT
    )
    array = np.random.default_rng(1).normal(size=(1, 3, 16, 12)).astype("<f4")
    prepared = prepare_tensor(flipped, spec(), array.tobytes())
    np.testing.assert_array_equal(prepared.array, array)
    assert prepared.region is None
    assert prepared.geometry is not None
    box = np.array([[1.0, 2.0, 5.0, 20.0]])
    assert prepared.geometry.boxes_to_original(box).tolist() == [[1.0, 2.0, 5.0, 16.0]]
    assert prepare_tensor(None, spec(), array.tobytes()).geometry is None
    for wrong in (b"", array.tobytes()[:-1], array.tobytes() * 2):
        with pytest.raises(TensorError, match="2304 bytes"):
            prepare_tensor(flipped, spec(), wrong)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int16", "int64", "bool"])
def test_numbers_travel_little_endian_whatever_the_machine_is(dtype: str):
    values = np.array([[0, 1, 1, 0]]).astype(dtype)
    big = values.astype(np.dtype(dtype).newbyteorder(">"))
    own = TensorSpec(name="t", dtype=dtype, shape=(1, 4), layout="NC")  # type: ignore[arg-type]
    assert to_little_endian(big) == to_little_endian(values)
    back = from_little_endian(to_little_endian(big), own)
    assert back.dtype == np.dtype(dtype)
    assert back.tolist() == values.tolist()
