"""What every built model must be before anything else looks at it."""

from __future__ import annotations

import math
from typing import Any

from converters.sources.types import Detector
from edge_runtime.contract import limits
from edge_runtime.contract.errors import SourceError
from edge_runtime.contract.tasks import TaskName

__all__ = ["as_detector", "check_deterministic", "fit_answer", "run_once"]

_TOLERANCE = 1e-5


def run_once(module: Any, image: Any) -> Any:
    """``module(image)`` without gradients. Raises ``SourceError`` for whatever it raises."""
    import torch

    try:
        with torch.no_grad():
            return module(image)
    except Exception as error:  # whatever the user's forward raises
        raise SourceError(
            f"the model does not take float32 {list(image.shape)}: {type(error).__name__}: "
            f"{str(error).splitlines()[0][:300] if str(error) else ''} (check --input-size)"
        ) from error


def fit_answer(module: Any, task: TaskName, image: Any) -> Any:
    """``module``, wrapped where its answer has more around it than the task wants.

    A tuple of one becomes its tensor; ``{"out": scores, ...}`` (torchvision's segmentation)
    its scores; ``(image, mean, log-variance)`` of an autoencoder the first two. Any other
    answer is left to ``describe_model``, which names what is wrong. Raises ``SourceError``
    when the model cannot run on ``image``.
    """
    from converters.sources.wrappers import Entry, FirstTwo

    answer = run_once(module, image)
    if isinstance(answer, dict) and task == "segmentation" and "out" in answer:
        return Entry(module, "out").eval()
    if isinstance(answer, tuple | list):
        if len(answer) == 1:
            return Entry(module, 0).eval()
        if len(answer) == 3 and task == "reconstruction":
            return FirstTwo(module).eval()
    return module


def _flat(answer: Any) -> list[Any]:
    import torch

    if isinstance(answer, torch.Tensor):
        return [answer]
    if isinstance(answer, dict):
        return [leaf for value in answer.values() for leaf in _flat(value)]
    if isinstance(answer, tuple | list):
        return [leaf for value in answer for leaf in _flat(value)]
    return []


def check_deterministic(module: Any, image: Any) -> None:
    """Raise ``SourceError`` when two runs on ``image`` answer differently."""
    import torch

    pairs = zip(_flat(run_once(module, image)), _flat(run_once(module, image)), strict=False)
    for first, second in pairs:
        one, two = (torch.nan_to_num(value.double()) for value in (first, second))
        scale = float(one.abs().max()) if one.numel() else 0.0
        if one.shape != two.shape or float((one - two).abs().max()) > _TOLERANCE * scale:
            raise SourceError(
                "two runs on the same input answer differently: in eval mode use the mean "
                "instead of sampling (a VAE's z = mu), and no dropout with training=True"
            )


def as_detector(answer: Detector, where: str) -> Detector:
    """A user's ``Detector`` with its anchors checked. Raises ``SourceError``."""
    import numpy as np
    import torch

    if not isinstance(answer.module, torch.nn.Module):
        raise SourceError(f"{where}: Detector.module is no nn.Module")
    try:
        anchors = np.ascontiguousarray(np.asarray(answer.anchors, dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise SourceError(f"{where}: Detector.anchors is no array: {error}") from None
    if anchors.ndim != 2 or anchors.shape[1] != 4 or not 1 <= len(anchors) <= limits.MAX_ANCHORS:
        raise SourceError(
            f"{where}: Detector.anchors is {list(anchors.shape)}; [N, 4] is needed, N up to "
            f"{limits.MAX_ANCHORS}"
        )
    if not np.isfinite(anchors).all() or (anchors[:, 2:] <= anchors[:, :2]).any():
        raise SourceError(
            f"{where}: Detector.anchors must be x_min, y_min, x_max, y_max in input pixels, "
            "with x_max > x_min and y_max > y_min"
        )
    if not 1 <= answer.classes <= limits.MAX_LABELS:
        raise SourceError(f"{where}: Detector.classes is {answer.classes}")
    if answer.activation not in ("sigmoid", "softmax"):
        raise SourceError(f"{where}: Detector.activation must be sigmoid or softmax")
    weights = tuple(float(weight) for weight in answer.box_weights)
    if len(weights) != 4 or not all(math.isfinite(w) and w > 0 for w in weights):
        raise SourceError(f"{where}: Detector.box_weights must be four positive numbers")
    answer.anchors, answer.box_weights = anchors, weights
    return answer
