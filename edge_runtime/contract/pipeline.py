"""One request from its image or seed to a model's input, and from its outputs to an answer.

The device and the broker both go this way, so that they differ in the model alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract import limits, preprocess
from edge_runtime.contract.files import read_bounded
from edge_runtime.contract.geometry import Geometry, geometry_of
from edge_runtime.contract.preprocess import Preprocess
from edge_runtime.contract.tasks import DetectionTask, Task
from edge_runtime.contract.tasks.answer import Answer, answer
from edge_runtime.contract.tasks.generation import latent_from_seed
from edge_runtime.contract.tensors import TensorSpec, from_little_endian, pack_image

__all__ = [
    "Prepared",
    "finish",
    "prepare_image",
    "prepare_seed",
    "prepare_tensor",
    "read_anchors",
]

_ANCHOR_BYTES = 16


class Prepared(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What goes into the model, batch 1, and what is remembered of where it came from."""

    array: NDArray[Any]
    geometry: Geometry | None = None
    """None: from a seed or a latent."""
    region: tuple[float, float, float, float] | None = None
    """What the model sees of the upright original image: see ``Answer.region``. None where
    nobody knows the original."""


def prepare_image(
    record: Preprocess,
    spec: TensorSpec,
    rgb: NDArray[np.uint8],
    original: tuple[int, int] | None = None,
) -> Prepared:
    """Pre-process uint8 RGB ``[H, W, 3]`` for the input ``spec``; ``original`` as ``apply_uint8``.

    An input of uint8 gets pixels (its model holds the normalization), another one the
    normalized float32. Raises ``ImageTooLarge``, or ``TensorError`` when the record does not
    lead to ``spec``.
    """
    pixels = preprocess.apply_uint8(record, rgb, original)
    steps = pixels if spec.dtype == "uint8" else preprocess.normalize(record, pixels)
    array = pack_image(steps, spec)
    geometry = geometry_of(record, *(original or rgb.shape[:2]))
    height, width = record.size
    seen = geometry.boxes_to_original(np.array([[0.0, 0.0, width, height]]))[0]
    x_min, y_min, x_max, y_max = (float(edge) for edge in seen)
    return Prepared(array=array, geometry=geometry, region=(x_min, y_min, x_max, y_max))


def prepare_seed(spec: TensorSpec, seed: int) -> Prepared:
    """The latent of ``seed`` in the shape of the input ``spec``, float32, batch 1."""
    count = int(np.prod(spec.shape[1:]))
    array = latent_from_seed(seed, count).reshape(1, *spec.shape[1:])
    return Prepared(array=array)


def prepare_tensor(record: Preprocess | None, spec: TensorSpec, data: bytes) -> Prepared:
    """What a caller pre-processed itself: one row of the input ``spec``, little-endian.

    Of an image nothing is known but the tensor, so boxes come in pixels of the model's input
    and pixels as the model gave them. Raises ``TensorError`` on another size.
    """
    array = from_little_endian(data, spec)
    if record is None:
        return Prepared(array=array)
    height, width = record.size
    as_it_is = Geometry(
        scale_x=1.0,
        scale_y=1.0,
        offset_x=0.0,
        offset_y=0.0,
        input_width=width,
        flipped=False,
        width=width,
        height=height,
    )
    return Prepared(array=array, geometry=as_it_is)


def finish(
    task: Task,
    outputs: Sequence[NDArray[np.generic]],
    prepared: Prepared,
    *,
    labels: tuple[str, ...],
    anchors: NDArray[np.float32] | None,
    top_k: int | None,
) -> Answer:
    """The answer from one image's outputs (``tensors.canonical``); raises ``TensorError``.

    Where pre-processing mirrors the image, pixels of the answer are mirrored back.
    """
    given = answer(
        task,
        outputs,
        labels=labels,
        anchors=anchors,
        geometry=prepared.geometry,
        top_k=top_k,
    )
    if given.class_map is None and given.image is None:
        return given
    changes: dict[str, Any] = {"region": prepared.region}
    if prepared.geometry is not None and prepared.geometry.flipped:
        if given.class_map is not None:
            changes["class_map"] = np.ascontiguousarray(given.class_map[:, ::-1])
        if given.image is not None:
            changes["image"] = np.ascontiguousarray(given.image[:, ::-1])
    return msgspec.structs.replace(given, **changes)


def read_anchors(root: Path, task: Task) -> NDArray[np.float32] | None:
    """The anchors of a verified folder, float32 ``[N, 4]``; None for another task."""
    if not isinstance(task, DetectionTask):
        return None
    data = read_bounded(root / task.anchors.path, limits.MAX_ANCHORS * _ANCHOR_BYTES)
    return np.frombuffer(data, dtype="<f4").astype(np.float32).reshape(task.anchors.count, 4)
