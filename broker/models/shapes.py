"""What tensors a servable of each task must record, and how large its answers can get."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from edge_runtime.contract import limits
from edge_runtime.contract.errors import ManifestError
from edge_runtime.contract.manifest import Servable
from edge_runtime.contract.tasks import (
    ClassificationTask,
    DetectionTask,
    GenerationTask,
    SegmentationTask,
)
from edge_runtime.contract.tensors import TensorSpec, canonical_shape

__all__ = ["answer_bytes", "check_tensors", "output_bytes"]

_ENVELOPE_BYTES: Final = 4096
"""Of an answer in JSON, its pictures and entries apart."""
_ENTRY_BYTES: Final = 256
"""Of one prediction or box, its label apart."""
_MAX_PICTURE_BYTES: Final = (limits.MAX_ANSWER_BYTES - _ENVELOPE_BYTES) * 3 // 4
"""A picture in base64 fits into what a device reads of one answer."""


def check_tensors(manifest: Servable) -> None:
    """Raise ``ManifestError`` unless inputs and outputs are those of the task."""
    model, task = manifest.model, manifest.task
    if len(model.inputs) != 1:
        raise ManifestError(
            "must record one input: export a model that takes one image, or one latent"
        )
    (taken,) = model.inputs
    if manifest.preprocess is None:
        if taken.dtype != "float32" or math.prod(taken.shape[1:]) != _latent_size(manifest):
            raise ManifestError(
                f"the input of a generator is a float32 latent of {_latent_size(manifest)} "
                f"numbers, got {taken.dtype}{list(taken.shape)}"
            )
    else:
        _check_image_input(taken, manifest.preprocess.size, manifest.preprocess.channels)
    if taken.shape[0] != 1 or any(spec.shape[:1] != (1,) for spec in model.outputs):
        raise ManifestError("inputs and outputs must be recorded with batch 1")
    shapes = [canonical_shape(spec) for spec in model.outputs]
    if isinstance(task, ClassificationTask):
        _require(len(shapes) == 1 and math.prod(shapes[0]) == task.classes,
                 f"one output of {task.classes} scores", shapes)  # fmt: skip
    elif isinstance(task, DetectionTask):
        count = task.anchors.count
        heads = [(1, count, 4), (1, count, task.logit_columns)]
        chosen = len(shapes) == 3 and math.prod(shapes[0]) == 4 * math.prod(shapes[1])
        _require(shapes == heads or chosen, f"outputs {heads}, or boxes, scores, classes", shapes)
    elif isinstance(task, SegmentationTask):
        first = shapes[0]
        scores = len(first) == 4 and first[1] == task.classes
        _require(scores or len(first) == 3, f"scores [1, {task.classes}, H, W]", shapes)
        _check_picture(first[-2], first[-1], channels=1)
    else:
        first = shapes[0]
        _require(len(first) == 4 and first[1] in (1, 3), "an image [1, 1 or 3, H, W]", shapes)
        _check_picture(first[2], first[3], channels=3)


def _latent_size(manifest: Servable) -> int:
    task = manifest.task
    assert isinstance(task, GenerationTask)  # noqa: S101  # Servable.check: it alone takes no image
    return task.latent_size


def _check_image_input(spec: TensorSpec, size: tuple[int, int], channels: int) -> None:
    wanted = (1, channels, *size) if spec.layout == "NCHW" else (1, *size, channels)
    if spec.layout not in ("NCHW", "NHWC") or spec.shape != wanted:
        raise ManifestError(
            f"the input is {spec.layout} {list(spec.shape)} and pre-processing gives "
            f"{size[0]} x {size[1]} x {channels}"
        )
    if spec.dtype not in ("float32", "uint8"):
        raise ManifestError(f"an image input is float32 or uint8, not {spec.dtype}")


def _require(holds: bool, wanted: str, shapes: Sequence[tuple[int, ...]]) -> None:
    if not holds:
        found = ", ".join(str(list(shape)) for shape in shapes)
        raise ManifestError(f"the task needs {wanted}; recorded: {found}")


def _picture_bytes(height: int, width: int, channels: int) -> int:
    """The most a PNG takes: deflate stores what it cannot compress, at a cost below 1 in 64."""
    pixels = height * width * channels
    return pixels + pixels // 64 + height


def _check_picture(height: int, width: int, channels: int) -> None:
    size_bytes = _picture_bytes(height, width, channels)
    if size_bytes > _MAX_PICTURE_BYTES or max(height, width) > limits.MAX_IMAGE_SIDE:
        raise ManifestError(
            f"an answer of {width} x {height} pixels can take {size_bytes} bytes, more than "
            f"{_MAX_PICTURE_BYTES}: export the model for a smaller input"
        )


def answer_bytes(manifest: Servable, label_bytes: Sequence[int]) -> int:
    """The most that one encoded answer can take.

    ``label_bytes``: sizes of the longest labels, longest first.
    """
    task = manifest.task
    if isinstance(task, ClassificationTask):
        count = min(task.classes, limits.MAX_TOP_K)
        return _ENVELOPE_BYTES + count * _ENTRY_BYTES + sum(label_bytes[:count])
    if isinstance(task, DetectionTask):
        longest = label_bytes[0] if label_bytes else 0
        return _ENVELOPE_BYTES + task.max_boxes * (_ENTRY_BYTES + longest)
    shape = canonical_shape(manifest.model.outputs[0])
    channels = 1 if isinstance(task, SegmentationTask) else 3
    return _ENVELOPE_BYTES + _picture_bytes(shape[-2], shape[-1], channels)


def output_bytes(manifest: Servable) -> int:
    """Bytes of one request's outputs as float32."""
    return sum(4 * math.prod(spec.shape) for spec in manifest.model.outputs)
