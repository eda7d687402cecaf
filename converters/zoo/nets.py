"""The two networks of the zoo pair: plain Conv + BatchNorm + ReLU, traceable by torch.fx.

Both take float32 ``[N, 3, S, S]`` and give logits float32 ``[N, 10]``. The strongest
response wherever it lies in the frame decides (a max over the last feature map), so a
network also works on crops, which training uses. This module imports torch at its top:
import it only where a network is built.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["DigitsLarge", "DigitsSmall"]


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


class DigitsSmall(nn.Module):
    """13 thousand parameters, input ``[N, 3, 32, 32]``: for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_conv(3, 8),
            nn.MaxPool2d(2),
            *_conv(8, 24),
            nn.MaxPool2d(2),
            *_conv(24, 48, stride=2),
        )
        self.pool = nn.MaxPool2d(4)
        self.classifier = nn.Linear(48, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits of each image."""
        return self.classifier(torch.flatten(self.pool(self.features(image)), 1))


class _Residual(nn.Module):
    """Two 3x3 convolutions beside an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv(channels, channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.relu = nn.ReLU()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.relu(features + self.body(features))


class DigitsLarge(nn.Module):
    """A residual network of 218 thousand parameters, input ``[N, 3, 96, 96]``."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_conv(3, 16, kernel=5, stride=2),
            *_conv(16, 24, stride=2),
            _Residual(24),
            *_conv(24, 48, stride=2),
            _Residual(48),
            *_conv(48, 80, stride=2),
            _Residual(80),
        )
        self.pool = nn.MaxPool2d(6)
        self.classifier = nn.Linear(80, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits of each image."""
        return self.classifier(torch.flatten(self.pool(self.features(image)), 1))
