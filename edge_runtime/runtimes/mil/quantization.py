"""MIL operators between real numbers and 8-bit integers, and the classifier's end."""

from __future__ import annotations

from typing import Any

import torch

from edge_runtime.runtimes.mil.registry import Function, Tensor

__all__ = ["OPERATORS", "round_trip"]

_LEVELS = {"int8": (-128, 127, torch.int8), "uint8": (0, 255, torch.uint8)}


def _along(parameter: Tensor, rank: int, axis: int | None) -> Tensor:
    if parameter.dim() == 0 or axis is None:
        return parameter.float()
    shape = [1] * rank
    shape[axis] = -1
    return parameter.reshape(shape).float()


def _quantize(
    input: Tensor,  # noqa: A002  # MIL's name
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """clip(round(input / scale) + zero_point), halves to even."""
    low, high, kind = _LEVELS[output_dtype]
    levels = torch.div(input, _along(scale, input.dim(), axis)).round_()
    if zero_point is not None:
        levels = levels.add_(_along(zero_point, input.dim(), axis))
    return levels.clamp_(low, high).to(kind)


def _dequantize(
    input: Tensor,  # noqa: A002  # MIL's name
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """The real numbers: scale * (input - zero_point)."""
    values = input.float()
    if zero_point is not None:
        values = values - _along(zero_point, input.dim(), axis)
    return values * _along(scale, input.dim(), axis)


def round_trip(x: Tensor, scale: float, zero_point: int, output_dtype: str) -> Tensor:
    """``quantize`` and ``dequantize`` with the same numbers, in four passes and no integers.

    The same result as the two, bit for bit: clip(r + z) - z = clip(r) to shifted bounds,
    and all of these are small whole numbers.
    """
    low, high, _ = _LEVELS[output_dtype]
    levels = torch.div(x, scale).round_().clamp_(low - zero_point, high - zero_point)
    return levels.mul_(scale)


def _classify(probabilities: Tensor, classes: Any) -> tuple[str, Tensor]:
    """The best class's label, and the scores in the order of ``classes``."""
    labels = [str(label) for label in classes]
    scores = probabilities.reshape(-1)
    if len(labels) != scores.numel():
        raise ValueError(f"{len(labels)} labels for {scores.numel()} scores")
    return labels[int(torch.argmax(scores))], scores


OPERATORS: dict[str, Function] = {
    "classify": _classify,
    "dequantize": _dequantize,
    "quantize": _quantize,
}
