"""Choose int8 weights by their effect on the answer, before any format is written.

Every exporter rounds a weight to the nearest of 255 steps. On small nets that is as bad as
a wrong pre-processing: 13.9 dB on MobileNetV1-0.25, where this pass keeps 32 dB. It moves
each float weight onto the int8 grid that all formats use (per output channel, symmetric,
largest magnitude = 127 steps) as ``converters.rewrites.compensate`` does, so that each
exporter's own rounding reproduces exactly the integers chosen here, and TFLite, TorchScript,
ExecuTorch and Core ML share them.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from converters.rewrites.compensate import Layer, Progress, compensate, compressible

__all__ = ["LEVELS", "SharedGrid", "round_weights", "sample_count"]

LEVELS = 127
_SMALLEST = 1e-30


def round_weights(model: nn.Module, samples: torch.Tensor, progress: Progress | None = None) -> int:
    """Round the weights of ``Conv2d`` and ``Linear`` layers in place.

    ``model``: in eval mode, batch norms folded. ``samples``: float32 ``[N, C, H, W]``,
    pre-processed calibration images. ``progress``: called with (layers done, of). Returns
    the number of layers rounded. The very wide among them are rounded weight by weight, so
    that all exporters find the same integers there too. Raises ``ValueError`` for a model that
    mixes the inputs of a batch, and what the model raises for a batch of 2 N, its weights as
    before.
    """

    def fit(_layer: Layer, weight: torch.Tensor, _importance: torch.Tensor) -> SharedGrid:
        return SharedGrid(weight, LEVELS)

    apart = compressible(model)
    rounded = len(compensate(model, apart, samples, fit, progress))
    wide = [
        layer
        for name, layer in model.named_modules()
        if type(layer) in (nn.Conv2d, nn.Linear) and name not in apart
    ]
    for layer in wide:
        for row in layer.weight.data:  # one at a time: all of VGG's in doubles take a gigabyte
            scale = (row.double().abs().amax() / LEVELS).clamp(min=_SMALLEST)
            row.copy_(torch.clamp(torch.round(row.double() / scale), -LEVELS, LEVELS) * scale)
    return rounded + len(wide)


class SharedGrid:
    """``levels`` steps on each side of zero, one scale an output: what every exporter finds.

    An output's largest magnitude stands for ``levels`` steps and stays so, as exporters take
    the scale from it.
    """

    def __init__(self, weight: torch.Tensor, levels: int, cuts: torch.Tensor | None = None) -> None:
        """``weight``: ``[O, I, K]``, the ideal weights, double precision.

        ``cuts``: ``[O]``, the share of the largest magnitude where the steps end; None: at it.
        """
        flat = weight.flatten(1)
        largest = flat.abs()
        ends = largest.amax(1) if cuts is None else largest.amax(1) * cuts
        self._levels = levels
        self.scale = (ends / levels).clamp(min=_SMALLEST)
        self.pinned = largest.argmax(1)
        self.sign = torch.sign(flat.gather(1, self.pinned[:, None])[:, 0])

    def nearest(self, columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See ``Steps``."""
        scale = self.scale.reshape(values.shape)
        steps = torch.clamp(torch.round(values / scale), -self._levels, self._levels)
        pinned = self.pinned.reshape(values.shape) == columns[:, None]
        return torch.where(pinned, self.sign.reshape(values.shape) * self._levels, steps) * scale


def sample_count(shape: tuple[int, ...]) -> int:
    """How many inputs to use of calibration inputs ``[N, C, H, W]``, or latents ``[N, C]``.

    32 at 224 x 224, more when they are small (each gives fewer positions), 128 at most.
    """
    area = math.prod(shape[2:])
    return max(1, min(shape[0], 128, max(32, 32 * 224 * 224 // area)))
