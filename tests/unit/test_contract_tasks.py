"""Post-processing of every task against its definition, and against torchvision's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edge_runtime.contract.errors import ConfigError, TensorError
from edge_runtime.contract.geometry import Geometry, geometry_of
from edge_runtime.contract.preprocess import (
    CenterCrop,
    Normalization,
    Preprocess,
    ResizeExact,
    ResizeShorterSide,
    apply_uint8,
)
from edge_runtime.contract.tasks import DetectionTask, ImageToImageTask, SegmentationTask
from edge_runtime.contract.tasks.answer import answer
from edge_runtime.contract.tasks.detection import (
    AnchorsRecord,
    Candidates,
    candidates,
    decode_boxes,
    postprocess,
    suppress,
)
from edge_runtime.contract.tasks.generation import latent_from_seed
from edge_runtime.contract.tasks.pixels import to_pixels
from edge_runtime.contract.tasks.segmentation import class_map

UNIT = Normalization(scale=255.0, mean=(0.0,) * 3, std=(1.0,) * 3)
SAME = Geometry(
    scale_x=1, scale_y=1, offset_x=0, offset_y=0, input_width=64, flipped=False, width=64, height=48
)


def detector(count: int = 4, **changes: object) -> DetectionTask:
    values: dict[str, object] = {"classes": 3, "activation": "sigmoid"} | changes
    return DetectionTask(anchors=AnchorsRecord(path="a", count=count), **values)  # type: ignore[arg-type]


def boxes_of(count: int) -> st.SearchStrategy[np.ndarray]:
    """Corner boxes on a grid: sums and products of their sides are exact in float32."""
    edge = st.integers(0, 40)
    side = st.integers(1, 24)
    one = st.tuples(edge, edge, side, side).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
    return st.lists(one, min_size=count, max_size=count).map(
        lambda rows: np.array(rows, dtype=np.float32).reshape(-1, 4)
    )


# Detection ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deltas", "logits", "anchors"),
    [
        ((1, 4, 4), (1, 4, 2), (4, 4)),
        ((1, 3, 4), (1, 4, 3), (4, 4)),
        ((1, 4, 4), (1, 4, 3), (3, 4)),
        ((1, 4, 5), (1, 4, 3), (4, 4)),
    ],
)
def test_heads_of_another_shape_are_refused(
    deltas: tuple[int, ...], logits: tuple[int, ...], anchors: tuple[int, ...]
) -> None:
    with pytest.raises(TensorError, match="detection needs"):
        candidates(
            detector(),
            np.ones(anchors, np.float32),
            [np.zeros(deltas, np.float32), np.zeros(logits, np.float32)],
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("head", [0, 1])
def test_a_detector_that_answers_nan_or_infinity_is_refused(bad: float, head: int) -> None:
    outputs = [np.zeros((1, 4, 4), np.float32), np.zeros((1, 4, 3), np.float32)]
    outputs[head][0, 2, 1] = bad
    with pytest.raises(TensorError, match="NaN"):
        candidates(detector(), np.ones((4, 4), np.float32), outputs)


def test_one_output_or_heads_without_anchors_are_refused() -> None:
    heads = [np.zeros((1, 4, 4), np.float32), np.zeros((1, 4, 3), np.float32)]
    with pytest.raises(TensorError, match="anchors"):
        postprocess(detector(), heads, None, ("a", "b", "c"), SAME)
    with pytest.raises(TensorError, match="1 outputs"):
        postprocess(detector(), heads[:1], np.ones((4, 4), np.float32), ("a", "b", "c"), SAME)
    with pytest.raises(ConfigError, match="geometry"):
        answer(detector(), heads, labels=("a", "b", "c"), anchors=np.ones((4, 4), np.float32))


@pytest.mark.parametrize("index", [-1.0, 3.0])
def test_a_class_without_a_label_is_refused(index: float) -> None:
    outputs = [
        np.array([[[0, 0, 9, 9]]], np.float32),
        np.array([[0.9]], np.float32),
        np.array([[index]], np.float32),
    ]
    with pytest.raises(TensorError, match="no label"):
        postprocess(detector(), outputs, None, ("a", "b", "c"), SAME)


@settings(deadline=None)
@given(
    anchors=boxes_of(5),
    deltas=arrays(np.float32, (5, 4), elements=st.floats(-12, 60, width=32)),
    weights=st.sampled_from([(10.0, 10.0, 5.0, 5.0), (1.0, 1.0, 1.0, 1.0)]),
)
def test_boxes_are_decoded_as_torchvisions_box_coder_does(
    anchors: np.ndarray, deltas: np.ndarray, weights: tuple[float, float, float, float]
) -> None:
    import torch
    from torchvision.models.detection._utils import BoxCoder

    coder = BoxCoder(weights)
    expected = coder.decode_single(torch.from_numpy(deltas), torch.from_numpy(anchors)).numpy()
    got = decode_boxes(detector(5, box_weights=weights), anchors, deltas)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-3)


@settings(deadline=None)
@given(
    boxes=boxes_of(12),
    scores=st.lists(st.sampled_from([0.3, 0.5, 0.6, 0.7, 0.9]), min_size=12, max_size=12),
    classes=st.lists(st.integers(0, 2), min_size=12, max_size=12),
    # Powers of two: 3 / 10 is 0.3 in no binary arithmetic.
    iou_threshold=st.sampled_from([0.25, 0.5, 0.75]),
)
def test_suppression_keeps_what_torchvisions_batched_nms_keeps(
    boxes: np.ndarray, scores: list[float], classes: list[int], iou_threshold: float
) -> None:
    import torch
    from torchvision.ops import batched_nms

    order = np.argsort(-np.array(scores), kind="stable")
    found = Candidates(
        boxes=boxes[order],
        scores=np.array(scores, np.float32)[order],
        classes=np.array(classes)[order],
    )
    kept = suppress(detector(iou_threshold=iou_threshold), found)
    expected = batched_nms(
        torch.from_numpy(found.boxes),
        torch.from_numpy(found.scores),
        torch.from_numpy(found.classes),
        iou_threshold,
    ).numpy()
    assert sorted(kept) == sorted(expected)
    assert (np.diff(found.scores[kept]) <= 0).all()


@settings(deadline=None)
@given(
    logits=arrays(np.float32, (6, 4), elements=st.floats(-8, 8, width=32)),
    most=st.integers(1, 20),
)
def test_candidates_are_the_best_pairs_and_softmax_has_a_background(
    logits: np.ndarray, most: int
) -> None:
    import torch

    task = detector(6, activation="softmax", candidates=most, score_threshold=0.2)
    anchors = np.array([[0, 0, 4, 4]] * 6, np.float32)
    found = candidates(task, anchors, [np.zeros((1, 6, 4), np.float32), logits[None]])
    scores = torch.softmax(torch.from_numpy(logits).double(), dim=1)[:, 1:].flatten().numpy()
    expected = np.sort(scores[scores > 0.2 + 1e-6])[::-1][:most]
    sure = found.scores[found.scores > 0.2 + 1e-6]
    np.testing.assert_allclose(sure, expected, atol=1e-6)
    assert ((found.classes >= 0) & (found.classes < 3)).all()


def test_two_boxes_of_one_object_become_one_and_other_classes_stay() -> None:
    anchors = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 10], [30, 30, 40, 40]])
    logits = np.full((1, 4, 3), -9.0, np.float32)
    logits[0, 0, 1], logits[0, 1, 1], logits[0, 2, 2], logits[0, 3, 1] = 3.0, 2.0, 1.0, 0.5
    given_ = postprocess(
        detector(),
        [np.zeros((1, 4, 4), np.float32), logits],
        anchors.astype(np.float32),
        ("a", "b", "c"),
        SAME,
    )
    assert [(box.label, box.x_min, box.x_max) for box in given_] == [
        ("b", 0.0, 10.0),
        ("c", 0.0, 10.0),
        ("b", 30.0, 40.0),
    ]


def test_an_end_in_the_graph_gives_the_boxes_that_were_not_suppressed() -> None:
    outputs = [
        np.array([[[1, 2, 30, 40], [0, 0, 9, 9], [5, 5, 6, 6]]], np.float32),
        np.array([[0.9, 0.24, 0.0]], np.float32),
        np.array([[2.0, 1.0, 0.0]], np.float32),
    ]
    (box,) = postprocess(detector(), outputs, None, ("a", "b", "c"), SAME)
    assert (box.index, box.label, box.score) == (2, "c", pytest.approx(0.9))
    assert (box.x_min, box.y_min, box.x_max, box.y_max) == (1.0, 2.0, 30.0, 40.0)


# Geometry -------------------------------------------------------------------------------

records = st.one_of(
    st.builds(
        lambda height, width, flip: Preprocess(
            resize=ResizeExact(height=height, width=width), flip_horizontal=flip, normalization=UNIT
        ),
        st.integers(8, 96),
        st.integers(8, 96),
        st.booleans(),
    ),
    st.builds(
        lambda size, height, width, flip: Preprocess(
            resize=ResizeShorterSide(size=size),
            crop=CenterCrop(height=min(height, size), width=min(width, size)),
            flip_horizontal=flip,
            normalization=UNIT,
        ),
        st.integers(16, 96),
        st.integers(8, 96),
        st.integers(8, 96),
        st.booleans(),
    ),
)


@given(records, st.integers(8, 400), st.integers(8, 400), st.floats(0, 1), st.floats(0, 1))
def test_a_point_of_the_input_comes_from_where_pre_processing_took_it(
    record: Preprocess, height: int, width: int, right: float, down: float
) -> None:
    geometry = geometry_of(record, height, width)
    in_height, in_width = record.size
    x, y = right * in_width, down * in_height
    ((x_original, y_original, _, _),) = geometry.boxes_to_original(np.array([[x, y, x, y]]))
    # Forward again, as docs/preprocessing.md says it: resize, crop, flip.
    if isinstance(record.resize, ResizeExact):
        resized = (record.resize.height, record.resize.width)
    elif height <= width:
        resized = (record.resize.size, record.resize.size * width // height)
    else:
        resized = (record.resize.size * height // width, record.resize.size)
    top = left = 0
    if record.crop is not None:
        top = round((resized[0] - record.crop.height) / 2)
        left = round((resized[1] - record.crop.width) / 2)
    x_again = x_original * resized[1] / width - left
    if record.flip_horizontal:
        x_again = in_width - x_again
    assert x_again == pytest.approx(x, abs=1e-6)
    assert y_original * resized[0] / height - top == pytest.approx(y, abs=1e-6)
    assert 0 <= x_original <= width
    assert 0 <= y_original <= height


@settings(deadline=None)
@given(records, st.integers(60, 300), st.integers(60, 300), st.data())
def test_a_bright_block_is_found_where_it_is_in_the_photo(
    record: Preprocess, height: int, width: int, data: st.DataObject
) -> None:
    geometry = geometry_of(record, height, width)
    in_height, in_width = record.size
    seen = geometry.boxes_to_original(np.array([[0, 0, in_width, in_height]]))[0]
    # A block in the middle third of what the model sees.
    x_min = int(seen[0] + (seen[2] - seen[0]) * data.draw(st.floats(0.3, 0.4)))
    x_max = int(np.ceil(seen[0] + (seen[2] - seen[0]) * data.draw(st.floats(0.6, 0.7))))
    y_min = int(seen[1] + (seen[3] - seen[1]) * data.draw(st.floats(0.3, 0.4)))
    y_max = int(np.ceil(seen[1] + (seen[3] - seen[1]) * data.draw(st.floats(0.6, 0.7))))
    photo = np.zeros((height, width, 3), np.uint8)
    photo[y_min:y_max, x_min:x_max] = 255
    rows, columns = np.nonzero(apply_uint8(record, photo)[:, :, 0] > 127)
    box = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]])
    found = geometry.boxes_to_original(box)[0]
    # A block's edge may fall anywhere into an input pixel.
    reach_x, reach_y = 1 / geometry.scale_x + 1e-6, 1 / geometry.scale_y + 1e-6
    assert abs(found[0] - x_min) <= reach_x
    assert abs(found[2] - x_max) <= reach_x
    assert abs(found[1] - y_min) <= reach_y
    assert abs(found[3] - y_max) <= reach_y


def test_boxes_are_cut_at_the_edges_of_the_photo() -> None:
    record = Preprocess(resize=ResizeExact(height=10, width=10), normalization=UNIT)
    geometry = geometry_of(record, 50, 100)
    cut = geometry.boxes_to_original(np.array([[-3.0, -3.0, 5.0, 99.0]]))
    assert cut.tolist() == [[0.0, 0.0, 50.0, 50.0]]


# Segmentation ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 3, 4, 5), np.float32),
        ((2, 4, 5), np.int32),
        ((1, 4, 5), np.float32),
        ((4, 5), np.int32),
    ],
)
def test_a_segmentation_of_another_shape_is_refused(
    shape: tuple[int, ...], dtype: type[np.generic]
) -> None:
    with pytest.raises(TensorError, match="segmentation needs"):
        class_map(SegmentationTask(classes=4), np.zeros(shape, dtype))


@pytest.mark.parametrize("index", [-1, 4, 255, 256])
def test_a_class_that_the_task_does_not_have_is_refused(index: int) -> None:
    plane = np.zeros((1, 2, 3), np.int32)
    plane[0, 1, 1] = index
    with pytest.raises(TensorError, match="outside 0 to 3"):
        class_map(SegmentationTask(classes=4), plane)


def test_a_segmentation_that_answers_nan_is_refused() -> None:
    scores = np.zeros((1, 4, 2, 3), np.float32)
    scores[0, 0, 1, 2] = np.nan
    with pytest.raises(TensorError, match="NaN"):
        class_map(SegmentationTask(classes=4), scores)


@given(arrays(np.int8, (1, 5, 3, 4), elements=st.integers(-2, 2)))
def test_the_first_of_equal_scores_wins_and_an_argmax_in_the_graph_agrees(
    scores: np.ndarray,
) -> None:
    task = SegmentationTask(classes=5)
    got = class_map(task, scores.astype(np.float32))
    assert got.dtype == np.uint8
    for y in range(3):
        for x in range(4):
            column = scores[0, :, y, x].tolist()
            assert got[y, x] == column.index(max(column))
    np.testing.assert_array_equal(class_map(task, got[None].astype(np.int32)), got)


# Images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5), (1, 2, 4, 5), (1, 4, 4, 5)])
def test_an_image_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TensorError, match="an image output is"):
        to_pixels(np.zeros(shape, np.float32), 1.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_image_with_nan_is_refused(bad: float) -> None:
    output = np.zeros((1, 3, 2, 2), np.float32)
    output[0, 1, 1, 0] = bad
    with pytest.raises(TensorError, match="NaN"):
        to_pixels(output, 1.0, 0.0)


def test_pixels_are_rounded_half_to_even_and_cut_at_both_ends() -> None:
    values = np.array([-9.0, 0.5, 1.5, 2.5, 254.5, 255.4, 300.0], np.float32)
    pixels = to_pixels(values.reshape(1, 1, 1, 7), 1.0, 0.0)
    assert pixels.shape == (1, 7, 3)
    assert pixels[0, :, 0].tolist() == [0, 0, 2, 2, 254, 255, 255]
    assert (pixels[:, :, 0] == pixels[:, :, 2]).all()


@given(arrays(np.uint8, (4, 5, 3)), st.sampled_from([(255.0, 0.0), (127.5, 127.5), (1.0, 0.0)]))
def test_every_pixel_survives_its_own_scale(pixels: np.ndarray, line: tuple[float, float]) -> None:
    scale, offset = line
    values = ((pixels.astype(np.float64) - offset) / scale).astype(np.float32)
    np.testing.assert_array_equal(to_pixels(values.transpose(2, 0, 1)[None], scale, offset), pixels)


def test_an_answer_takes_the_first_output_and_the_tasks_scale() -> None:
    given_ = answer(
        ImageToImageTask(output_scale=1.0, output_offset=10.0),
        [np.full((1, 3, 2, 2), 5.0, np.float16), np.zeros((1, 7), np.float32)],
    )
    assert given_.image is not None
    assert (given_.image == 15).all()
    with pytest.raises(TensorError, match="nothing"):
        answer(ImageToImageTask(), [])


# Generation -----------------------------------------------------------------------------

SPLITMIX64_OF_1234567 = (6457827717110365317, 3203168211198807973, 9817491932198370423,
                         4593380528125082431)  # fmt: skip
"""Published outputs of SplitMix64 (Vigna's splitmix64.c, seed 1234567)."""


def test_the_latent_is_box_muller_over_splitmix64() -> None:
    uniform = [((value >> 11) + 0.5) / 2**53 for value in SPLITMIX64_OF_1234567]
    expected = []
    for first, second in (uniform[:2], uniform[2:]):
        radius = math.sqrt(-2 * math.log(first))
        angle = 2 * math.pi * second
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    got = latent_from_seed(1234567, 4)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.array(expected, np.float32))


def test_the_latent_of_seed_7_is_pinned() -> None:
    expected = np.array([1.3649923, 0.14452122, -0.39652398, -0.22759631, 0.004498526], np.float32)
    np.testing.assert_allclose(latent_from_seed(7, 5), expected, rtol=2e-7)


@given(st.integers(0, 2**53 - 1), st.integers(1, 40), st.integers(1, 40))
def test_one_seed_is_one_latent_and_a_longer_one_begins_alike(
    seed: int, count: int, more: int
) -> None:
    short, long = latent_from_seed(seed, count), latent_from_seed(seed, count + more)
    np.testing.assert_array_equal(short, long[:count])
    assert np.isfinite(long).all()
    assert not np.array_equal(latent_from_seed(seed + 1, count), short)
    np.testing.assert_array_equal(latent_from_seed(seed - 2**64, count), short)


@pytest.mark.parametrize("seed", [0, 1, 2**53 - 1])
def test_a_latent_is_standard_normal(seed: int) -> None:
    values = latent_from_seed(seed, 20_000).astype(np.float64)
    # Four standard errors of mean, variance and kurtosis of 20000 normals.
    assert abs(values.mean()) < 4 * math.sqrt(1 / 20_000)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / 20_000)
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / 20_000)
    assert abs(np.corrcoef(values[::2], values[1::2])[0, 1]) < 4 * math.sqrt(1 / 10_000)
