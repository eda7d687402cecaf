"""The pre-processing record: exact arithmetic, and refusal of what contradicts itself."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from edge_runtime.contract.errors import ManifestError, TensorError
from edge_runtime.contract.preprocess import (
    NAMED,
    CenterCrop,
    Normalization,
    Preprocess,
    ResizeExact,
    ResizeShorterSide,
    apply,
    apply_uint8,
    named,
    normalization_table,
)
from edge_runtime.contract.tensors import TensorSpec, pack_image, unpack_image
from mobile_samples.conformance.generate import picture

UNIT = NAMED["unit"][1]


def test_named_normalizations_are_the_published_formulas() -> None:
    image = picture(20, 20, 1)
    x = image.astype(np.float64)
    by_name = {name: apply(named(name, 20, 20), image) for name in NAMED}
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = {
        "torchvision": (x / 255 - mean) / std,
        "tf": x / 127.5 - 1,
        "caffe": x[:, :, ::-1] - [103.939, 116.779, 123.68],
        "unit": x / 255,
        "raw": x,
    }
    assert set(expected) == set(by_name)
    for name, values in expected.items():
        assert by_name[name].dtype == np.float32
        np.testing.assert_array_equal(by_name[name], values.astype(np.float32), err_msg=name)


def test_crop_offsets_round_half_to_even() -> None:
    rows = np.arange(9, dtype=np.uint8)[:, None, None].repeat(9, axis=1).repeat(3, axis=2)
    for crop, first in ((8, 0), (6, 2), (4, 2), (2, 4)):
        record = Preprocess(
            resize=ResizeExact(height=9, width=9),
            crop=CenterCrop(height=crop, width=9),
            normalization=UNIT,
        )
        assert apply_uint8(record, rows)[0, 0, 0] == first


def test_flip_and_swap_happen_after_the_crop() -> None:
    image = picture(30, 20, 0)
    plain = Preprocess(
        resize=ResizeExact(height=20, width=30),
        crop=CenterCrop(height=10, width=11),
        normalization=UNIT,
    )
    both = msgspec.structs.replace(plain, flip_horizontal=True, color="BGR")
    np.testing.assert_array_equal(
        apply_uint8(both, image), apply_uint8(plain, image)[:, ::-1, ::-1]
    )


def test_gray_is_integer_luma() -> None:
    record = Preprocess(
        resize=ResizeExact(height=1, width=1),
        color="GRAY",
        normalization=Normalization(scale=1.0, mean=(0.0,), std=(1.0,)),
    )
    for rgb, luma in (((255, 255, 255), 255), ((255, 0, 0), 76), ((0, 255, 0), 150)):
        pixel = np.array([[rgb]], dtype=np.uint8)
        assert apply(record, pixel).tolist() == [[[luma]]]


@pytest.mark.parametrize(
    "changes",
    [
        {"crop": None},
        {"crop": CenterCrop(height=40, width=10)},
        {"resize": ResizeExact(height=10, width=40)},
        {"color": "GRAY"},
        {"normalization": Normalization(scale=0.0, mean=(0, 0, 0), std=(1, 1, 1))},
        {"normalization": Normalization(scale=1.0, mean=(0, 0, 0), std=(1, 0, 1))},
        {"normalization": Normalization(scale=1.0, mean=(0, 0), std=(1, 1))},
        {"normalization": Normalization(scale=1.0, mean=(float("nan"), 0, 0), std=(1, 1, 1))},
        {"normalization": Normalization(scale=1.0, mean=(0, 0, 0), std=(1, float("inf"), 1))},
    ],
)
def test_contradictory_record_is_refused(changes: dict[str, object]) -> None:
    sound = Preprocess(
        resize=ResizeShorterSide(size=32),
        crop=CenterCrop(height=32, width=32),
        normalization=UNIT,
    )
    sound.check()
    with pytest.raises(ManifestError):
        msgspec.structs.replace(sound, **changes).check()


def test_table_is_computed_in_double_and_rounded_once() -> None:
    table = normalization_table(Normalization(scale=255.0, mean=(0.485,), std=(0.229,)))
    assert table.shape == (1, 256)
    assert table.dtype == np.float32
    assert table[0, 200] == np.float32((200 / 255.0 - 0.485) / 0.229)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_packing_is_lossless_and_checks_the_shape(layout: str) -> None:
    image = apply(named("tf", 8, 8), picture(8, 8, 0))
    shape = (1, 3, 8, 8) if layout == "NCHW" else (1, 8, 8, 3)
    spec = TensorSpec(name="image", dtype="float32", shape=shape, layout=layout)
    np.testing.assert_array_equal(unpack_image(pack_image(image, spec), spec), image)
    wrong = msgspec.structs.replace(spec, shape=(1, 9, 9, 9))
    with pytest.raises(TensorError, match="must be float32"):
        pack_image(image, wrong)
