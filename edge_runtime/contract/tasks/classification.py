"""Image classification: one image in, ranked labels out."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract import limits
from edge_runtime.contract.errors import TensorError

__all__ = ["Activation", "ClassificationTask", "Prediction", "postprocess", "probabilities"]

Activation = Literal["softmax", "sigmoid", "none"]
"""What still has to be applied to the model's output; ``none``: it gives probabilities."""


class ClassificationTask(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="classification"
):
    """The model's single output is float32 ``[1, classes]``."""

    classes: Annotated[int, msgspec.Meta(ge=2, le=limits.MAX_LABELS)]
    activation: Activation = "softmax"
    temperature: Annotated[float, msgspec.Meta(gt=0, le=100)] = 1.0
    """Logits are divided by this before the activation (Guo et al., ICML 2017)."""
    top_k: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_TOP_K)] = 5


class Prediction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ranked answer."""

    index: int
    label: str
    score: float


def probabilities(task: ClassificationTask, logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Scores of every class, float64, same shape as ``logits`` (last axis: classes).

    softmax(z)_i = exp((z_i - max z) / T) / sum_j exp((z_j - max z) / T);
    sigmoid(z)_i = 1 / (1 + exp(-z_i / T)).
    """
    values = np.asarray(logits, dtype=np.float64)
    if task.activation == "none":
        return values
    values = values / task.temperature
    if task.activation == "sigmoid":
        return np.asarray(0.5 * (1.0 + np.tanh(0.5 * values)))
    exponents = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True))


def postprocess(
    task: ClassificationTask,
    output: NDArray[np.floating],
    labels: tuple[str, ...],
    top_k: int | None = None,
) -> tuple[Prediction, ...]:
    """Rank the classes of one image; ``output`` is ``[classes]`` or ``[1, classes]``.

    Best first; equal scores in the order of their index. ``top_k`` defaults to the task's
    and is capped by the number of classes. Raises ``TensorError`` on another shape or NaN.
    """
    flat = np.asarray(output).reshape(-1)
    if flat.shape[0] != task.classes or len(labels) != task.classes:
        raise TensorError(
            f"{flat.shape[0]} outputs and {len(labels)} labels for {task.classes} classes"
        )
    if not np.isfinite(flat).all():
        raise TensorError("the model answered NaN or infinity: convert it again and verify it")
    scores = probabilities(task, flat)
    # Rank by logits: softmax may round two different logits to one score.
    order = np.argsort(-flat, kind="stable")[: top_k or task.top_k]
    return tuple(
        Prediction(index=int(i), label=labels[int(i)], score=float(scores[int(i)])) for i in order
    )
