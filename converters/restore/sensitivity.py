"""How much each layer alone suffers from 8 bits: simulated, so no conversion is needed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from converters.restore.simulate import QuantizedModel

__all__ = ["SQNR_CAP_DB", "keep_curve", "layer_sensitivity", "simulated_sqnr_db", "sqnr_db"]

SQNR_CAP_DB = 200.0
"""Reported for identical answers."""

_BATCH = 8

Progress = Callable[[int, int], None]


def layer_sensitivity(
    module: nn.Module, samples: torch.Tensor, progress: Progress | None = None
) -> list[tuple[str, float]]:
    """Layers with the SQNR of the answer when only this layer is rounded, worst first.

    ``module``: in eval mode, best with the weights that the conversion will round
    (``rewrites/rounding.py``). ``samples``: float32 ``[N, ...]``, calibration inputs. A
    layer is a module with the weight of a convolution or linear call; its weight and its
    stored output (behind batch norm and ReLU) become 8-bit. SQNR is
    10 log10(sum r^2 / sum (r - a)^2) in dB over all outputs of one sample, mean over the
    samples. Equal figures stay in the order of execution. Raises ``SourceError`` for a
    model without layers, or with control flow that depends on the data.
    """
    model = QuantizedModel(module, samples[:1])
    model.measure(samples.split(_BATCH), round_weights=False)
    exact = _answers(module, samples)
    layers = model.tape.layers
    figures = []
    for done, layer in enumerate(layers):
        if progress is not None:
            progress(done, len(layers))
        answer = _answers(functools.partial(model, only=(layer,)), samples)
        figures.append((layer, sqnr_db(exact, answer)))
    return sorted(figures, key=lambda figure: figure[1])


def simulated_sqnr_db(
    module: nn.Module,
    samples: torch.Tensor,
    keep: Sequence[str] = (),
    *,
    activations_only: bool = False,
) -> float:
    """SQNR of the whole rounded model, in dB, with the layers ``keep`` left in float.

    ``activations_only``: no weight is rounded.
    """
    model = QuantizedModel(module, samples[:1], bits=None if activations_only else 8)
    model.measure(samples.split(_BATCH), round_weights=False)
    answer = _answers(functools.partial(model, keep=keep), samples)
    return sqnr_db(_answers(module, samples), answer)


def keep_curve(
    module: nn.Module, samples: torch.Tensor, order: Sequence[str]
) -> list[tuple[int, float]]:
    """The simulated SQNR in dB when the first 0, 1, 2, 4 ... layers of ``order`` stay float.

    Up to half of them.
    """
    most = max(1, len(order) // 2)
    counts = [0, 1]
    while counts[-1] < most:
        counts.append(min(2 * counts[-1], most))
    model = QuantizedModel(module, samples[:1])
    model.measure(samples.split(_BATCH), round_weights=False)
    exact = _answers(module, samples)
    return [
        (count, sqnr_db(exact, _answers(functools.partial(model, keep=order[:count]), samples)))
        for count in counts
    ]


def _answers(model: Callable[[torch.Tensor], Any], samples: torch.Tensor) -> torch.Tensor:
    """All outputs of each sample in one row, double precision."""
    rows = []
    with torch.no_grad():
        for batch in samples.split(_BATCH):
            outputs = _tensors(model(batch))
            rows.append(torch.cat([out.double().flatten(1) for out in outputs], dim=1))
    return torch.cat(rows)


def _tensors(answer: Any) -> list[torch.Tensor]:
    if isinstance(answer, torch.Tensor):
        return [answer]
    values = answer.values() if isinstance(answer, dict) else answer
    return [tensor for value in values for tensor in _tensors(value)]


def sqnr_db(exact: torch.Tensor, answer: torch.Tensor) -> float:
    """Mean over the samples, ``[N, numbers]`` each, in dB; within +-``SQNR_CAP_DB``."""
    signal = exact.square().sum(dim=1)
    noise = (exact - answer).square().sum(dim=1)
    ratio = 10.0 * torch.log10(signal / noise)
    ratio = torch.where(noise == 0, torch.full_like(ratio, SQNR_CAP_DB), ratio)
    ratio = torch.nan_to_num(ratio, nan=-SQNR_CAP_DB)
    return float(ratio.clamp(-SQNR_CAP_DB, SQNR_CAP_DB).mean())
