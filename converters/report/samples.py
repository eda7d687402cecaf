"""Samples for the HTML page: which inputs to show, and each file's answer as a picture."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from converters.report.pictures import (
    class_color,
    draw_boxes,
    encode_difference,
    encode_picture,
    overlay_classes,
    tell_apart,
)
from converters.report.records import Picture, Ranked, RenderedAnswer
from converters.verify.metrics import psnr_db, sqnr_db
from edge_runtime.contract.errors import TensorError
from edge_runtime.contract.geometry import Geometry
from edge_runtime.contract.preprocess import Preprocess
from edge_runtime.contract.tasks import Task
from edge_runtime.contract.tasks.answer import Answer, answer
from edge_runtime.contract.tasks.classification import Prediction
from edge_runtime.contract.tasks.detection import Box, box_iou

__all__ = ["MAX_SAMPLES", "choose_samples", "render_input", "render_sample"]

MAX_SAMPLES = 6

_TOP = 3
_MAX_BOXES = 20
_MATCH_IOU = 0.5
_BACKGROUND = frozenset(("background", "__background__"))

Outputs = Sequence[NDArray[np.generic]]
Pixels = NDArray[np.uint8]
Color = str


def choose_samples(
    closeness: Mapping[str, Sequence[float]],
    *,
    failed: Collection[str] = (),
    count: int = MAX_SAMPLES,
) -> list[int]:
    """Indices of the inputs to show: the worst of each variant in turn, worst first.

    ``closeness``: for each variant one number an input, larger is closer (SQNR in dB, a
    share ...). Failed variants choose first, then those with the worst input. Numbers of
    variants are only compared with their own: of an int8 file everything is worse.
    """
    rows = {
        key: [-math.inf if math.isnan(value) else value for value in values]
        for key, values in closeness.items()
        if len(values)
    }
    turn = sorted(rows, key=lambda key: (key not in failed, min(rows[key]), key))
    queues = [sorted(range(len(rows[key])), key=rows[key].__getitem__) for key in turn]
    chosen: list[int] = []
    while len(chosen) < count and any(queues):
        for queue in queues:
            while queue and queue[0] in chosen:
                queue.pop(0)
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return chosen


def _as_rgb(pixels: Pixels, color: Color) -> Pixels:
    if pixels.shape[2] == 1:
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    elif color == "BGR":
        pixels = pixels[:, :, ::-1]
    return np.ascontiguousarray(pixels)


def render_input(pixels: Pixels, record: Preprocess | None = None) -> Picture:
    """The model's own view of a photo, uint8 ``[H, W, 1 or 3]``, as a picture.

    ``record``: the pre-processing that made the pixels (``apply_uint8``); without one they
    are RGB.
    """
    return encode_picture(_as_rgb(pixels, record.color if record is not None else "RGB"))


def render_sample(
    task: Task,
    labels: tuple[str, ...],
    input_pixels: Pixels | None,
    outputs: Outputs,
    anchors: NDArray[np.float32] | None = None,
    *,
    reference: Outputs | None = None,
    record: Preprocess | None = None,
) -> RenderedAnswer:
    """One model's answer for one input, ready to show.

    Args:
        task: Of the bundle.
        labels: Of the bundle; empty where the task has no classes.
        input_pixels: What the model saw, uint8 ``[H, W, 1 or 3]`` (``apply_uint8``); None
            for a generator.
        outputs: Batch 1, in canonical layout (NCHW).
        anchors: Detection.
        reference: The reference's outputs for this input, when ``outputs`` are a
            variant's: what differs is then marked.
        record: The pre-processing that made ``input_pixels``; without one they are RGB.

    Returns:
        An answer that cannot be made sense of (NaN, another shape) has ``error`` set.
    """
    photo = None
    if input_pixels is not None:
        photo = _as_rgb(input_pixels, record.color if record is not None else "RGB")
    height, width = photo.shape[:2] if photo is not None else (1, 1)
    shown = Geometry(  # of the picture on the page: the model's input as it is
        scale_x=1.0, scale_y=1.0, offset_x=0.0, offset_y=0.0, input_width=width, flipped=False,
        width=width, height=height,
    )  # fmt: skip
    try:
        own = answer(task, outputs, labels=labels, anchors=anchors, geometry=shown)
        exact = None
        if reference is not None:
            exact = answer(task, reference, labels=labels, anchors=anchors, geometry=shown)
    except TensorError as error:
        return RenderedAnswer(error=error.detail, differs=True)
    closeness = _closeness(reference, outputs) if reference is not None else None
    if own.predictions is not None:
        return _ranking(own.predictions, exact, closeness)
    if own.boxes is not None and photo is not None:
        return _boxes(photo, own.boxes, exact, closeness)
    if own.class_map is not None and photo is not None:
        return _classes(photo, labels, own.class_map, exact, closeness)
    if own.image is not None:
        return _image(own.image, exact, closeness)
    return RenderedAnswer(error="there is no input picture to show this answer on")


def _closeness(reference: Outputs, outputs: Outputs) -> float | None:
    """Worst SQNR of the outputs; None where a variant answers in another form."""
    if [one.shape for one in reference] != [one.shape for one in outputs]:
        return None
    pairs = zip(reference, outputs, strict=True)
    return min(
        float(sqnr_db(np.asarray(exact)[None], np.asarray(other)[None])[0])  # type: ignore[arg-type]
        for exact, other in pairs
    )


def _ranking(
    predictions: Sequence[Prediction], exact: Answer | None, closeness: float | None
) -> RenderedAnswer:
    differs = False
    if exact is not None and exact.predictions is not None:
        differs = exact.predictions[0].index != predictions[0].index
    return RenderedAnswer(
        ranked=tuple(Ranked(label=one.label, share=one.score) for one in predictions[:_TOP]),
        note="another first class" if differs else "",
        differs=differs,
        sqnr_db=closeness,
    )


def _corners(box: Box) -> tuple[float, float, float, float]:
    return box.x_min, box.y_min, box.x_max, box.y_max


def _match(found: Sequence[Box], wanted: Sequence[Box]) -> tuple[list[bool], list[bool]]:
    """Which of ``found`` are extra, and which of ``wanted`` are missing.

    A box is the same as one of its class with IoU of at least 0.5, best score first, as
    the proof counts them.
    """
    missing = [True] * len(wanted)
    extra = [True] * len(found)
    if not found or not wanted:
        return extra, missing
    overlaps = box_iou(
        np.array([_corners(b) for b in found]), np.array([_corners(b) for b in wanted])
    )
    for number, box in enumerate(found):
        free = [
            overlaps[number][k] if missing[k] and wanted[k].index == box.index else 0.0
            for k in range(len(wanted))
        ]
        best = int(np.argmax(free))
        if free[best] >= _MATCH_IOU:
            extra[number], missing[best] = False, False
    return extra, missing


def _boxes(
    photo: Pixels, found: Sequence[Box], exact: Answer | None, closeness: float | None
) -> RenderedAnswer:
    shown = [(_corners(box), box.index, f"{box.label} {box.score:.2f}") for box in found]
    note = _count(len(found), "box", "boxes")
    extra: list[bool] = []
    lost: list[tuple[tuple[float, float, float, float], str]] = []
    if exact is not None and exact.boxes is not None:
        extra, missing = _match(found, exact.boxes)
        gone = [box for box, is_gone in zip(exact.boxes, missing, strict=True) if is_gone]
        lost = [(_corners(box), box.label) for box in gone[:_MAX_BOXES]]
        if gone:
            note += f", {len(gone)} missing"
        if any(extra):
            note += f", {sum(extra)} extra"
    return RenderedAnswer(
        picture=draw_boxes(photo, shown[:_MAX_BOXES], extra=extra[:_MAX_BOXES], missing=lost),
        note=note,
        differs=bool(lost) or any(extra),
        sqnr_db=closeness,
    )


def _count(number: int, one: str, many: str) -> str:
    return f"{number or 'no'} {one if number == 1 else many}"


def _classes(
    photo: Pixels,
    labels: tuple[str, ...],
    class_map: Pixels,
    exact: Answer | None,
    closeness: float | None,
) -> RenderedAnswer:
    plain = 0 if labels and labels[0].lower() in _BACKGROUND else None
    counts = np.bincount(class_map.reshape(-1), minlength=len(labels))
    order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    ranked = [
        Ranked(
            label=labels[index] if index < len(labels) else f"class {index}",
            share=float(counts[index] / class_map.size),
            color=None if index == plain else "#{:02x}{:02x}{:02x}".format(*class_color(index)),
        )
        for index in order[:_TOP]
    ]
    note, differs, difference = "", False, None
    if exact is not None and exact.class_map is not None:
        if exact.class_map.shape != class_map.shape:
            return RenderedAnswer(
                error=f"the mask is {list(class_map.shape)}, the reference's "
                f"{list(exact.class_map.shape)}",
                differs=True,
            )
        other = exact.class_map != class_map
        count = int(other.sum())
        differs = count > 0
        note = "same classes"
        if differs:
            few = count < 0.0001 * other.size
            share = (
                _count(count, "pixel", "pixels") if few else f"{count / other.size:.2%} of pixels"
            )
            note = f"{share} differ{'s' if count == 1 else ''}"
        difference = tell_apart(photo, other) if differs else None
    return RenderedAnswer(
        ranked=tuple(ranked),
        picture=overlay_classes(photo, class_map, plain=plain),
        difference=difference,
        note=note,
        differs=differs,
        sqnr_db=closeness,
    )


def _image(image: Pixels, exact: Answer | None, closeness: float | None) -> RenderedAnswer:
    note, difference = "", None
    if exact is not None and exact.image is not None:
        if exact.image.shape != image.shape:
            return RenderedAnswer(
                error=f"the image is {list(image.shape[:2])}, the reference's "
                f"{list(exact.image.shape[:2])}",
                differs=True,
            )
        if np.array_equal(exact.image, image):
            note = "same pixels"
        else:
            difference, factor = encode_difference(exact.image, image)
            note = f"PSNR {psnr_db(exact.image, image):.1f} dB; difference x{factor}"
    return RenderedAnswer(
        picture=encode_picture(image), difference=difference, note=note, sqnr_db=closeness
    )
