"""Move weights onto coarse grids so that the answer changes least.

Rounding each weight to 4 bits on its own leaves nothing of a small net (2 dB on MobileNetV2);
letting later weights and layers make up for the errors of earlier ones leaves 12 dB. The
method is that of ``converters.rewrites.rounding`` (least squares against the inputs that the
compressed model really sees, GPTQ over the columns, bias correction), for any grid. For
sparse grids it is SparseGPT with a given mask (Frantar & Alistarh, ICML 2023, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from converters.formats.coreml_grids import Grid

__all__ = ["Layer", "compensate", "compressible"]

Layer: TypeAlias = nn.Module
"""``Conv2d`` or ``Linear``."""
FitGrid = Callable[[Layer, torch.Tensor, torch.Tensor], Grid | None]
"""From a layer, its ideal weight ``[O, I, K]`` and the importance of its columns
``[G, I*K]`` to its grid; None: leave the layer alone."""
Progress = Callable[[int, int], None]

_DAMPING = 0.01
_BLOCK = 64
_LEAST_ROWS = 8192
_MAX_GROWTH = 1.25
_MAX_COLUMNS = 4608
"""Wider layers (the first linear layer of VGG) would take gigabytes and minutes; they are
rounded as they are."""


def compressible(module: nn.Module) -> dict[str, Layer]:
    """The layers that can be compensated, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if type(layer) in (nn.Conv2d, nn.Linear)
        and layer.weight[0].numel() <= _MAX_COLUMNS
        and getattr(layer, "padding_mode", "zeros") == "zeros"
    }


def compensate(
    module: nn.Module,
    layers: dict[str, Layer],
    samples: torch.Tensor,
    fit: FitGrid,
    progress: Progress | None = None,
) -> dict[str, Grid]:
    """Put the weights of ``layers`` on their grids, in place; returns the grids by name.

    ``module``: in eval mode, batch norms folded. ``samples``: its inputs, float32
    ``[N, ...]``. A layer that is called twice is fitted at its first call. Whatever the
    module raises for a batch of 2 N passes through, with its weights restored.
    """
    grids: dict[str, Grid] = {}
    originals = {
        name: (layer.weight.detach().clone(), None if layer.bias is None else layer.bias.clone())
        for name, layer in layers.items()
    }

    def hooked(name: str, layer: Layer) -> Callable[[torch.Tensor], torch.Tensor]:
        fitted = False

        def forward(both: torch.Tensor) -> torch.Tensor:
            nonlocal fitted
            changed, exact = both.chunk(2)
            weight, bias = originals[name]
            target = _apply(layer, exact, weight, bias)
            if not fitted:
                fitted = True
                grid = _fit_layer(layer, changed, exact, weight, fit)
                if grid is not None:
                    grids[name] = grid
                    _correct_bias(layer, changed, target)
                if progress is not None:
                    progress(len(grids), len(layers))
            return torch.cat([_apply(layer, changed, layer.weight, layer.bias), target])

        return forward

    try:
        for name, layer in layers.items():
            layer.forward = hooked(name, layer)
        with torch.no_grad():
            module(torch.cat([samples, samples]))
    except Exception:
        for name, layer in layers.items():
            weight, bias = originals[name]
            layer.weight.data = weight
            layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        raise
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)  # the class's own comes back
    return grids


def _apply(
    layer: Layer, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)


def _rows(layer: Layer, x: torch.Tensor, keep: int) -> torch.Tensor:
    """Input columns that one output sees: ``[groups, rows, columns]``, double precision.

    About ``keep`` rows, evenly spaced over samples and positions.
    """
    if isinstance(layer, nn.Linear):
        flat = x.reshape(-1, x.shape[-1])
        return flat[:: max(1, flat.shape[0] // keep)].double()[None]
    if isinstance(layer.padding, str):
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice), (0, 0)
    else:
        padding = layer.padding
    each = max(1, keep // x.shape[0])
    parts = []
    for sample in x:  # unfolding all at once would take k*k times the memory
        columns = F.unfold(sample[None], layer.kernel_size, layer.dilation, padding, layer.stride)
        # A slice alone would keep the whole of ``columns`` alive.
        parts.append(columns[0][:, :: max(1, columns.shape[2] // each)].clone())
    joined = torch.cat(parts, dim=1)
    return joined.reshape(layer.groups, -1, joined.shape[1]).transpose(1, 2).double()


def _fit_layer(
    layer: Layer, changed: torch.Tensor, exact: torch.Tensor, weight: torch.Tensor, fit: FitGrid
) -> Grid | None:
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    flat = weight.double().reshape(groups, weight.shape[0] // groups, -1)
    columns = flat.shape[2]
    keep = max(_LEAST_ROWS, 4 * columns)
    x_changed, x_exact = _rows(layer, changed, keep), _rows(layer, exact, keep)
    hessian = x_changed.transpose(1, 2) @ x_changed
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    damping = _DAMPING * diagonal.mean(dim=1)[:, None] + 1e-9
    damped = hessian + torch.eye(columns, dtype=torch.float64) * damping[:, :, None]
    # (X'X + d I) W*' = X' X_exact W' + d W', X as the compressed model sees it
    right = x_changed.transpose(1, 2) @ (x_exact @ flat.transpose(1, 2))
    right = right + damping[:, :, None] * flat.transpose(1, 2)
    ideal = torch.linalg.solve(damped, right).transpose(1, 2)
    bound = flat.abs().amax(dim=2, keepdim=True) * _MAX_GROWTH
    ideal = torch.minimum(torch.maximum(ideal, -bound), bound)
    canonical = ideal.reshape(weight.shape[0], weight.shape[1], -1)
    grid = fit(layer, canonical, damped.diagonal(dim1=1, dim2=2))
    if grid is not None:
        rounded = _spread_errors(ideal, damped, grid)
        layer.weight.data = rounded.half().reshape(weight.shape).to(weight.dtype)
    return grid


def _spread_errors(weights: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round ``weights`` ``[groups, rows, columns]`` column by column: GPTQ, algorithm 1.

    Each column's error is spread over the columns still to come, through the Cholesky
    factor of the inverse of ``hessian`` ``[groups, columns, columns]``.
    """
    rows, columns = weights.shape[1:]
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    rest = torch.gather(weights, 2, order[:, None, :].expand(-1, rows, -1)).clone()
    permuted = torch.gather(hessian, 1, order[:, :, None].expand(-1, -1, columns))
    permuted = torch.gather(permuted, 2, order[:, None, :].expand(-1, columns, -1))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(permuted))
    upper = torch.linalg.cholesky(inverse, upper=True)
    result = torch.zeros_like(rest)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.zeros(*rest.shape[:2], stop - start, dtype=torch.float64)
        for column in range(start, stop):
            value = rest[:, :, column]
            chosen = grid.nearest(order[:, column], value)
            result[:, :, column] = chosen
            error = (value - chosen) / upper[:, column, column][:, None]
            errors[:, :, column - start] = error
            rest[:, :, column:stop] -= error[:, :, None] * upper[:, column, column:stop][:, None]
        rest[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    back = torch.zeros_like(result)
    return back.scatter_(2, order[:, None, :].expand(-1, rows, -1), result)


def _correct_bias(layer: Any, changed: torch.Tensor, target: torch.Tensor) -> None:
    """The mean error of each channel goes into its bias (Nagel et al., ICCV 2019, 4.2)."""
    actual = _apply(layer, changed, layer.weight, layer.bias)
    channel = target.dim() - 1 if isinstance(layer, nn.Linear) else 1
    shift = (target - actual).mean([axis for axis in range(target.dim()) if axis != channel])
    if layer.bias is None:
        layer.bias = nn.Parameter(shift, requires_grad=False)
    else:
        layer.bias.data = layer.bias.data + shift
