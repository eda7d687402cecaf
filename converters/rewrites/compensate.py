"""Move weights onto coarse grids so that the answer changes least.

Rounding each weight on its own leaves little of a small net: 2 dB of MobileNetV2 in 4 bits,
14 dB of MobileNetV1-0.25 in 8. Letting later weights and layers make up for the errors of
earlier ones leaves 12 dB and 32 dB. Layer by layer, on calibration inputs, with X_q the
layer's input in the model changed so far and X the input in the float model:

1. least squares: W* = argmin ||W X - W* X_q||^2 + damping: later layers make up for the
   errors of earlier ones;
2. rounding one input column after the other, spreading each column's error over the
   columns still to come, through the Cholesky factor of (X_q X_q^T)^-1: GPTQ (Frantar et
   al., ICLR 2023, algorithm 1), itself OBQ (Frantar & Alistarh, NeurIPS 2022). For sparse
   grids that is SparseGPT with a given mask (Frantar & Alistarh, ICML 2023, section 3.1);
3. bias correction: the mean error of each channel goes into its bias (Nagel et al.,
   ICCV 2019, section 4.2).

Deterministic on one machine: no random numbers, fixed order, double precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

__all__ = [
    "WIDE", "Layer", "Steps", "Weights", "compensate", "compressible", "first_tensor", "is_wide",
    "put_weights", "weights_of",
]  # fmt: skip

Layer: TypeAlias = nn.Module
"""``Conv2d`` or ``Linear``."""


Weights: TypeAlias = dict[str, tuple[torch.Tensor, torch.Tensor | None]]
"""Weight and bias of layers, by name."""


class Steps(Protocol):
    """The numbers one layer may hold."""

    def nearest(self, columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Round ``values`` ``[G, R]``: row r of group g, at column ``columns[g]`` of ``I*K``.

        The outputs of a layer are its groups' rows one after another: O = G * R.
        """


G = TypeVar("G", bound=Steps)
FitGrid = Callable[[Layer, torch.Tensor, torch.Tensor], G | None]
"""From a layer, its ideal weight ``[O, I, K]`` and the importance of its columns
``[G, I*K]`` to its grid; None: leave the layer alone."""
Progress = Callable[[int, int], None]

_DAMPING = 0.01
_FEW = 32
"""Where a layer sees less than so many rows a column, as the last one of a classifier does, the
damping grows by what is missing: else it learns the calibration inputs by heart (1 to 2 dB less
on other photos)."""
WIDE = 16
"""Inputs a group from which on a layer stands 4 bits or missing weights, as a rule."""
_BLOCK = 64
_LEAST_ROWS = 8192
_MAX_GROWTH = 1.25
_BATCH_TOLERANCE = 1e-3
_MAX_COLUMNS = 4608
"""Wider layers (the first linear layer of VGG) would take gigabytes and minutes; they are
rounded as they are."""


def compressible(module: nn.Module) -> dict[str, Layer]:
    """The layers that can be compensated, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if type(layer) in (nn.Conv2d, nn.Linear) and layer.weight[0].numel() <= _MAX_COLUMNS
    }


def is_wide(inputs: int) -> bool:
    """Whether a layer of so many inputs a group stands 4 bits or missing weights.

    Depthwise and first layers do not, and hold next to none of the bytes.
    """
    return inputs >= WIDE


def compensate(
    module: nn.Module,
    layers: dict[str, Layer],
    samples: torch.Tensor,
    fit: FitGrid[G],
    progress: Progress | None = None,
    *,
    half: bool = False,
) -> dict[str, G]:
    """Put the weights of ``layers`` on their grids, in place; returns the grids by name.

    ``module``: in eval mode, batch norms folded. ``samples``: its inputs, float32
    ``[N, ...]``. ``half``: the weights will be stored in fp16, and are rounded to that too.
    A layer that is called twice is fitted at its first call. Whatever the module raises for
    a batch of 2 N passes through, with its weights restored; ``ValueError`` when the inputs
    of a batch are no longer apart in it.
    """
    grids: dict[str, G] = {}
    with torch.no_grad():
        wanted = first_tensor(module(samples))
    originals = weights_of(layers)

    def hooked(name: str, layer: Layer) -> Callable[[torch.Tensor], torch.Tensor]:
        fitted = False

        def forward(both: torch.Tensor) -> torch.Tensor:
            nonlocal fitted
            changed, exact = both.chunk(2)
            weight, bias = originals[name]
            target = _apply(layer, exact, weight, bias)
            if not fitted:
                fitted = True
                grid = _fit_layer(layer, changed, exact, weight, fit, half)
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
            exact = first_tensor(module(torch.cat([samples, samples])))[len(samples) :]
        if not torch.allclose(exact, wanted, _BATCH_TOLERANCE, _BATCH_TOLERANCE):
            raise ValueError("the model mixes the inputs of a batch")
    except Exception:
        put_weights(layers, originals)
        raise
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)  # the class's own comes back
    return grids


def weights_of(layers: dict[str, Layer]) -> Weights:
    """Copies of weight and bias, by name."""
    return {
        name: (layer.weight.detach().clone(), None if layer.bias is None else layer.bias.clone())
        for name, layer in layers.items()
    }


def put_weights(layers: dict[str, Layer], weights: Weights) -> None:
    """Give ``layers`` these again: what ``compensate`` did is undone."""
    for name, layer in layers.items():
        weight, bias = weights[name]
        layer.weight.data = weight.clone()
        layer.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)


def first_tensor(answer: Any) -> torch.Tensor:
    """Of what a net answers, the first tensor."""
    while not isinstance(answer, torch.Tensor):
        answer = next(iter(answer.values() if isinstance(answer, dict) else answer))
    return answer


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
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0, 0)
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
    layer: Layer,
    changed: torch.Tensor,
    exact: torch.Tensor,
    weight: torch.Tensor,
    fit: FitGrid[G],
    half: bool,
) -> G | None:
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    flat = weight.double().reshape(groups, weight.shape[0] // groups, -1)
    columns = flat.shape[2]
    keep = max(_LEAST_ROWS, 4 * columns)
    x_changed, x_exact = _rows(layer, changed, keep), _rows(layer, exact, keep)
    hessian = x_changed.transpose(1, 2) @ x_changed
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    few = max(1.0, _FEW * columns / x_changed.shape[1])
    damping = _DAMPING * few * diagonal.mean(dim=1)[:, None] + 1e-9
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
        stored = rounded.half() if half else rounded
        layer.weight.data = stored.reshape(weight.shape).to(weight.dtype)
    return grid


def _spread_errors(weights: torch.Tensor, hessian: torch.Tensor, grid: Steps) -> torch.Tensor:
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
