"""Modules around a model that give its answer the shape that nearfar's tasks define.

This module imports torch at its top: import it only where a model is built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["DetectionHeads", "Entry", "FirstTwo"]


class DetectionHeads(nn.Module):
    """Backbone and heads of a torchvision detector: ``deltas`` and ``logits``."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalized images ``[B, 3, H, W]`` to ``[B, N, 4]`` and ``[B, N, C]``."""
        features = self.backbone(image)
        answer = self.head(list(features.values()))
        return answer["bbox_regression"], answer["cls_logits"]


class Entry(nn.Module):
    """One entry of a model's dict or tuple."""

    def __init__(self, model: nn.Module, key: str | int) -> None:
        super().__init__()
        self.model = model
        self.key = key

    def forward(self, image: torch.Tensor) -> Any:
        """``model(image)[key]``."""
        return self.model(image)[self.key]


class FirstTwo(nn.Module):
    """Image and mean of a variational autoencoder that also answers the log-variance."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first two tensors of the answer."""
        answer = self.model(image)
        return answer[0], answer[1]
