"""Object detection: one image in, labeled boxes out (types only so far)."""

from __future__ import annotations

from typing import Annotated

import msgspec

from edge_runtime.contract import limits

__all__ = ["Box", "DetectionTask"]

Unit = Annotated[float, msgspec.Meta(ge=0, le=1)]


class DetectionTask(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="detection"
):
    """Boxes that score at least ``score_threshold`` after non-maximum suppression."""

    classes: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_LABELS)]
    score_threshold: Unit = 0.25
    iou_threshold: Unit = 0.5
    max_boxes: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100


class Box(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One object; corners in pixels of the upright original image."""

    index: int
    label: str
    score: float
    x_min: float
    y_min: float
    x_max: float
    y_max: float
