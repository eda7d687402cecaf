"""Pictures for people: where the ink goes, and that no label breaks them."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.contract.answer_codec import class_colors
from edge_runtime.contract.tasks import Box
from edge_runtime.drawing import draw_boxes, overlay_classes

GRAY = np.full((120, 200, 3), 100, np.uint8)


def box(**changes: object) -> Box:
    values: dict[str, object] = {
        "index": 0, "label": "car", "score": 0.9,
        "x_min": 40.0, "y_min": 50.0, "x_max": 160.0, "y_max": 100.0,
    }  # fmt: skip
    return Box(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "label", ["", "\n\x1b[31m", "\u732b", "\U0001f600", "a" * 256, "caf\u00e9", "\ud800"]
)
def test_any_label_can_be_drawn(label: str) -> None:
    drawn = draw_boxes(GRAY, [box(label=label)])
    assert drawn.shape == GRAY.shape
    assert (drawn != GRAY).any()


@pytest.mark.parametrize(
    "edges",
    [
        {"x_min": 0.0, "y_min": 0.0, "x_max": 200.0, "y_max": 120.0},
        {"x_min": 50.0, "x_max": 50.0, "y_min": 60.0, "y_max": 60.0},
        {"x_min": 199.9, "x_max": 200.0},
    ],
)
def test_boxes_at_the_edges_and_without_an_area_can_be_drawn(edges: dict[str, float]) -> None:
    assert draw_boxes(GRAY, [box(**edges)]).shape == GRAY.shape


def test_a_box_is_its_outline_in_the_color_of_its_class_and_leaves_the_rest() -> None:
    drawn = draw_boxes(GRAY, [box(index=4)])
    color = class_colors()[5]
    assert (drawn[75, 40] == color).all()
    assert (drawn[75, 160] == color).all()
    assert (drawn[100, 100] == color).all()
    assert (drawn[60:95, 50:150] == 100).all()  # inside
    assert (drawn[103:] == 100).all()
    assert (GRAY == 100).all()  # the photo itself is not written into
    np.testing.assert_array_equal(draw_boxes(GRAY, []), GRAY)


def test_the_best_box_lies_on_top() -> None:
    drawn = draw_boxes(GRAY, [box(index=1), box(index=2, score=0.1)])
    assert (drawn[75, 40] == class_colors()[2]).all()


def test_classes_color_half_of_the_photo_and_spare_what_is_background_or_unknown() -> None:
    class_map = np.zeros((120, 200), np.uint8)
    class_map[:60, :100], class_map[:60, 100:] = 2, 255
    mixed = overlay_classes(GRAY, class_map)
    half = np.rint(0.5 * 100 + 0.5 * class_colors()[2])
    assert (mixed[:60, :100] == half).all()
    assert (mixed[:60, 100:] == 100).all()
    assert (mixed[60:] == 100).all()
