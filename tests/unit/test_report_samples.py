"""Samples of a proof: the right inputs are chosen, and pictures show what the answers say."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from converters.report.pictures import MAX_SIDE, class_color, encode_difference
from converters.report.records import Picture
from converters.report.samples import MAX_SAMPLES, choose_samples, render_input, render_sample
from edge_runtime.contract.preprocess import ResizeExact, named
from edge_runtime.contract.tasks import (
    ClassificationTask,
    GenerationTask,
    ImageToImageTask,
    SegmentationTask,
)
from edge_runtime.contract.tasks.detection import AnchorsRecord, DetectionTask

GRAY = np.full((64, 96, 3), 120, dtype=np.uint8)
RED = (230, 30, 50)
ANCHORS = np.array([[8, 8, 40, 40], [50, 10, 90, 50]], dtype=np.float32)
DETECTION = DetectionTask(
    classes=2, activation="sigmoid", anchors=AnchorsRecord(path="a.f32", count=2)
)


def pixels_of(picture: Picture | None) -> np.ndarray:
    assert picture is not None
    image = Image.open(io.BytesIO(picture.data))
    assert image.size == (picture.width, picture.height)
    assert image.get_format_mimetype() == picture.media_type
    return np.asarray(image.convert("RGB"))


def near(pixels: np.ndarray, color: tuple[int, int, int], tolerance: int = 40) -> np.ndarray:
    return np.asarray(np.abs(pixels.astype(int) - color).max(axis=2) <= tolerance)


# Which inputs ------------------------------------------------------------------------------


def test_each_variant_shows_its_worst_input_failed_ones_first() -> None:
    closeness = {
        "fp32": [130.0, 129.0, 99.0, 131.0],
        "int8": [30.0, 12.0, 31.0, 33.0],
        "fp16": [60.0, 61.0, 59.5, 44.0],
    }
    assert choose_samples(closeness, count=2) == [1, 3], "the least close variant first"
    assert choose_samples(closeness, failed=["fp32"], count=3) == [2, 1, 3]
    assert choose_samples(closeness, count=9) == [1, 3, 2, 0], "none twice, none beyond the end"
    assert choose_samples({}) == []
    assert choose_samples({"none": []}) == []
    assert len(choose_samples({"v": list(range(50))})) == MAX_SAMPLES  # type: ignore[dict-item]


def test_nan_is_the_worst_input_of_all() -> None:
    assert choose_samples({"v": [3.0, float("nan"), 1.0]}, count=1) == [1]


# Pictures ----------------------------------------------------------------------------------


def test_pictures_are_small_and_tiny_ones_exact() -> None:
    rng = np.random.default_rng(0)
    tiny = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(pixels_of(render_input(tiny)), tiny)
    long = render_input(rng.integers(0, 256, (20, 4000, 3), dtype=np.uint8))
    assert (long.width, long.height) == (MAX_SIDE, 1)
    photo = render_input(np.full((1000, 500, 3), 77, dtype=np.uint8))
    assert (photo.width, photo.height) == (MAX_SIDE // 2, MAX_SIDE)
    assert len(photo.data) < 4096


def test_a_blue_green_red_models_input_is_shown_in_true_colors() -> None:
    sky = np.zeros((16, 16, 3), dtype=np.uint8)
    sky[..., 0] = 200  # blue comes first
    assert tuple(pixels_of(render_input(sky, named("caffe", 16, 16)))[3, 3]) == (0, 0, 200)
    one = np.full((16, 16, 1), 90, dtype=np.uint8)
    assert tuple(pixels_of(render_input(one))[3, 3]) == (90, 90, 90)


# Classification ----------------------------------------------------------------------------


def test_the_three_best_labels_come_with_their_scores() -> None:
    task = ClassificationTask(classes=4)
    logits = np.log(np.array([[0.1, 0.6, 0.05, 0.25]], dtype=np.float32))
    shown = render_sample(task, ("a", "b", "c", "d"), GRAY, [logits])
    assert [(rank.label, round(rank.share, 3)) for rank in shown.ranked] == [
        ("b", 0.6), ("d", 0.25), ("a", 0.1),
    ]  # fmt: skip
    assert not shown.differs
    other = render_sample(task, ("a", "b", "c", "d"), GRAY, [logits[:, ::-1]], reference=[logits])
    assert other.differs
    assert other.sqnr_db is not None
    assert other.sqnr_db < 10


@pytest.mark.parametrize("bad", [[[np.nan, 1, 2, 3]], [[1, 2, 3]]])
def test_an_answer_without_sense_is_an_error_on_the_page(bad: list[list[float]]) -> None:
    task = ClassificationTask(classes=4)
    shown = render_sample(task, ("a", "b", "c", "d"), GRAY, [np.array(bad, dtype=np.float32)])
    assert shown.error
    assert shown.differs
    assert shown.ranked == ()


# Detection ---------------------------------------------------------------------------------


def heads(*logits: list[float]) -> list[np.ndarray]:
    return [np.full((1, 2, 4), 0.01, np.float32), np.array([logits], dtype=np.float32)]


def test_boxes_are_drawn_where_the_model_saw_them() -> None:
    shown = render_sample(DETECTION, ("cat", "dog"), GRAY, heads([4, -9], [-9, -9]), ANCHORS)
    assert shown.note == "1 box"
    picture = pixels_of(shown.picture)
    scale = picture.shape[1] / 96
    drawn = near(picture, class_color(0))
    assert drawn[round(40 * scale), round(20 * scale)], "the lower edge"
    assert not drawn[round(24 * scale), round(24 * scale)], "the middle stays free"
    assert not drawn[:, round(45 * scale) :].any(), "nothing where the other anchor lies"


def test_missing_and_extra_boxes_are_red_and_counted() -> None:
    exact = heads([4, -9], [-9, -9])
    same = render_sample(
        DETECTION, ("cat", "dog"), GRAY, heads([3, -9], [-9, -9]), ANCHORS, reference=exact
    )
    assert (same.note, same.differs) == ("1 box", False)
    assert not near(pixels_of(same.picture), RED).any()
    assert same.sqnr_db is not None
    other = render_sample(
        DETECTION, ("cat", "dog"), GRAY, heads([-9, -9], [-9, 4]), ANCHORS, reference=exact
    )
    assert other.note == "1 box, 1 missing, 1 extra"
    assert other.differs
    red = near(pixels_of(other.picture), RED)
    scale = red.shape[1] / 96
    assert red[round(40 * scale), round(8 * scale) : round(40 * scale)].any(), "dashed: missing"
    assert red[round(50 * scale) - 2 : round(50 * scale) + 2, round(60 * scale)].any(), (
        "solid: extra"
    )
    swapped = render_sample(
        DETECTION, ("cat", "dog"), GRAY, heads([-9, 4], [-9, -9]), ANCHORS, reference=exact
    )
    assert swapped.note == "1 box, 1 missing, 1 extra", "another class is another box"


def test_nms_in_the_graph_is_compared_by_its_boxes_alone() -> None:
    inside = [
        np.array([[[8, 8, 40, 40], [0, 0, 0, 0]]], np.float32),
        np.array([[0.98, 0.0]], np.float32),
        np.array([[0, 0]], np.float32),
    ]
    shown = render_sample(
        DETECTION, ("cat", "dog"), GRAY, inside, ANCHORS, reference=heads([4, -9], [-9, -9])
    )
    assert (shown.note, shown.differs, shown.sqnr_db) == ("1 box", False, None)


def test_hostile_boxes_and_labels_are_drawn_within_the_picture() -> None:
    inside = [
        np.array([[[-1e6, -5, 1e6, 1e6], [30, 30, 10, 10], [95.9, 63.9, 96, 64]]], np.float32),
        np.array([[0.9, 0.8, 0.7]], np.float32),
        np.array([[0, 1, 0]], np.float32),
    ]
    labels = ("\x1b[2J\n" + "W" * 300, "\u202e\U0001f600")
    shown = render_sample(DETECTION, labels, GRAY, inside, ANCHORS)
    assert not shown.error
    assert pixels_of(shown.picture).shape == (85, 128, 3)


# Segmentation ------------------------------------------------------------------------------


def scores(class_map: np.ndarray, classes: int = 3) -> list[np.ndarray]:
    planes = np.stack([class_map == index for index in range(classes)])
    return [planes[None].astype(np.float32)]


def test_classes_are_colored_background_stays_clear_and_shares_are_told() -> None:
    task = SegmentationTask(classes=3)
    areas = np.zeros((32, 48), dtype=np.int64)
    areas[:, 24:] = 2
    shown = render_sample(task, ("background", "cat", "dog"), GRAY, scores(areas))
    picture = pixels_of(shown.picture)
    assert near(picture, (120, 120, 120), 6)[:, :40].all()
    blend = tuple(round(0.4 * 120 + 0.6 * channel) for channel in class_color(2))
    assert near(picture, blend, 6)[:, 56:].all()  # type: ignore[arg-type]
    assert [(r.label, r.share, r.color is None) for r in shown.ranked] == [
        ("background", 0.5, True), ("dog", 0.5, False),
    ]  # fmt: skip


def test_one_pixel_of_another_class_is_told_and_marked() -> None:
    task = SegmentationTask(classes=3)
    exact = np.zeros((640, 640), dtype=np.int64)
    other = exact.copy()
    other[300, 300] = 1
    big = np.full((640, 640, 3), 120, dtype=np.uint8)
    shown = render_sample(task, ("a", "b", "c"), big, scores(other), reference=scores(exact))
    assert (shown.note, shown.differs) == ("1 pixel differs", True)
    assert near(pixels_of(shown.difference), RED, 90).any(), "no pixel gets lost by shrinking"
    same = render_sample(task, ("a", "b", "c"), big, scores(exact), reference=scores(exact))
    assert (same.note, same.differs, same.difference) == ("same classes", False, None)
    argmax = [other[None].astype(np.int32)]
    inside = render_sample(task, ("a", "b", "c"), big, argmax, reference=scores(exact))
    assert inside.note == shown.note
    assert inside.sqnr_db is None


# Images ------------------------------------------------------------------------------------


def test_an_image_comes_with_its_difference_made_visible() -> None:
    task = ImageToImageTask()
    exact = np.full((1, 3, 64, 64), 0.5, np.float32)
    other = exact.copy()
    other[:, :, 10:30, 10:30] += 4.2 / 255
    shown = render_sample(task, (), GRAY, [other], reference=[exact])
    picture, difference = pixels_of(shown.picture), pixels_of(shown.difference)
    assert tuple(picture[0, 0]) == (128, 128, 128)
    assert difference[20, 20, 0] == 4 * 32
    assert difference[50, 50, 0] == 0
    assert shown.note.endswith("difference x32"), "128 against 132; 4 * 64 would not fit"
    same = render_sample(task, (), GRAY, [exact], reference=[exact])
    assert (same.note, same.difference) == ("same pixels", None)


def test_a_generators_answer_needs_no_input_picture() -> None:
    task = GenerationTask(latent_size=4)
    shown = render_sample(task, (), None, [np.zeros((1, 1, 8, 8), np.float32)])
    assert tuple(pixels_of(shown.picture)[0, 0]) == (128, 128, 128)
    wrong = [np.zeros((1, 3, 9, 9), np.float32)]
    other = render_sample(task, (), None, wrong, reference=[np.zeros((1, 3, 8, 8), np.float32)])
    assert "[9, 9]" in other.error


def test_the_factor_of_a_difference_is_a_power_of_two_that_fits() -> None:
    base = np.zeros((8, 8, 3), dtype=np.uint8)
    for largest, factor in ((1, 128), (2, 64), (3, 64), (100, 2), (200, 1)):
        other = np.full_like(base, largest)
        assert encode_difference(base, other)[1] == factor
        assert encode_difference(other, base)[1] == factor


def test_the_record_that_made_the_pixels_does_not_move_boxes() -> None:
    """A squeezed or mirrored input is shown as the model saw it, boxes and all."""
    record = named("unit", 64, 96)
    mirrored = type(record)(
        resize=ResizeExact(height=64, width=96),
        flip_horizontal=True,
        normalization=record.normalization,
    )
    outputs = heads([4, -9], [-9, -9])
    plain = render_sample(DETECTION, ("cat", "dog"), GRAY, outputs, ANCHORS)
    assert (
        render_sample(DETECTION, ("cat", "dog"), GRAY, outputs, ANCHORS, record=mirrored) == plain
    )
