"""Name the mistake behind a variant that answers wrongly.

Each hypothesis turns the reference's answers into what a file with that mistake would give.
The one that explains the file's answers far better than "no mistake" is named; a bound
alone says only that something is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from converters.verify.figures import Finding
from converters.verify.metrics import sqnr_db
from edge_runtime.contract.tasks import (
    ClassificationTask,
    DetectionTask,
    SegmentationTask,
    Task,
)
from edge_runtime.contract.tasks.classification import probabilities
from edge_runtime.contract.tasks.detection import Candidates, box_iou, candidates, suppress

__all__ = ["closer", "diagnose", "explains"]

_GAIN_DB = 10.0
"""How much better a hypothesis must explain the answers."""
_LEAST_DB = 12.0
_SAME_IOU = 0.9
_SAME_SCORE = 0.005
_LOST_SHARE = 0.1

Array = NDArray[np.floating]


def diagnose(
    task: Task,
    reference: Sequence[Array],
    answers: Sequence[Array],
    anchors: NDArray[np.float32] | None = None,
) -> list[Finding]:
    """What mistake would make the reference answer so; empty when none is convincing.

    ``reference`` and ``answers``: one array an output, ``[images, ...]``, canonical layout.
    """
    if not all(np.isfinite(one).all() for one in answers):
        return []
    if isinstance(task, ClassificationTask) and answers[0].shape == reference[0].shape:
        return _classification(task, reference[0], answers[0])
    if isinstance(task, SegmentationTask):
        return _mask(reference[0], answers[0])
    if isinstance(task, DetectionTask) and anchors is not None and len(answers) == 3:
        return _boxes(task, reference, answers, anchors)
    return []


def explains(reference: Array, answer: Array, changed: Array) -> bool:
    """Whether ``changed`` is far closer to ``answer`` than ``reference`` is; ``[N, ...]``."""
    before = float(sqnr_db(reference, answer).mean())
    after = float(sqnr_db(changed, answer).mean())
    return after >= before + _GAIN_DB and after >= _LEAST_DB


def closer(reference: Array, answer: Array, changed: Array) -> bool:
    """Whether ``changed`` is closer to ``answer`` than ``reference`` is at all; ``[N, ...]``."""
    return float(sqnr_db(changed, answer).mean()) > float(sqnr_db(reference, answer).mean())


def _classification(task: ClassificationTask, reference: Array, answer: Array) -> list[Finding]:
    found = []
    scores: Array = probabilities(task, reference)
    twice: Array | None = probabilities(task, scores) if task.activation == "softmax" else None
    if task.activation == "none":  # the reference itself answers probabilities
        plain = ClassificationTask(classes=task.classes, activation="softmax")
        twice, scores = probabilities(plain, reference), reference
    for changed, what in ((scores, "once too often"), (twice, "twice too often")):
        if (
            changed is not None
            and changed is not reference
            and explains(reference, answer, changed)
        ):
            found.append(
                Finding(
                    name="softmax-twice",
                    detail=f"it answers as if {task.activation} were applied {what}: the file "
                    "holds an activation that the task applies again",
                )
            )
            break
    order = _class_order(reference, answer)
    if order is not None and explains(reference, answer, reference[:, order]):
        moved = int((order != np.arange(len(order))).sum())
        found.append(
            Finding(
                name="class-order",
                detail=f"its classes are in another order than the labels: {moved} of "
                f"{len(order)} answer as another class does in the reference",
            )
        )
    return found


def _class_order(reference: Array, answer: Array) -> NDArray[np.int64] | None:
    """For each class of ``answer`` the class of ``reference`` that it follows best."""
    if len(reference) < 4 or answer.shape[1] > 2048:
        return None
    exact = np.asarray(reference, np.float64)
    other = np.asarray(answer, np.float64)
    # Squared distance between columns: |a|^2 - 2 a.r + |r|^2.
    distance = -2.0 * other.T @ exact + (exact**2).sum(axis=0)[None, :]
    order = distance.argmin(axis=1)
    return order if (order != np.arange(len(order))).any() else None


def _mask(reference: Array, answer: Array) -> list[Finding]:
    turned: Callable[[Array], Array]
    for turned, what in (
        (lambda one: np.swapaxes(one, -1, -2), "transposed: rows and columns are exchanged"),
        (lambda one: one[..., ::-1], "mirrored"),
        (lambda one: one[..., ::-1, :], "upside down"),
    ):
        exact = reference if answer.ndim == 4 else reference.argmax(axis=1)
        changed = turned(exact)
        if changed.shape != answer.shape:
            continue
        if answer.ndim == 4:
            convincing = explains(exact, answer, changed)
        else:
            convincing = float((changed == answer).mean()) > float((exact == answer).mean()) + 0.05
            convincing = convincing and float((changed == answer).mean()) > 0.9
        if convincing:
            return [Finding(name="mask-geometry", detail=f"its mask is {what}")]
    return []


def _boxes(
    task: DetectionTask,
    reference: Sequence[Array],
    answers: Sequence[Array],
    anchors: NDArray[np.float32],
) -> list[Finding]:
    """NMS inside the file: do the same boxes stay, with the same classes?"""
    wrong_kept = pairs = boxes = lost = due = 0
    rows = np.zeros(3, dtype=np.int64)
    moves = np.zeros(2, dtype=np.int64)
    for row in range(len(answers[0])):
        every = candidates(task, anchors, [np.asarray(one[row : row + 1]) for one in reference])
        answer = [one[row] for one in answers]
        kept = _kept(task, answer)
        if not len(every.scores) or not len(kept.scores):
            continue
        overlaps = box_iou(kept.boxes, every.boxes)
        best = overlaps.argmax(axis=1)
        near = overlaps.max(axis=1) >= _SAME_IOU
        boxes += len(near)
        pairs += int(near.sum())
        labels = every.classes[best]
        moves += [int((near & (kept.classes - labels == move)).sum()) for move in (-1, 1)]
        inside = box_iou(kept.boxes, kept.boxes) > task.iou_threshold
        inside &= kept.classes[:, None] == kept.classes[None, :]
        wrong_kept += int(np.triu(inside, 1).sum())
        rows += _row_matches(every, answer)
        stay = suppress(task, every)
        again = (overlaps[:, stay] >= _SAME_IOU) & (
            kept.classes[:, None] == every.classes[stay][None, :]
        )
        due += len(stay)
        lost += int((~again.any(axis=0)).sum())
    if not pairs:
        return []
    if moves.max() > 0.5 * pairs:
        return [
            Finding(
                name="class-offset",
                detail=f"{moves.max()} of {pairs} boxes carry the neighboring class: a background "
                "class is counted, or left out, once too often",
            )
        ]
    below, own, above = (int(count) for count in rows)
    if max(below, above) > 2 * own:
        return [
            Finding(
                name="nms",
                detail=f"{max(below, above)} scores belong to the box one row "
                f"{'before' if below > above else 'behind'}, {own} to their own: its NMS gathers "
                "boxes and scores by different indices",
            )
        ]
    if wrong_kept:
        return [
            Finding(
                name="nms",
                detail=f"{wrong_kept} pairs of boxes of one class overlap by more than "
                f"{task.iou_threshold:g} and both stay: its NMS drops the wrong ones",
            )
        ]
    if lost > _LOST_SHARE * due and pairs > (1.0 - _LOST_SHARE) * boxes:
        return [
            Finding(
                name="nms",
                detail=f"all its boxes are the reference's, but {lost} of {due} that should stay "
                f"at an overlap of {task.iou_threshold:g} are missing: its NMS drops too many",
            )
        ]
    return []


def _row_matches(every: Candidates, answer: Sequence[Array]) -> NDArray[np.int64]:
    """How many scores suit the box one row before, in their own row, and one behind."""
    boxes = np.asarray(answer[0], np.float32).reshape(-1, 4)
    scores = np.asarray(answer[1], np.float32).reshape(-1)
    near = box_iou(boxes, every.boxes) >= _SAME_IOU
    alike = np.abs(scores[:, None] - every.scores[None, :]) <= _SAME_SCORE
    alike &= (scores > 0)[:, None]
    found = [
        (near[max(move, 0) : len(near) + min(move, 0)] & alike[max(-move, 0) :][: len(near) - 1])
        if move
        else near & alike
        for move in (-1, 0, 1)
    ]
    return np.array([int(one.any(axis=1).sum()) for one in found])


def _kept(task: DetectionTask, answer: Sequence[Array]) -> Candidates:
    scores = np.asarray(answer[1], np.float32).reshape(-1)
    stay = np.flatnonzero((scores >= task.score_threshold) & (scores > 0))
    return Candidates(
        boxes=np.asarray(answer[0], np.float32).reshape(-1, 4)[stay],
        scores=scores[stay],
        classes=np.rint(np.asarray(answer[2]).reshape(-1)[stay]).astype(np.int64),
    )
