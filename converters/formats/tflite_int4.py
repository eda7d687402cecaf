"""4-bit weights for TFLite, chosen by their effect on the answer.

LiteRT has one scale an output channel for 4-bit weights, and no 4-bit depthwise or transposed
convolution. Rounded one by one, weights of 15 steps leave nothing of a small net (-4 dB of
MobileNetV1-0.25). Here a scale may cut the largest magnitudes off, layers make up for each
other's errors (``converters.rewrites.compensate``), and what is narrow has 8 bits: next to none
of the bytes are there. Where that leaves too little of the answers, wider layers have 8 bits too.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch

from converters.formats.inner import inner_module
from converters.formats.net_inputs import net_inputs, other_inputs
from converters.ready import ReadyModule
from converters.restore.sensitivity import sqnr_db
from converters.rewrites.compensate import (
    WIDE,
    Layer,
    compensate,
    compressible,
    first_tensor,
    put_weights,
    weights_of,
)
from converters.rewrites.rounding import LEVELS, SharedGrid
from converters.worker import report_progress

__all__ = ["FOUR_BIT_LEVELS", "choose_int4"]

_WIDTHS: Final = (WIDE, 4 * WIDE, 16 * WIDE)
"""Inputs a group from which on a layer has 4 bits: the first that leaves enough is taken."""
_ENOUGH_DB: Final = 15.0
"""On inputs that chose no weight. At 10 dB MobileNetV1-0.25 has another answer for three photos
in ten."""
_JUDGED: Final = 4
"""Of so many inputs one judges where there are no others."""
FOUR_BIT_LEVELS: Final = 7
_CUTS: Final = tuple(float(cut) for cut in np.linspace(0.4, 1.0, 25))
"""Of the largest magnitude: where the range may end."""


def choose_int4(ready: ReadyModule, kept: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
    """Move the weights of ``ready.module`` onto 4-bit and 8-bit grids, in place.

    ``ready``: batch norms folded. ``kept``: modules that stay as they are. Returns the number of
    inputs a group from which on a layer has 4 bits, and the names of the rewrites; none, and
    the weights as before, without calibration inputs and where the model cannot run on batches.
    """
    if not ready.calibration_count:
        return WIDE, ()
    model = inner_module(ready.module)
    layers = {
        name: layer
        for name, layer in compressible(model).items()
        if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in kept)
    }
    widths = [_inputs(layer) for layer in layers.values()]
    before = weights_of(layers)
    try:
        samples = net_inputs(ready, model)
        fitted, others = _apart(samples, other_inputs(ready, model))
        with torch.no_grad():
            exact = first_tensor(model(others)).flatten(1)
        for least in _WIDTHS:
            put_weights(layers, before)
            compensate(model, layers, fitted, _fit_from(least), _report)
            with torch.no_grad():
                left_db = sqnr_db(exact, first_tensor(model(others)).flatten(1))
            report_progress(f"4 bits from {least} inputs on leave {left_db:.1f} dB")
            if left_db >= _ENOUGH_DB or max(widths, default=0) < 4 * least:
                break
        if fitted is not samples:
            put_weights(layers, before)
            compensate(model, layers, samples, _fit_from(least), _report)
    except Exception as error:  # a model may take batch 1 only; it raises what it likes
        put_weights(layers, before)
        report_progress(f"weights are rounded one by one: {type(error).__name__}")
        return WIDE, ()
    return least, ("compensate_weights",)


def _apart(samples: torch.Tensor, others: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs to fit to, and inputs that judge: of few, a quarter; of fewer than 4, the same."""
    if others is not None:
        return samples, others
    if len(samples) < _JUDGED:
        return samples, samples
    judges = torch.arange(len(samples)) % _JUDGED == _JUDGED - 1
    return samples[~judges], samples[judges]


def _inputs(layer: Layer) -> int:
    """Inputs a group."""
    weight: Any = layer.weight
    return int(weight.shape[1])


def _fit_from(least: int) -> Callable[[Layer, torch.Tensor, torch.Tensor], SharedGrid]:
    def fit(layer: Layer, weight: torch.Tensor, importance: torch.Tensor) -> SharedGrid:
        if _inputs(layer) < least:
            return SharedGrid(weight, LEVELS)
        return SharedGrid(weight, FOUR_BIT_LEVELS, _cuts(weight, importance))

    return fit


def _report(done: int, count: int) -> None:
    report_progress("choosing weights", done, count)


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
