"""How sure a local answer is of itself: the number that an adaptive policy asks for.

Classification: the score of the first class. Detection: that of the best box; nothing
found: one minus the threshold, which every score stayed below. Segmentation: the mean over
pixels of the highest class probability, where the file gives scores. The other tasks, and
segmentation with the argmax in its graph, say nothing of their own quality.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.tasks import (
    ClassificationTask,
    DetectionTask,
    SegmentationTask,
    Task,
)
from edge_runtime.contract.tasks.answer import Answer
from edge_runtime.contract.tensors import TensorSpec, canonical_shape

__all__ = ["confidence_of", "gives_confidence"]

_SAMPLED_SIDE = 64
"""Pixels a side that are looked at: a mean needs no more."""
_SUM_TOLERANCE = 1e-3


def gives_confidence(task: Task, outputs: Sequence[TensorSpec]) -> bool:
    """Whether ``confidence_of`` has a number for answers of these outputs."""
    if isinstance(task, SegmentationTask):
        return len(canonical_shape(outputs[0])) == 4
    return isinstance(task, ClassificationTask | DetectionTask)


def confidence_of(
    task: Task, outputs: Sequence[NDArray[np.generic]], answer: Answer
) -> float | None:
    """In [0, 1]; None where the answer says nothing of its own quality.

    ``outputs``: batch 1, as ``tensors.canonical`` gives them.
    """
    if answer.predictions is not None:
        return answer.predictions[0].score
    if isinstance(task, DetectionTask) and answer.boxes is not None:
        return answer.boxes[0].score if answer.boxes else 1.0 - task.score_threshold
    if isinstance(task, SegmentationTask) and outputs[0].ndim == 4:
        return _mean_best_probability(np.asarray(outputs[0][0]))
    return None


def _mean_best_probability(scores: NDArray[np.generic]) -> float:
    """Of ``[classes, H, W]``: logits go through softmax, probabilities stay."""
    steps = [max(1, side // _SAMPLED_SIDE) for side in scores.shape[1:]]
    sampled = np.asarray(scores[:, :: steps[0], :: steps[1]], dtype=np.float64)
    best = sampled.max(axis=0)
    if sampled.min() >= 0 and np.abs(sampled.sum(axis=0) - 1.0).max() <= _SUM_TOLERANCE:
        return float(best.mean())
    return float((1.0 / np.exp(sampled - best).sum(axis=0)).mean())
