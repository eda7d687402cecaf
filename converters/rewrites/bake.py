"""Put normalization and channel order into the graph: the file then takes 8-bit pixels.

The module gets RGB (or gray) values 0..255, in any number type, where it got normalized
float32 before: y[c] = (x[order[c]] / scale - mean[c]) / std[c].
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from edge_runtime.contract.preprocess import Preprocess

__all__ = ["BakedInput"]


class BakedInput(nn.Module):
    """``model`` behind its own normalization: ``[B, C, H, W]`` pixel values in."""

    def __init__(self, model: nn.Module, record: Preprocess) -> None:
        super().__init__()
        table = record.normalization
        std = np.array(table.std, dtype=np.float64)
        multiplier = 1.0 / (table.scale * std)
        offset = -np.array(table.mean, dtype=np.float64) / std
        shape = (1, -1, 1, 1)
        self.register_buffer("multiplier", torch.tensor(multiplier.reshape(shape)).float())
        self.register_buffer("offset", torch.tensor(offset.reshape(shape)).float())
        self.swap = record.color == "BGR"
        self.model = model

    def forward(self, image: torch.Tensor) -> object:
        """Pixel values, RGB or gray, any number type."""
        values = image.to(torch.float32)
        if self.swap:
            values = torch.cat([values[:, 2:3], values[:, 1:2], values[:, 0:1]], dim=1)
        return self.model(values * self.multiplier + self.offset)
