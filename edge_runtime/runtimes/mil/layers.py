"""MIL operators with weights or windows: convolution, pooling, linear algebra."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from edge_runtime.runtimes.mil.registry import Function, Ints, Tensor

__all__ = ["OPERATORS"]

Pads = list[tuple[int, int]]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _pairs(flat: Ints, rank: int) -> Pads:
    if len(flat) != 2 * rank:
        raise ValueError(f"pad has {len(flat)} numbers for {rank} axes")
    return [(flat[2 * n], flat[2 * n + 1]) for n in range(rank)]


def _padding(
    kind: str, flat: Ints | None, sizes: Ints, kernel: Ints, stride: Ints, dilation: Ints
) -> Pads:
    """Padding before and after each spatial axis, from ``pad_type`` and ``pad``.

    ``same``: out = ceil(in / stride); an odd rest goes after (``same_lower``: before).
    """
    if kind == "valid":
        return [(0, 0)] * len(sizes)
    if kind == "custom":
        return _pairs(flat or [], len(sizes))
    if kind not in ("same", "same_lower"):
        raise ValueError(f"pad_type {kind!r}")
    pads = []
    for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True):
        total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
        small, large = total // 2, total - total // 2
        pads.append((large, small) if kind == "same_lower" else (small, large))
    return pads


def _pad(x: Tensor, pads: Pads, value: float = 0.0) -> Tensor:
    flat = [n for pair in reversed(pads) for n in pair]  # torch: last axis first
    return F.pad(x, flat, value=value) if any(flat) else x


def _symmetric(pads: Pads) -> bool:
    return all(before == after for before, after in pads)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    rank = x.dim() - 2
    stride, dilation = strides or [1] * rank, dilations or [1] * rank
    pads = _padding(pad_type, pad, list(x.shape[2:]), list(weight.shape[2:]), stride, dilation)
    if _symmetric(pads):
        padding = [before for before, _ in pads]
    else:
        x, padding = _pad(x, pads), [0] * rank
    return _CONV[rank](x, weight, bias, stride, padding, dilation, groups)


def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Ints | None = None,
    output_shape: Ints | None = None,
    pad_type: str = "valid",
    strides: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    rank = x.dim() - 2
    stride, dilation = strides or [1] * rank, dilations or [1] * rank
    full = _CONV_TRANSPOSE[rank](x, weight, bias, stride, 0, 0, groups, dilation)
    lengths = list(full.shape[2:])
    if pad_type == "custom":
        pads = _pairs(pad or [], rank)
    elif pad_type == "valid":
        pads = [(0, 0)] * rank
    else:
        pads = []
        for length, size, step in zip(lengths, x.shape[2:], stride, strict=True):
            extra = length - size * step
            small = extra // 2
            pads.append((extra - small, small) if pad_type == "same_lower" else
                        (small, extra - small))  # fmt: skip
    sizes = output_shape[-rank:] if output_shape is not None else None
    for axis, (before, after) in enumerate(pads):
        stop = lengths[axis] - after if sizes is None else before + sizes[axis]
        if stop > lengths[axis]:  # output padding reaches past the transposed kernel
            missing: Pads = [(0, 0)] * rank
            missing[axis] = (0, stop - lengths[axis])
            # Nothing reaches there but the bias.
            wider = _pad(full if bias is None else full - _channels(bias, full), missing)
            full = wider if bias is None else wider + _channels(bias, full)
        full = full.narrow(2 + axis, before, stop - before)
    return full


def _channels(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape([1, -1] + [1] * (x.dim() - 2))


def _window(
    size: int, kernel: int, stride: int, pads: tuple[int, int], *, ceil_mode: bool
) -> tuple[int, int]:
    """Output length, and how far its last window reaches past the padded input."""
    padded = size + sum(pads)
    if not ceil_mode:
        return (padded - kernel) // stride + 1, 0
    count = (padded - kernel + stride - 1) // stride + 1
    if sum(pads) > 0 and (count - 1) * stride >= size + sum(pads) / 2:
        count -= 1  # a window must start inside the input or its left padding
    return count, max((count - 1) * stride + kernel - padded, 0)


def _max_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: str,
    strides: Ints | None = None,
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    rank = len(kernel_sizes)
    stride = strides or [1] * rank
    pads = _padding(pad_type, pad, list(x.shape[2:]), kernel_sizes, stride, [1] * rank)
    if (
        not ceil_mode
        and _symmetric(pads)
        and all(2 * before <= k for (before, _), k in zip(pads, kernel_sizes, strict=True))
    ):
        return _MAX_POOL[rank](x, kernel_sizes, stride, [before for before, _ in pads])
    windows = _windows(x, kernel_sizes, stride, pads, ceil_mode)
    reach = [(b, a + over) for (b, a), (_, over) in zip(pads, windows, strict=True)]
    pooled = _MAX_POOL[rank](_pad(x, reach, float("-inf")), kernel_sizes, stride)
    return _shorten(pooled, windows)


def _windows(
    x: Tensor, kernel: Ints, stride: Ints, pads: Pads, ceil_mode: bool
) -> list[tuple[int, int]]:
    return [
        _window(size, k, s, pair, ceil_mode=ceil_mode)
        for size, k, s, pair in zip(x.shape[2:], kernel, stride, pads, strict=True)
    ]


def _shorten(x: Tensor, windows: list[tuple[int, int]]) -> Tensor:
    for axis, (count, _) in enumerate(windows):
        x = x.narrow(2 + axis, 0, count)
    return x


def _avg_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: str,
    strides: Ints | None = None,
    pad: Ints | None = None,
    ceil_mode: bool = False,
    exclude_padding_from_average: bool = False,
) -> Tensor:
    rank = len(kernel_sizes)
    stride = strides or [1] * rank
    pads = _padding(pad_type, pad, list(x.shape[2:]), kernel_sizes, stride, [1] * rank)
    pool = _AVG_POOL[rank]
    if not any(before or after for before, after in pads) and not ceil_mode:
        return pool(x, kernel_sizes, stride)
    windows = _windows(x, kernel_sizes, stride, pads, ceil_mode)
    reach = [(0, over) for _, over in windows]
    summed = pool(_pad(_pad(x, pads), reach), kernel_sizes, stride)
    # What counts as an element: real ones, and declared padding unless excluded; the
    # reach of ceil_mode past the padding never does.
    ones = torch.ones(1, 1, *x.shape[2:])
    ones = _pad(ones, pads, 0.0 if exclude_padding_from_average else 1.0)
    share = pool(_pad(ones, reach), kernel_sizes, stride)
    return _shorten(summed / share, windows)


def _l2_pool(
    x: Tensor, kernel_sizes: Ints, pad_type: str, strides: Ints | None = None,
    pad: Ints | None = None, ceil_mode: bool = False,
) -> Tensor:  # fmt: skip
    rank = len(kernel_sizes)
    stride = strides or [1] * rank
    pads = _padding(pad_type, pad, list(x.shape[2:]), kernel_sizes, stride, [1] * rank)
    windows = _windows(x, kernel_sizes, stride, pads, ceil_mode)
    reach = [(b, a + over) for (b, a), (_, over) in zip(pads, windows, strict=True)]
    mean = _AVG_POOL[rank](_pad(x * x, reach), kernel_sizes, stride)
    return _shorten(torch.sqrt(mean * math.prod(kernel_sizes)), windows)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def _matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    if transpose_x:
        x = x.transpose(-1, -2)
    if transpose_y:
        y = y.transpose(-1, -2)
    return torch.matmul(x, y)


def _einsum(values: list[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *values)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask
    return torch.matmul(torch.softmax(scores, -1), value)


OPERATORS: dict[str, Function] = {
    "avg_pool": _avg_pool,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "einsum": _einsum,
    "l2_pool": _l2_pool,
    "linear": _linear,
    "matmul": _matmul,
    "max_pool": _max_pool,
    "scaled_dot_product_attention": _attention,
}
