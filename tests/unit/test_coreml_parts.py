"""Core ML without coremltools: what iOS allows, grids, blobs, what a Mac's Core ML is given."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from converters.formats.coreml_grids import (
    Int4Grid,
    Int8Grid,
    PaletteGrid,
    SparseGrid,
    lamp_masks,
)
from converters.formats.coreml_package import share_constants
from converters.formats.coreml_program import label_names
from converters.formats.coreml_weights import weight_key
from converters.recipes.coreml import RECIPES, check_min_os, deployment_ios
from edge_runtime.contract.errors import (
    BackendUnavailable,
    ModelLoadError,
    PrecisionRefused,
    TensorError,
)
from edge_runtime.contract.manifest import MinOs
from edge_runtime.contract.tensors import TensorSpec
from edge_runtime.runtimes.coreml import package_name
from edge_runtime.runtimes.mil.blob import BlobFile, unpack
from edge_runtime.runtimes.mil.constexpr import expand
from edge_runtime.runtimes.mil.device import prediction_arguments, prediction_outputs
from edge_runtime.runtimes.mil.schema import load_schema


def test_precision_that_needs_a_newer_ios_is_refused_with_what_to_do() -> None:
    with pytest.raises(PrecisionRefused, match=r"int4w needs iOS 18\.0.*--min-ios is 17\.2"):
        check_min_os("int4w", MinOs(ios="17.2"))
    with pytest.raises(PrecisionRefused):
        deployment_ios("int8", MinOs(ios="16.0"))
    check_min_os("int8", MinOs(ios="17.0"))
    check_min_os("int4w", None)


@pytest.mark.parametrize(
    ("precision", "asked", "written"),
    [
        ("fp32", None, 17), ("fp16", "15.0", 15), ("fp16", "26.0", 17), ("int4w", None, 18),
        ("int4w", "26.1", 18), ("pal4", "16.4", 16), ("int8w+sparse", None, 18),
    ],
)  # fmt: skip
def test_file_is_for_no_newer_ios_than_needed(
    precision: Any, asked: str | None, written: int
) -> None:
    assert deployment_ios(precision, MinOs(ios=asked)) == written
    assert set(RECIPES) >= {"fp32", "fp16", "int8", "int8w", "int4w", "pal4", "fp16+sparse"}


def _weight(outputs: int, inputs: int, positions: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(outputs * inputs)
    return torch.randn(outputs, inputs, positions, generator=generator)


def _values(packed: Any, weight: torch.Tensor) -> np.ndarray:
    """What a file with ``packed`` expands to."""
    if packed.palette is not None:
        return packed.palette[packed.data]
    scale = packed.scale
    if scale is None:
        return packed.data
    repeats = [w // s for w, s in zip(weight.shape, scale.shape, strict=True)]
    for axis, count in enumerate(repeats):
        scale = np.repeat(scale, count, axis)
    return packed.data.astype(np.float32) * scale.astype(np.float32)


@pytest.mark.parametrize("shape", [(6, 64, 1), (4, 24, 9), (3, 40, 2)])
def test_weights_on_a_grid_are_packed_without_loss(shape: tuple[int, int, int]) -> None:
    weight = _weight(*shape)
    for grid in (Int8Grid(weight), Int4Grid(weight), PaletteGrid(weight)):
        rows = weight.double().reshape(1, shape[0], -1)
        rounded = torch.stack(
            [grid.nearest(torch.tensor([c]), rows[:, :, c]) for c in range(rows.shape[2])], 2
        )
        on_grid = rounded.half().float().reshape(shape)
        packed = grid.pack(on_grid)
        np.testing.assert_allclose(_values(packed, weight), on_grid.numpy(), rtol=1.5e-3, atol=1e-7)
        again = grid.pack(torch.from_numpy(_values(packed, weight).astype(np.float32)))
        np.testing.assert_array_equal(packed.data, again.data)


def test_int8_steps_are_those_of_nearest_rounding() -> None:
    weight = _weight(5, 16, 4)
    largest = weight.abs().flatten(1).amax(1).reshape(-1, 1, 1)
    expected = torch.round(weight / (largest / 127)).to(torch.int8).numpy()
    np.testing.assert_array_equal(Int8Grid(weight).pack(weight).data, expected)


def test_four_bit_scales_beat_the_largest_magnitude_rule() -> None:
    weight = _weight(8, 64, 1)
    blocks = weight.reshape(16, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 7
    plain = ((torch.round(blocks / scale).clamp(-8, 7) * scale - blocks) ** 2).sum()
    packed = Int4Grid(weight).pack(weight)
    assert packed.data.min() >= -8
    assert packed.data.max() <= 7
    assert packed.scale.shape == (8, 2, 1)
    searched = ((torch.from_numpy(_values(packed, weight)) - weight) ** 2).sum()
    assert searched < 0.9 * plain


def test_palette_of_a_layer_with_few_values_is_exact() -> None:
    values = torch.tensor([-1.5, -0.25, 0.0, 0.5, 2.0])
    weight = values[torch.arange(4 * 16) % 5].reshape(4, 16, 1)
    packed = PaletteGrid(weight).pack(weight)
    np.testing.assert_array_equal(packed.palette[packed.data], weight.numpy())


def test_sparsity_is_the_share_asked_for_and_falls_where_weights_matter_least() -> None:
    flat, peaked = torch.ones(100, 1, 1), torch.full((100, 1, 1), 1e-3)
    peaked[:10] = 1.0
    masks = lamp_masks([flat, peaked], 0.45)
    assert sum(int((~mask).sum()) for mask in masks) == 90
    assert bool(masks[1][:10].all())
    assert not bool(masks[1][10:].any())
    grid = SparseGrid(peaked, masks[1], quantized=False)
    assert np.count_nonzero(grid.pack(peaked).data) == 10


def test_repeated_labels_become_different_keys() -> None:
    assert label_names(["crane", "tench", "crane"]) == ["crane (0)", "tench", "crane (2)"]
    names = label_names(["a", "a", "a (0)"])
    assert len(set(names)) == 3


# Blobs and constants ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bits"), [("uint1", 1), ("uint3", 3), ("uint4", 4), ("uint6", 6)]
)
def test_packed_numbers_are_read_lowest_bits_first(dtype: str, bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, 37)
    number = sum(int(value) << (bits * place) for place, value in enumerate(values))
    data = number.to_bytes((37 * bits + 7) // 8, "little")
    np.testing.assert_array_equal(unpack(data, dtype, (37,)), values)


def test_signed_four_bit_numbers() -> None:
    assert unpack(bytes([0x78, 0x0F]), "int4", (3,)).tolist() == [-8, 7, -1]


def _blob(kind: int, size: int, start: int, sentinel: int = 0xDEADBEEF) -> bytes:
    header = struct.pack("<II56x", 1, 2)
    return header + struct.pack("<IIQQQ32x", sentinel, kind, size, start, 0) + bytes(64)


@pytest.mark.parametrize(
    ("data", "offset", "shape"),
    [
        (b"", 64, (4,)),
        (b"x" * 200, 64, (4,)),
        (_blob(2, 16, 128), 10**9, (4,)),
        (_blob(2, 16, 128, sentinel=1), 64, (4,)),
        (_blob(1, 16, 128), 64, (4,)),
        (_blob(2, 16, 10**12), 64, (4,)),
        (_blob(2, 16, 128), 64, (10**6,)),
        (_blob(2, 16, 128), 64, (2**20, 2**20)),
    ],
)
def test_blob_that_does_not_add_up_is_a_typed_error(
    tmp_path: Path, data: bytes, offset: int, shape: tuple[int, ...]
) -> None:
    path = tmp_path / "weight.bin"
    path.write_bytes(data)
    with pytest.raises(ModelLoadError):
        BlobFile(path).read(offset, "float32", shape)


def test_compressed_constant_that_does_not_add_up_is_a_typed_error() -> None:
    ones = np.ones(3, np.float16)
    for op_type, inputs in (
        ("constexpr_sparse_to_dense", {"nonzero_data": ones, "mask": np.ones((2, 2), np.uint8)}),
        ("constexpr_blockwise_shift_scale", {"data": np.ones((4, 5)), "scale": np.ones((4, 2))}),
        ("constexpr_lut_to_dense", {"indices": np.full((2, 2), 9), "lut": np.ones((1, 1, 4, 1))}),
        ("constexpr_affine_dequantize", {}),
        ("constexpr_of_tomorrow", {}),
    ):
        with pytest.raises(ModelLoadError, match=op_type):
            expand(op_type, inputs)


# Core ML on a Mac ------------------------------------------------------------------------

IMAGE = TensorSpec(name="image", dtype="uint8", shape=(1, 3, 2, 4), layout="NCHW")
OUT = TensorSpec(name="image", dtype="float32", shape=(1, 3, 2, 4), layout="NCHW")


def test_image_input_becomes_a_picture_with_the_same_pixels() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(IMAGE.shape)
    picture = prediction_arguments([IMAGE], [pixels], frozenset({"image"}))["image"]
    assert isinstance(picture, Image.Image)
    assert (picture.mode, picture.size) == ("RGB", (4, 2))
    np.testing.assert_array_equal(np.asarray(picture), pixels[0].transpose(1, 2, 0))
    gray = TensorSpec(name="image", dtype="uint8", shape=(1, 1, 2, 4), layout="NCHW")
    picture = prediction_arguments([gray], [pixels[:, :1]], frozenset({"image"}))["image"]
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.asarray(picture), pixels[0, 0])


def test_tensor_input_stays_an_array_and_a_wrong_one_is_refused() -> None:
    spec = TensorSpec(name="latent", dtype="float32", shape=(1, 5), layout="NC")
    value = np.arange(5, dtype=np.float32)[None]
    assert prediction_arguments([spec], [value], frozenset())["latent"] is not None
    with pytest.raises(TensorError):
        prediction_arguments([spec], [value[:, :4]], frozenset())


def test_answers_are_found_by_package_name_in_the_recorded_order() -> None:
    assert package_name("image", ["image"]) == "image_out"
    assert package_name("logits", ["image"]) == "logits"
    latent = TensorSpec(name="latent", dtype="float32", shape=(1, 2), layout="NC")
    answer = {"latent": np.zeros(2), "image_out": np.ones((3, 2, 4)), "classLabel": "x"}
    image, code = prediction_outputs([OUT, latent], answer, ["image"])
    assert image.shape == OUT.shape
    assert code.dtype == np.float32
    with pytest.raises(TensorError, match="logits"):
        prediction_outputs([latent, OUT], {"logits": np.zeros(2)}, ["image"])


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML exists on macOS")
def test_compute_units_anywhere_but_on_a_mac_are_refused(tmp_path: Path) -> None:
    from edge_runtime.runtimes.mil.device import DeviceModel

    with pytest.raises(BackendUnavailable, match="macOS"):
        DeviceModel(tmp_path, None, "CPU_AND_NE")  # type: ignore[arg-type]


def test_a_weight_is_known_again_though_its_smallest_numbers_moved() -> None:
    weight = np.array([[0.5, -0.25, 3e-6, -3e-6, 0.0]], np.float32)
    moved = np.array([[0.5, -0.25, 0.0, 0.0, -0.0]], np.float16)
    assert weight_key(weight) == weight_key(moved)
    assert weight_key(weight) != weight_key(weight * np.float32(1.01))


def _block(constants: dict[str, float], uses: list[tuple[str, str]], outputs: list[str]) -> Any:
    """Scalar constants by name, and for each pair an operator that takes both of them."""
    schema = load_schema("MIL_pb2")
    block = schema.Block(outputs=outputs)
    for name, value in constants.items():
        one = block.operations.add(type="const")
        one.outputs.add(name=name).type.tensorType.dataType = schema.DataType.FLOAT32
        one.attributes["name"].immediateValue.tensor.strings.values.append(name)
        one.attributes["val"].immediateValue.tensor.floats.values.append(value)
    for number, pair in enumerate(uses):
        one = block.operations.add(type="add")
        for key, name in zip("xy", pair, strict=True):
            one.inputs[key].arguments.add(name=name)
        one.outputs.add(name=f"sum{number}")
    return block


def test_equal_constants_are_stored_once_and_outputs_keep_their_names() -> None:
    block = _block(
        {"a": 1.0, "b": 2.0, "c": 1.0, "d": 1.0}, [("a", "b"), ("c", "d")], ["sum1", "d"]
    )
    assert share_constants(block) == 1
    assert [one.outputs[0].name for one in block.operations] == ["a", "b", "d", "sum0", "sum1"]
    taken = [[one.inputs[key].arguments[0].name for key in "xy"] for one in block.operations[-2:]]
    assert taken == [["a", "b"], ["a", "d"]]
    assert share_constants(block) == 0


def test_constants_of_a_program_with_inner_blocks_are_left_alone() -> None:
    block = _block({"a": 1.0, "b": 1.0}, [("a", "b")], ["sum0"])
    block.operations[-1].blocks.add()
    assert share_constants(block) == 0
    assert len(block.operations) == 3
