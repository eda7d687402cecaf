"""MIL operators that change the size of images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from edge_runtime.runtimes.mil.registry import Function, Ints, Tensor

__all__ = ["OPERATORS"]


def _scaled_size(x: Tensor, height: float, width: float) -> tuple[int, int]:
    # The factor may be a rounded quotient: 7 * (5 / 7) must stay 5.
    return (
        math.floor(x.shape[-2] * height + 1e-4),
        math.floor(x.shape[-1] * width + 1e-4),
    )


def _positions(length: int, target: int, mode: str) -> Tensor:
    """Where to sample an axis: the formulas of MIL's ``resize_bilinear``, float64."""
    step = torch.arange(target, dtype=torch.float64)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if target == 1:
            middle = (length - 1) / 2 if mode == "ALIGN_CORNERS" else 0.0
            return torch.full((1,), middle, dtype=torch.float64)
        points = step * ((length - 1) / (target - 1))
    elif mode == "DEFAULT":
        points = step * (0.0 if target == 1 else (length - length / target) / (target - 1))
    elif mode == "OFFSET_CORNERS":
        delta = max(1, length - 1) / target
        points = 0.5 * delta + step * delta
    elif mode == "UNALIGN_CORNERS":
        spacing = length / target
        points = step * spacing + 0.5 * spacing - 0.5
    else:
        raise ValueError(f"sampling_mode {mode!r}")
    return points.clamp(0, length - 1)


def _sample(x: Tensor, axis: int, points: Tensor) -> Tensor:
    """Linear interpolation of one axis at fractional positions."""
    low = points.floor().long()
    high = torch.clamp(low + 1, max=x.shape[axis] - 1)
    shape = [1] * x.dim()
    shape[axis] = -1
    share = (points - low).float().reshape(shape)
    below, above = x.index_select(axis, low), x.index_select(axis, high)
    return below + (above - below) * share


def _bilinear(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    x = _sample(x, x.dim() - 2, _positions(x.shape[-2], height, mode))
    return _sample(x, x.dim() - 1, _positions(x.shape[-1], width, mode))


def _nearest(x: Tensor, height: int, width: int) -> Tensor:
    """Source index floor(i * in / out), the rule of torch's and Core ML's nearest."""
    for axis, target in ((x.dim() - 2, height), (x.dim() - 1, width)):
        length = x.shape[axis]
        if target != length:
            places = torch.arange(target) * length // target
            x = x.index_select(axis, places)
    return x


def _upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: float = 1.0, scale_factor_width: float = 1.0
) -> Tensor:
    return _nearest(x, *_scaled_size(x, scale_factor_height, scale_factor_width))


def _resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    return _nearest(x, target_size_height, target_size_width)


def _upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1.0,
    scale_factor_width: float = 1.0,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    height, width = _scaled_size(x, scale_factor_height, scale_factor_width)
    half = not align_corners if half_pixel_centers is None else half_pixel_centers
    if align_corners and half:
        raise ValueError("align_corners and half_pixel_centers contradict each other")
    if not align_corners and not half:
        return _bilinear(x, height, width, "DEFAULT")
    flat = x.reshape(1, -1, *x.shape[-2:])
    grown = F.interpolate(flat, (height, width), mode="bilinear", align_corners=align_corners)
    return grown.reshape(*x.shape[:-2], height, width)


def _resize_bilinear(
    x: Tensor,
    target_size_height: int = 1,
    target_size_width: int = 1,
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    return _bilinear(x, target_size_height, target_size_width, sampling_mode)


def _resize(
    x: Tensor,
    shape: Ints,
    resized_dims: int,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    if resized_dims > 2:
        raise ValueError(f"resize of {resized_dims} axes")
    targets = shape[len(shape) - resized_dims :]
    for number, target in enumerate(targets):
        axis = x.dim() - resized_dims + number
        if target in (0, x.shape[axis]):
            continue
        points = _positions(x.shape[axis], target, sampling_mode)
        if interpolation_mode == "LINEAR":
            x = _sample(x, axis, points)
        elif interpolation_mode == "NEAREST_NEIGHBOR":
            x = x.index_select(axis, torch.arange(target) * x.shape[axis] // target)
        else:
            raise ValueError(f"interpolation_mode {interpolation_mode!r}")
    return x


OPERATORS: dict[str, Function] = {
    "resize": _resize,
    "resize_bilinear": _resize_bilinear,
    "resize_nearest_neighbor": _resize_nearest_neighbor,
    "upsample_bilinear": _upsample_bilinear,
    "upsample_nearest_neighbor": _upsample_nearest_neighbor,
}
