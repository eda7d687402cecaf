"""Semantic segmentation: one image in, one class per pixel out (types only so far)."""

from __future__ import annotations

from typing import Annotated

import msgspec

from edge_runtime.contract import limits

__all__ = ["SegmentationTask"]


class SegmentationTask(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="segmentation"
):
    """``argmax_in_graph``: the model gives class indices, not one score plane a class."""

    classes: Annotated[int, msgspec.Meta(ge=2, le=limits.MAX_LABELS)]
    argmax_in_graph: bool = False
