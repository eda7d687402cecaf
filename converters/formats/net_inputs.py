"""Calibration inputs as they reach the net itself, behind what bakes normalization in."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from converters.ready import ReadyModule

__all__ = ["net_inputs", "other_inputs"]

_MOST_BYTES = 512 * 2**20
"""Of the largest activation, for all samples together."""
_MOST_SAMPLES = 32


class _Seen(Exception):  # no error: it ends a forward pass
    """The net's input is known; what follows it need not run."""


def net_inputs(ready: ReadyModule, model: Any) -> torch.Tensor:
    """Inputs of the net itself, evenly spaced: as many as its largest activation allows."""
    found = _inputs(ready, model, other=False)
    assert found is not None  # noqa: S101  # there is one at least
    return found


def other_inputs(ready: ReadyModule, model: Any) -> torch.Tensor | None:
    """At most as many again, of those that ``net_inputs`` leaves out; None: it takes all."""
    return _inputs(ready, model, other=True)


def _inputs(ready: ReadyModule, model: Any, *, other: bool) -> torch.Tensor | None:
    found: list[torch.Tensor] = []

    def see(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        found.append(inputs[0])
        raise _Seen

    def inputs(places: Any) -> torch.Tensor:
        found.clear()
        hook = model.register_forward_pre_hook(see)
        try:
            for place in places:
                with contextlib.suppress(_Seen), torch.no_grad():
                    ready.module(torch.from_numpy(ready.calibration(int(place), int(place) + 1)))
        finally:
            hook.remove()
        return torch.cat(found)

    each = 2 * _largest_activation(model, inputs([0])) * 4  # exact and changed side by side
    count = min(ready.calibration_count, _MOST_SAMPLES, max(1, _MOST_BYTES // max(each, 1)))
    taken = np.linspace(0, ready.calibration_count - 1, count).round()
    left = np.setdiff1d(np.arange(ready.calibration_count), taken)
    if not other:
        return inputs(taken)
    if not len(left):
        return None
    return inputs(left[np.linspace(0, len(left) - 1, min(count, len(left))).astype(int)])


def _largest_activation(model: Any, sample: torch.Tensor) -> int:
    """Numbers in the largest output of a layer, for one input."""
    largest = 0

    def measure(_module: Any, _inputs: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, output.numel())

    hooks = [module.register_forward_hook(measure) for module in model.modules()]
    try:
        with torch.no_grad():
            model(sample)
    finally:
        for hook in hooks:
            hook.remove()
    return largest
