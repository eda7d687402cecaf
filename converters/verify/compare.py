"""Compare one variant's answers with the reference's, input by input, for every task.

Nothing is kept but sums, so a bundle can be verified on any number of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from converters.verify.figures import SQNR_CAP_DB, Closeness
from converters.verify.metrics import psnr_db, sqnr_db, ssim
from edge_runtime.contract.errors import TensorError
from edge_runtime.contract.tasks import (
    ClassificationTask,
    DetectionTask,
    GenerationTask,
    ImageToImageTask,
    ReconstructionTask,
    SegmentationTask,
    Task,
)
from edge_runtime.contract.tasks.classification import probabilities
from edge_runtime.contract.tasks.detection import Candidates, box_iou, candidates, suppress
from edge_runtime.contract.tasks.pixels import to_pixels
from edge_runtime.contract.tasks.segmentation import class_map

__all__ = ["Comparison"]

_CONFIDENT = 0.5
_MATCH_IOU = 0.5
_TOP = 5

Outputs = Sequence[NDArray[np.generic]]


class _Meter(Protocol):
    """Adds up what one task compares."""

    def add(self, reference: Outputs, answer: Outputs) -> None:
        """One input."""

    def figures(self) -> dict[str, object]:
        """Fields of ``Closeness``."""


class Comparison:
    """Feed it pairs of answers, batch 1 each; ``result`` says how close they were."""

    def __init__(self, task: Task, anchors: NDArray[np.float32] | None = None) -> None:
        self._meter = _meter_for(task, anchors)
        self._ratios: list[float] = []
        self._largest = 0.0
        self._finite = True
        self._same_form = True
        self.count = 0

    def add(self, reference: Outputs, answer: Outputs) -> None:
        """One input's outputs, in canonical layout.

        Raises ``TensorError`` when the answer has neither the reference's shapes nor those
        of NMS or argmax in the graph.
        """
        self.count += 1
        if not all(np.isfinite(np.asarray(one, np.float64)).all() for one in answer):
            self._finite = False
            return
        if [one.shape for one in reference] == [one.shape for one in answer]:
            worst = SQNR_CAP_DB
            for exact, other in zip(reference, answer, strict=True):
                rows = np.asarray(exact, np.float64)[None], np.asarray(other, np.float64)[None]
                worst = min(worst, float(sqnr_db(*rows)[0]))
                difference = np.abs(np.subtract(exact, other, dtype=np.float64))
                self._largest = max(self._largest, float(difference.max()))
            self._ratios.append(worst)
        else:
            self._same_form = False
        self._meter.add(reference, answer)

    def per_input(self) -> list[float]:
        """SQNR of each input in dB; empty for answers in another form."""
        return list(self._ratios) if self._same_form else []

    def result(self) -> Closeness:
        """The figures so far."""
        if not self._finite:
            return Closeness(
                images=self.count, sqnr_db_mean=None, sqnr_db_min=None, max_abs=None, finite=False
            )
        numeric = self._same_form and bool(self._ratios)
        return Closeness(
            images=self.count,
            sqnr_db_mean=float(np.mean(self._ratios)) if numeric else None,
            sqnr_db_min=float(np.min(self._ratios)) if numeric else None,
            max_abs=self._largest if numeric else None,
            finite=True,
            **self._meter.figures(),  # type: ignore[arg-type]
        )


def _meter_for(task: Task, anchors: NDArray[np.float32] | None) -> _Meter:
    if isinstance(task, ClassificationTask):
        return _Classes(task)
    if isinstance(task, DetectionTask):
        assert anchors is not None  # noqa: S101  # the caller read them
        return _Boxes(task, anchors)
    if isinstance(task, SegmentationTask):
        return _Masks(task)
    return _Images(task)


class _Classes:
    def __init__(self, task: ClassificationTask) -> None:
        self._task = task
        self._count = self._differs = self._sure = self._sure_differs = self._in_top = 0

    def add(self, reference: Outputs, answer: Outputs) -> None:
        exact = np.asarray(reference[0], np.float64).reshape(-1)
        other = np.asarray(answer[0], np.float64).reshape(-1)
        first = int(exact.argmax())
        sure = float(probabilities(self._task, exact).max()) >= _CONFIDENT
        differs = first != int(other.argmax())
        self._count += 1
        self._differs += differs
        self._sure += sure
        self._sure_differs += differs and sure
        self._in_top += first in np.argsort(-other, kind="stable")[:_TOP]

    def figures(self) -> dict[str, object]:
        count = max(1, self._count)
        return {
            "agreement": 1.0 - self._differs / count,
            "disagreements": self._differs,
            "compared": self._count,
            "confident": self._sure,
            "confident_disagreements": self._sure_differs,
            "metrics": {"top5": self._in_top / count},
        }


class _Boxes:
    """Recall of the reference's boxes, and average precision with them as ground truth.

    A box matches one of the same class with IoU of at least 0.5; average precision is the
    area under the precision envelope over all images (Everingham et al., IJCV 2015), mean
    over the classes that the reference finds.
    """

    def __init__(self, task: DetectionTask, anchors: NDArray[np.float32]) -> None:
        self._task = task
        self._anchors = anchors
        self._wanted: dict[int, int] = {}
        self._hits: dict[int, list[tuple[float, bool]]] = {}
        self._found = 0

    def add(self, reference: Outputs, answer: Outputs) -> None:
        truth, guess = self._boxes(reference), self._boxes(answer)
        overlaps = box_iou(guess.boxes, truth.boxes)
        taken = np.zeros(len(truth.scores), dtype=bool)
        for label in truth.classes:
            self._wanted[int(label)] = self._wanted.get(int(label), 0) + 1
        for index, (score, label) in enumerate(zip(guess.scores, guess.classes, strict=True)):
            row = np.where((truth.classes == label) & ~taken, overlaps[index], 0.0)
            hit = bool(row.size) and float(row.max()) >= _MATCH_IOU
            if hit:
                taken[int(row.argmax())] = True
            self._hits.setdefault(int(label), []).append((float(score), hit))
        self._found += int(taken.sum())

    def _boxes(self, outputs: Outputs) -> Candidates:
        floats = [np.asarray(one, np.float32) for one in outputs]
        if len(floats) == 3:
            scores = floats[1].reshape(-1)
            stay = np.flatnonzero((scores >= self._task.score_threshold) & (scores > 0))
            stay = stay[: self._task.max_boxes]
            return Candidates(
                boxes=floats[0].reshape(-1, 4)[stay],
                scores=scores[stay],
                classes=np.rint(floats[2].reshape(-1)[stay]).astype(np.int64),
            )
        every = candidates(self._task, self._anchors, floats)
        stay = suppress(self._task, every)
        return Candidates(
            boxes=every.boxes[stay], scores=every.scores[stay], classes=every.classes[stay]
        )

    def figures(self) -> dict[str, object]:
        wanted = sum(self._wanted.values())
        if wanted == 0:
            return {"metrics": {"boxes": 0.0}}
        precision = [self._average_precision(label) for label in self._wanted]
        return {
            "agreement": self._found / wanted,
            "disagreements": wanted - self._found,
            "compared": wanted,
            "metrics": {"map": float(np.mean(precision)), "boxes": float(wanted)},
        }

    def _average_precision(self, label: int) -> float:
        hits = np.array(
            [hit for _, hit in sorted(self._hits.get(label, []), key=lambda pair: -pair[0])]
        )
        if not hits.size:
            return 0.0
        right = np.cumsum(hits)
        precision = right / np.arange(1, len(hits) + 1)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        return float((envelope * hits).sum() / self._wanted[label])


class _Masks:
    def __init__(self, task: SegmentationTask) -> None:
        self._task = task
        self._confusion = np.zeros((task.classes, task.classes), dtype=np.int64)

    def add(self, reference: Outputs, answer: Outputs) -> None:
        exact, other = class_map(self._task, reference[0]), class_map(self._task, answer[0])
        if exact.shape != other.shape:
            raise TensorError(
                f"the mask is {list(other.shape)}, the reference's {list(exact.shape)}"
            )
        classes = self._task.classes
        pairs = exact.astype(np.int64).reshape(-1) * classes + other.reshape(-1)
        counts = np.bincount(pairs, minlength=classes * classes)
        self._confusion += counts.reshape(classes, classes)

    def figures(self) -> dict[str, object]:
        total = int(self._confusion.sum())
        same = np.diag(self._confusion)
        union = self._confusion.sum(axis=0) + self._confusion.sum(axis=1) - same
        present = union > 0
        return {
            "agreement": int(same.sum()) / max(1, total),
            "disagreements": total - int(same.sum()),
            "compared": total,
            "metrics": {"miou": float((same[present] / union[present]).mean())},
        }


class _Images:
    def __init__(self, task: ImageToImageTask | GenerationTask | ReconstructionTask) -> None:
        self._task = task
        self._psnr: list[float] = []
        self._ssim: list[float] = []

    def add(self, reference: Outputs, answer: Outputs) -> None:
        exact, other = self._pixels(reference), self._pixels(answer)
        if exact.shape != other.shape:
            raise TensorError(
                f"the image is {list(other.shape)}, the reference's {list(exact.shape)}"
            )
        self._psnr.append(psnr_db(exact, other))
        self._ssim.append(ssim(exact, other))

    def _pixels(self, outputs: Outputs) -> NDArray[np.uint8]:
        values = np.asarray(outputs[0], np.float32)
        return to_pixels(values, self._task.output_scale, self._task.output_offset)

    def figures(self) -> dict[str, object]:
        if not self._psnr:
            return {}
        return {
            "metrics": {
                "psnr_db": float(np.mean(self._psnr)),
                "psnr_db_min": float(np.min(self._psnr)),
                "ssim": float(np.mean(self._ssim)),
            }
        }
