"""Losses to minimize, and figures on held-out images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch
import torch.nn.functional as F

from converters.finetune.images import DeclaredImages
from converters.finetune.settings import Objective

__all__ = ["Figures", "answers", "cross_entropy", "distillation", "evaluate"]

_BATCH = 64


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one model on held-out images."""

    loss: float
    top1: float | None
    agreement: float | None


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Mean cross-entropy with a share ``smoothing`` of each target spread over all classes."""
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def distillation(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student) of answers softened by T (Hinton et al., 2015), mean, nats."""
    return temperature**2 * F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        log_target=True,
        reduction="batchmean",
    )


def answers(model: Callable[[torch.Tensor], Any], images: DeclaredImages) -> torch.Tensor:
    """Logits ``[N, classes]``, without gradients."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.batches(_BATCH)])


def evaluate(
    logits: torch.Tensor,
    *,
    objective: Objective,
    labels: torch.Tensor | None,
    teacher: torch.Tensor | None,
    temperature: float = 1.0,
) -> Figures:
    """Figures of ``logits`` ``[N, classes]``, in double precision.

    The loss is cross-entropy against ``labels``, or with the objective ``teacher`` the
    distillation loss at ``temperature``; what is given besides is counted.
    """
    values = logits.double()
    chosen = values.argmax(dim=1)
    top1 = agreement = None
    if labels is not None:
        top1 = float((chosen == labels).double().mean())
    if teacher is not None:
        agreement = float((chosen == teacher.argmax(dim=1)).double().mean())
    if objective == "teacher":
        assert teacher is not None  # noqa: S101  # settings ask for it
        loss = float(distillation(values, teacher.double(), temperature))
    else:
        assert labels is not None  # noqa: S101  # settings ask for them
        loss = float(F.cross_entropy(values, labels))
    return Figures(loss=loss, top1=top1, agreement=agreement)
