"""How far two versions agree on one request."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from broker.executors.base import TensorAnswer
from broker.models.servable import OpenedServable
from edge_runtime.contract.tasks import Box, Prediction
from edge_runtime.contract.wire import EncodedAnswer, Picture

__all__ = ["Agreement", "agreement"]

_SAME_OBJECT_IOU: Final = 0.5
"""As in PASCAL VOC (Everingham et al., 2010)."""
_MASK_MAY_DIFFER: Final = 0.01
_PIXEL_MAY_DIFFER: Final = 8 / 255
_TENSOR_MAY_DIFFER: Final = 0.01


class Agreement(NamedTuple):
    """Whether two answers say the same, and how far apart they are: 0 is not at all."""

    agree: bool
    difference: float


def agreement(
    servable: OpenedServable,
    outputs: Sequence[int],
    one: EncodedAnswer | TensorAnswer,
    other: EncodedAnswer | TensorAnswer,
) -> Agreement:
    """``one`` against ``other``; tensors are the ``outputs`` of ``servable``, by their places.

    Classification agrees in the first class, and differs in its score; detection agrees where the
    best boxes name one class and overlap by half, and differs by 1 - IoU; masks agree in 99 of 100
    pixels, and differ in the share of the others; images and tensors differ in the largest
    absolute difference (of pixels in [0, 1], of numbers), and agree up to 8/255 and up to a
    hundredth of the largest number.
    """
    if isinstance(one, TensorAnswer) and isinstance(other, TensorAnswer):
        if one.tensors:
            return _tensors(servable, outputs, one, other)
        assert one.answer is not None  # noqa: S101  # one of the two was asked for
        assert other.answer is not None  # noqa: S101
        one, other = one.answer, other.answer
    if isinstance(one, TensorAnswer) or isinstance(other, TensorAnswer):
        return Agreement(False, 1.0)  # another kind of answer than was asked for
    if one.predictions is not None and other.predictions is not None:
        return _classes(one.predictions, other.predictions)
    if one.boxes is not None and other.boxes is not None:
        return _boxes(one.boxes, other.boxes)
    if one.mask is not None and other.mask is not None:
        return _pictures(one.mask, other.mask, classes=True)
    if one.image is not None and other.image is not None:
        return _pictures(one.image, other.image, classes=False)
    return Agreement(False, 1.0)


def _classes(one: tuple[Prediction, ...], other: tuple[Prediction, ...]) -> Agreement:
    best = one[0]
    score = next((same.score for same in other if same.index == best.index), 0.0)
    return Agreement(best.index == other[0].index, abs(best.score - score))


def _boxes(one: tuple[Box, ...], other: tuple[Box, ...]) -> Agreement:
    if not one or not other:
        return Agreement(not one and not other, 0.0 if not one and not other else 1.0)
    overlap = _iou(one[0], other[0])
    same = one[0].index == other[0].index and overlap >= _SAME_OBJECT_IOU
    return Agreement(same, 1.0 - overlap)


def _iou(one: Box, other: Box) -> float:
    width = min(one.x_max, other.x_max) - max(one.x_min, other.x_min)
    height = min(one.y_max, other.y_max) - max(one.y_min, other.y_min)
    common = max(width, 0.0) * max(height, 0.0)
    areas = sum((box.x_max - box.x_min) * (box.y_max - box.y_min) for box in (one, other))
    return common / (areas - common) if areas > common else 0.0


def _pictures(one: Picture, other: Picture, *, classes: bool) -> Agreement:
    mine, others = _pixels(one), _pixels(other)
    if mine.shape != others.shape:
        return Agreement(False, 1.0)
    if classes:
        share = float(np.mean(mine != others))
        return Agreement(share <= _MASK_MAY_DIFFER, share)
    largest = float(np.abs(mine.astype(np.int16) - others).max()) / 255
    return Agreement(largest <= _PIXEL_MAY_DIFFER, largest)


def _pixels(picture: Picture) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(picture.data)) as image:
        return np.asarray(image, dtype=np.uint8)


def _tensors(
    servable: OpenedServable, outputs: Sequence[int], one: TensorAnswer, other: TensorAnswer
) -> Agreement:
    specs = servable.manifest.model.outputs
    largest = scale = 0.0
    for place, mine, others in zip(outputs, one.tensors, other.tensors, strict=True):
        dtype = np.dtype(specs[place].dtype).newbyteorder("<")
        numbers = np.frombuffer(mine, dtype=dtype).astype(np.float64)
        with np.errstate(invalid="ignore"):
            apart = np.abs(numbers - np.frombuffer(others, dtype=dtype).astype(np.float64))
        if not np.isfinite(apart).all():
            return Agreement(False, 1.0)
        largest = max(largest, float(apart.max(initial=0.0)))
        scale = max(scale, float(np.abs(numbers).max(initial=0.0)))
    return Agreement(largest <= _TENSOR_MAY_DIFFER * scale, largest)
