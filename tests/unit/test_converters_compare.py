"""Each task's figures, exact on answers made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from converters.verify.compare import Comparison
from converters.verify.gates import check_gate, default_gates
from converters.verify.metrics import psnr_db, ssim
from edge_runtime.contract.errors import TensorError
from edge_runtime.contract.tasks import (
    DetectionTask,
    ImageToImageTask,
    ReconstructionTask,
    SegmentationTask,
)
from edge_runtime.contract.tasks.detection import AnchorsRecord

RNG = np.random.default_rng(0)


def _detector(count: int) -> tuple[DetectionTask, np.ndarray]:
    """Anchors 10 x 10 in a row, far apart; two classes."""
    left = np.arange(count, dtype=np.float32) * 40
    anchors = np.stack([left, np.zeros(count), left + 10, np.full(count, 10)], axis=1)
    task = DetectionTask(
        classes=2,
        activation="sigmoid",
        anchors=AnchorsRecord(path="anchors.f32", count=count),
        score_threshold=0.5,
    )
    return task, anchors.astype(np.float32)


def _heads(count: int, found: dict[int, int]) -> list[np.ndarray]:
    logits = np.full((1, count, 2), -8.0, np.float32)
    for anchor, label in found.items():
        logits[0, anchor, label] = 4.0
    return [np.zeros((1, count, 4), np.float32), logits]


def test_boxes_found_again_are_recall_and_average_precision() -> None:
    task, anchors = _detector(5)
    comparison = Comparison(task, anchors)
    comparison.add(_heads(5, {0: 0, 2: 1}), _heads(5, {0: 0, 2: 1}))
    assert comparison.result().agreement == 1.0
    assert comparison.result().metrics["map"] == 1.0
    comparison.add(_heads(5, {1: 0, 3: 0}), _heads(5, {1: 0, 4: 0}))
    figures = comparison.result()
    assert (figures.compared, figures.disagreements, figures.agreement) == (4, 1, 0.75)
    assert figures.metrics["map"] == pytest.approx((2 / 3 + 1.0) / 2, abs=0.12)


def test_box_of_another_class_or_place_is_not_found() -> None:
    task, anchors = _detector(3)
    comparison = Comparison(task, anchors)
    comparison.add(_heads(3, {0: 0}), _heads(3, {0: 1}))
    comparison.add(_heads(3, {0: 0}), _heads(3, {1: 0}))
    assert comparison.result().agreement == 0.0
    assert comparison.result().metrics["map"] == 0.0


def test_boxes_from_nms_in_the_graph_are_compared_with_the_heads() -> None:
    task, anchors = _detector(3)
    comparison = Comparison(task, anchors)
    boxes = np.array([[[0, 0, 10, 10], [40, 0, 50, 10]]], np.float32)
    answer = [boxes, np.array([[0.98, 0.0]], np.float32), np.array([[1.0, 0.0]], np.float32)]
    comparison.add(_heads(3, {0: 1}), answer)
    figures = comparison.result()
    assert figures.agreement == 1.0
    assert figures.sqnr_db_mean is None


def test_no_boxes_at_all_prove_nothing_and_fail_nothing() -> None:
    task, anchors = _detector(3)
    comparison = Comparison(task, anchors)
    comparison.add(_heads(3, {}), _heads(3, {}))
    figures = comparison.result()
    assert figures.agreement is None
    assert check_gate(default_gates("detection")["fp32"], "fp32", figures, 1.0, None) == []


def test_pixels_and_iou_of_a_mask_are_exact() -> None:
    task = SegmentationTask(classes=3)
    exact = np.zeros((1, 3, 2, 2), np.float32)
    exact[0, 0] = 1.0
    other = exact.copy()
    other[0, 1, 0, 0] = 2.0
    comparison = Comparison(task)
    comparison.add([exact], [other])
    figures = comparison.result()
    assert (figures.agreement, figures.disagreements, figures.compared) == (0.75, 1, 4)
    assert figures.metrics["miou"] == pytest.approx((3 / 4 + 0 / 1) / 2)
    plain = Comparison(task)
    plain.add([exact], [np.zeros((1, 2, 2), np.int32)])
    assert plain.result().agreement == 1.0
    assert plain.result().sqnr_db_mean is None, "classes are no scores"


def test_transposed_mask_of_another_size_is_an_error() -> None:
    task = SegmentationTask(classes=2)
    comparison = Comparison(task)
    exact = np.zeros((1, 2, 3, 4), np.float32)
    with pytest.raises(TensorError, match=r"\[4, 3\]"):
        comparison.add([exact], [exact.transpose(0, 1, 3, 2)])


def test_images_are_judged_by_psnr_and_ssim_of_their_pixels() -> None:
    task = ImageToImageTask(output_scale=255.0)
    exact = RNG.uniform(0.2, 0.8, (1, 3, 16, 16)).astype(np.float32)
    comparison = Comparison(task)
    comparison.add([exact], [exact + 2 / 255])
    figures = comparison.result()
    assert figures.agreement is None
    assert figures.metrics["psnr_db"] == pytest.approx(20 * np.log10(255 / 2), abs=0.2)
    assert figures.metrics["ssim"] > 0.99
    blank = Comparison(task)
    blank.add([exact], [np.full_like(exact, 0.5)])
    names = [
        f.name
        for f in check_gate(default_gates("image_to_image")["int8"], "int8", blank.result(), 0.3, 1)
    ]
    assert "parity" in names


def test_second_output_counts_as_much_as_the_first() -> None:
    task = ReconstructionTask(latent_size=4)
    image, latent = np.ones((1, 1, 4, 4), np.float32), np.ones((1, 4), np.float32)
    comparison = Comparison(task)
    comparison.add([image, latent], [image, -latent])
    assert comparison.result().sqnr_db_min == pytest.approx(-6.02, abs=0.01)


def test_psnr_and_ssim_of_known_images() -> None:
    image = RNG.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert psnr_db(image, image) == 200.0
    assert psnr_db(np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)) == 0.0
    assert ssim(image, image) == pytest.approx(1.0)
    assert ssim(image, 255 - image) < 0.0
