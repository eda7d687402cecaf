"""Choose compressed weights with the calibration inputs, before the program is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from converters.formats.coreml_grids import Grid, keep_highest, lamp_scores
from converters.formats.coreml_weights import fit_grid, weight_key
from converters.formats.inner import inner_module
from converters.formats.net_inputs import net_inputs
from converters.jobs import ConvertJob
from converters.ready import ReadyModule
from converters.rewrites.compensate import Layer, compensate, compressible, is_wide
from converters.worker import report_progress

__all__ = ["SPARSITY", "Choice", "choose_weights"]

SPARSITY = 0.3
"""Share of the weights of wide layers that become zero: the least that makes the file
clearly smaller (fp16: 1 + 0.7 * 16 bits in place of 16)."""
_SPARSER = (0.7, 0.6, 0.5, 0.4)
_LEAST_DB = 9.0
"""What the answer must keep after cutting alone; compensation then adds about 5 dB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Weights that lie on their grids, and what was done for it."""

    grids: Mapping[str, Grid]
    """By ``weight_key`` of the module's new weights."""
    sparsity: float
    rewrites: tuple[str, ...]


def choose_weights(ready: ReadyModule, job: ConvertJob, kept: tuple[str, ...]) -> Choice:
    """Change the weights of ``ready.module`` in place, where there are calibration inputs.

    int8 weights that all formats share (``job.rounded``) stay as they are.
    """
    sparse = job.precision.endswith("sparse")
    model = inner_module(ready.module)
    layers = {
        name: layer
        for name, layer in compressible(model).items()
        if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in kept)
    }
    if job.precision == "int8" or job.rounded is not None or not ready.calibration_count:
        return _plain(sparse)
    samples = net_inputs(ready, model)
    wide = {name: layer for name, layer in layers.items() if is_wide(layer.weight.shape[1])}
    masks: dict[int, torch.Tensor] = {}
    rewrites = ["compensate_weights"]
    sparsity = SPARSITY
    if sparse and wide:
        sparsity, found = _choose_sparsity(model, list(wide.values()), samples[:4])
        masks = {id(layer): mask for layer, mask in zip(wide.values(), found, strict=True)}
        rewrites.append(f"prune_{round(sparsity * 100)}")

    def fit(layer: Any, weight: torch.Tensor, importance: torch.Tensor) -> Grid | None:
        return fit_grid(job.precision, weight, importance, masks.get(id(layer)))

    try:
        grids = compensate(
            model,
            layers,
            samples,
            fit,
            lambda done, count: report_progress("choosing weights", done, count),
            half=True,
        )
    except Exception as error:  # a model may take batch 1 only; it raises what it likes
        report_progress(f"weights are rounded one by one: {type(error).__name__}")
        return _plain(sparse)
    by_key = {weight_key(layers[name].weight.numpy()): grid for name, grid in grids.items()}
    return Choice(grids=by_key, sparsity=sparsity, rewrites=tuple(rewrites))


def _plain(sparse: bool) -> Choice:
    """Every weight on its own."""
    rewrites = [f"prune_{round(SPARSITY * 100)}"] if sparse else []
    return Choice(grids={}, sparsity=SPARSITY, rewrites=tuple(rewrites))


def _choose_sparsity(
    module: Any, layers: list[Layer], samples: torch.Tensor
) -> tuple[float, list[torch.Tensor]]:
    """The highest sparsity that leaves the answer ``_LEAST_DB`` before compensation.

    Also which weights of each layer it leaves; the layers are as before.
    """
    scores = lamp_scores([layer.weight for layer in layers])
    own = [layer.weight.data for layer in layers]
    with torch.no_grad():
        exact = _flat(module(samples))
        for sparsity in _SPARSER:
            masks = keep_highest(scores, sparsity)
            try:
                for layer, weight, mask in zip(layers, own, masks, strict=True):
                    layer.weight.data = weight * mask
                wrong = _flat(module(samples)) - exact
            finally:
                for layer, weight in zip(layers, own, strict=True):
                    layer.weight.data = weight
            power, noise = float((exact**2).mean()), float((wrong**2).mean())
            if noise <= power * 10 ** (-_LEAST_DB / 10):
                return sparsity, masks
    return SPARSITY, keep_highest(scores, SPARSITY)


def _flat(answer: Any) -> torch.Tensor:
    parts = answer if isinstance(answer, tuple | list) else (answer,)
    return torch.cat([part.double().reshape(-1) for part in parts])
