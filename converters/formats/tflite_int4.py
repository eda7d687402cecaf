"""4-bit weights for TFLite, chosen by their effect on the answer.

LiteRT has one scale an output channel for 4-bit weights, and no 4-bit depthwise or transposed
convolution. Rounded one by one, weights of 15 steps leave nothing of a small net (-4 dB of
MobileNetV1-0.25). Here a scale may cut the largest magnitudes off, layers make up for each
other's errors (``converters.rewrites.compensate``), and what is narrow has 8 bits: next to none
of the bytes are there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch

from converters.formats.inner import inner_module
from converters.formats.net_inputs import net_inputs
from converters.ready import ReadyModule
from converters.rewrites.compensate import Layer, compensate, compressible, is_wide
from converters.rewrites.rounding import LEVELS, SharedGrid
from converters.worker import report_progress

__all__ = ["FOUR_BIT_LEVELS", "choose_int4"]

FOUR_BIT_LEVELS: Final = 7
_CUTS: Final = tuple(float(cut) for cut in np.linspace(0.4, 1.0, 25))
"""Of the largest magnitude: where the range may end."""


def choose_int4(ready: ReadyModule, kept: tuple[str, ...]) -> tuple[str, ...]:
    """Move the weights of ``ready.module`` onto 4-bit and 8-bit grids, in place.

    ``ready``: batch norms folded. ``kept``: modules that stay as they are. Returns the names of
    the rewrites; none, and the weights as before, without calibration inputs and where the model
    cannot run on batches.
    """
    if not ready.calibration_count:
        return ()
    model = inner_module(ready.module)
    layers = {
        name: layer
        for name, layer in compressible(model).items()
        if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in kept)
    }

    def fit(layer: Layer, weight: torch.Tensor, importance: torch.Tensor) -> SharedGrid:
        weights: Any = layer.weight
        if not is_wide(weights.shape[1]):
            return SharedGrid(weight, LEVELS)
        return SharedGrid(weight, FOUR_BIT_LEVELS, _cuts(weight, importance))

    progress: Callable[[int, int], None] = lambda done, count: report_progress(  # noqa: E731
        "choosing weights", done, count
    )
    try:
        compensate(model, layers, net_inputs(ready, model), fit, progress)
    except Exception as error:  # a model may take batch 1 only; it raises what it likes
        report_progress(f"weights are rounded one by one: {type(error).__name__}")
        return ()
    return ("compensate_weights",)


def _cuts(weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """For each output the share of its largest magnitude where 7 steps end, ``[O]``.

    Whichever leaves the least squared error, weighted by ``importance`` ``[G, I*K]`` of the
    columns of ``weight`` ``[O, I, K]``.
    """
    rows = weight.flatten(1)
    weights = importance.repeat_interleave(rows.shape[0] // importance.shape[0], 0)
    largest = rows.abs().amax(1, keepdim=True)
    best = torch.ones_like(largest)
    error = torch.full_like(largest, float("inf"))
    for cut in _CUTS:
        scale = (largest * cut / FOUR_BIT_LEVELS).clamp(min=1e-30)
        steps = torch.clamp(torch.round(rows / scale), -FOUR_BIT_LEVELS, FOUR_BIT_LEVELS)
        cost = ((steps * scale - rows) ** 2 * weights).sum(1, keepdim=True)
        best = torch.where(cost < error, torch.full_like(best, cut), best)
        error = torch.minimum(cost, error)
    return best[:, 0]
