"""Choose int8 weights by their effect on the answer, before any format is written.

Every exporter rounds a weight to the nearest of 255 steps. On small nets that is as bad as
a wrong pre-processing: 13.9 dB on MobileNetV1-0.25, where this pass keeps 32 dB. It moves
each float weight onto the int8 grid that all formats use (per output channel, symmetric,
largest magnitude = 127 steps), so that each exporter's own rounding reproduces exactly the
integers chosen here, and TFLite, TorchScript and Core ML share them.

Layer by layer, on calibration images, with X_q the layer's input in the model quantized so
far and X the input in the float model:

1. least squares: W* = argmin ||W X - W* X_q||^2 + damping: later layers make up for the
   errors of earlier ones;
2. rounding one input column after the other, spreading each column's error over the
   columns still to come, through the Cholesky factor of (X_q X_q^T)^-1: GPTQ (Frantar et
   al., ICLR 2023, algorithm 1), itself OBQ (Frantar & Alistarh, NeurIPS 2022);
3. bias correction: the mean error of each channel goes into its bias (Nagel et al.,
   ICCV 2019, section 4.2).

Deterministic on one machine: no random numbers, fixed order, double precision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["LEVELS", "round_weights", "sample_count"]

LEVELS = 127
_DAMPING = 0.01
_BLOCK = 64
_MIN_ROWS = 8192
_MAX_GROWTH = 1.25

Progress = Callable[[int, int], None]


def round_weights(model: nn.Module, samples: torch.Tensor, progress: Progress | None = None) -> int:
    """Round the weights of every ``Conv2d`` and ``Linear`` in place.

    ``model``: in eval mode, batch norms folded. ``samples``: float32 ``[N, C, H, W]``,
    pre-processed calibration images. ``progress``: called with (layers done, of). Returns
    the number of layers rounded.
    """
    layers = [m for m in model.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    done: set[nn.Module] = set()
    originals = {}
    for layer in layers:
        originals[layer] = (
            layer.weight.detach().clone(),
            layer.bias.detach().clone() if layer.bias is not None else None,
        )

    def hooked(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(both: torch.Tensor) -> torch.Tensor:
            quantized, exact = both.chunk(2)
            weight, bias = originals[layer]
            target = _apply(layer, exact, weight, bias)
            if layer not in done:
                done.add(layer)
                _round_layer(layer, quantized, exact, weight)
                _correct_bias(layer, quantized, target)
                if progress is not None:
                    progress(len(done), len(layers))
            return torch.cat([_apply(layer, quantized, layer.weight, layer.bias), target])

        return forward

    try:
        for layer in layers:
            layer.forward = hooked(layer)
        with torch.no_grad():
            model(torch.cat([samples, samples]))
    finally:
        for layer in layers:
            del layer.forward  # the class's own comes back
    return len(done)


def _apply(
    layer: nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    assert isinstance(layer, nn.Conv2d)  # noqa: S101
    return layer._conv_forward(x, weight, bias)


def _rows(layer: nn.Module, x: torch.Tensor, keep: int) -> torch.Tensor:
    """Input columns that one output sees: ``[groups, rows, inputs]``, double precision.

    At most about ``keep`` rows, evenly spaced over images and positions.
    """
    if isinstance(layer, nn.Linear):
        flat = x.reshape(-1, x.shape[-1])
        step = max(1, flat.shape[0] // keep)
        return flat[::step].double()[None]
    assert isinstance(layer, nn.Conv2d)  # noqa: S101
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=_pad_mode(layer))
        padding: int | tuple[int, ...] = 0
    else:
        padding = layer.padding
    per_image = max(1, keep // x.shape[0])
    parts = []
    for image in x:  # one image at a time: unfolding all would take k*k times the memory
        columns = F.unfold(image[None], layer.kernel_size, layer.dilation, padding, layer.stride)[0]
        step = max(1, columns.shape[1] // per_image)
        parts.append(columns[:, ::step])
    columns = torch.cat(parts, dim=1)
    grouped = columns.reshape(layer.groups, -1, columns.shape[1])
    return grouped.transpose(1, 2).double()


def _pad_mode(layer: nn.Conv2d) -> str:
    return "constant" if layer.padding_mode == "zeros" else layer.padding_mode


def _round_layer(
    layer: nn.Module, quantized: torch.Tensor, exact: torch.Tensor, weight: torch.Tensor
) -> None:
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    flat = weight.double().reshape(groups, weight.shape[0] // groups, -1)
    inputs = flat.shape[2]
    keep = max(_MIN_ROWS, 4 * inputs)
    x_q, x = _rows(layer, quantized, keep), _rows(layer, exact, keep)
    hessian = x_q.transpose(1, 2) @ x_q
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    damping = _DAMPING * diagonal.mean(dim=1)[:, None] + 1e-9
    eye = torch.eye(inputs, dtype=torch.float64)
    damped = hessian + eye * damping[:, :, None]
    # (X_q'X_q + d I) W*' = X_q'X W' + d W'
    right = x_q.transpose(1, 2) @ (x @ flat.transpose(1, 2))
    right = right + damping[:, :, None] * flat.transpose(1, 2)
    ideal = torch.linalg.solve(damped, right).transpose(1, 2)
    bound = flat.abs().amax(dim=2, keepdim=True) * _MAX_GROWTH
    ideal = torch.minimum(torch.maximum(ideal, -bound), bound)
    rounded = _gptq(ideal, damped)
    layer.weight.data = rounded.reshape(weight.shape).to(weight.dtype)


def _gptq(weights: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Round ``weights`` ``[groups, outputs, inputs]`` given ``hessian`` ``[groups, i, i]``.

    The grid of an output is its largest magnitude / 127; that weight is pinned to 127
    steps, so that exporters derive the same grid.
    """
    groups, outputs, inputs = weights.shape
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    rest = torch.gather(weights, 2, order[:, None, :].expand(-1, outputs, -1)).clone()
    permuted = torch.gather(hessian, 1, order[:, :, None].expand(-1, -1, inputs))
    permuted = torch.gather(permuted, 2, order[:, None, :].expand(-1, inputs, -1))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(permuted))
    upper = torch.linalg.cholesky(inverse, upper=True)
    largest = rest.abs().amax(dim=2, keepdim=True)
    scale = (largest / LEVELS).clamp(min=1e-30)
    pinned = torch.zeros_like(rest, dtype=torch.bool)
    pinned.scatter_(2, rest.abs().argmax(dim=2, keepdim=True), True)
    pin_value = torch.sign(rest) * LEVELS * scale
    result = torch.zeros_like(rest)
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        errors = torch.zeros(groups, outputs, stop - start, dtype=torch.float64)
        for column in range(start, stop):
            value = rest[:, :, column : column + 1]
            chosen = torch.clamp(torch.round(value / scale), -LEVELS, LEVELS) * scale
            chosen = torch.where(
                pinned[:, :, column : column + 1], pin_value[:, :, column : column + 1], chosen
            )
            result[:, :, column : column + 1] = chosen
            error = (value - chosen) / upper[:, column, column][:, None, None]
            errors[:, :, column - start : column - start + 1] = error
            rest[:, :, column:stop] -= error * upper[:, column, column:stop][:, None, :]
        rest[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    back = torch.zeros_like(result)
    return back.scatter_(2, order[:, None, :].expand(-1, outputs, -1), result)


def _correct_bias(layer: nn.Module, quantized: torch.Tensor, target: torch.Tensor) -> None:
    actual = _apply(layer, quantized, layer.weight, layer.bias)
    axes = [axis for axis in range(target.dim()) if axis != (1 if target.dim() == 4 else -1)]
    if isinstance(layer, nn.Linear):
        axes = list(range(target.dim() - 1))
    shift = (target - actual).mean(axes)
    if layer.bias is None:
        layer.bias = nn.Parameter(shift, requires_grad=False)
    else:
        layer.bias.data = layer.bias.data + shift


def sample_count(shape: tuple[int, ...]) -> int:
    """How many images to use of calibration pixels ``[N, C, H, W]``.

    32 at 224 x 224, more when they are small (each gives fewer positions), 128 at most.
    """
    area = shape[2] * shape[3]
    return max(1, min(shape[0], 128, max(32, 32 * 224 * 224 // area)))
