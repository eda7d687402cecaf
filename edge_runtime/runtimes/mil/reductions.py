"""MIL operators that look along axes: normalization, reduction, sorting."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from edge_runtime.runtimes.mil.registry import Function, Ints, Tensor

__all__ = ["OPERATORS"]


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape([1, -1] + [1] * (x.dim() - 2))


def _scaled(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    if gamma is not None:
        x = x * gamma
    return x if beta is None else x + beta


def _batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, training=False, eps=epsilon)


def _normalized(x: Tensor, axes: list[int], epsilon: float) -> Tensor:
    mean = x.mean(axes, keepdim=True)
    centered = x - mean
    variance = torch.square(centered).mean(axes, keepdim=True)
    return centered.mul_(torch.rsqrt(variance + epsilon))


def _instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    result = _normalized(x, list(range(2, x.dim())), epsilon)
    return _scaled(
        result,
        None if gamma is None else _per_channel(gamma, x),
        None if beta is None else _per_channel(beta, x),
    )


def _layer_norm(
    x: Tensor,
    axes: Ints | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    rank = x.dim()
    chosen = sorted(a % rank for a in axes) if axes is not None else list(range(rank))
    shape = [x.shape[a] if a in chosen else 1 for a in range(rank)]
    return _scaled(
        _normalized(x, chosen, epsilon),
        None if gamma is None else gamma.reshape(shape),
        None if beta is None else beta.reshape(shape),
    )


def _l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(torch.sum(x * x, (-3, -2, -1), keepdim=True) + epsilon)


def _local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    return F.local_response_norm(x, size, alpha, beta, k)


def _softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


def _reduction(function: Callable[..., Tensor]) -> Function:
    def run(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
        chosen = axes if axes is not None else list(range(x.dim()))
        return function(x, chosen, keepdim=keep_dims)

    return run


def _mean(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return torch.mean(x, axes, keepdim=keepdim)


def _sum(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keepdim, dtype=x.dtype)


def _product(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    for axis in sorted((a % x.dim() for a in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keepdim, dtype=x.dtype)
    return x


def _argmax(x: Tensor, axis: int = -1, keep_dims: bool = False) -> Tensor:
    return torch.argmax(x, axis, keepdim=keep_dims).to(torch.int32)


def _argmin(x: Tensor, axis: int = -1, keep_dims: bool = False) -> Tensor:
    return torch.argmin(x, axis, keepdim=keep_dims).to(torch.int32)


def _topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    return_indices: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Always sorted; equal values keep the order of their index."""
    length = x.shape[axis]
    if k == -1:
        k = length
    if k < length // 4 and x.is_floating_point():
        # The k-th value bounds a short list; only that is sorted.
        bound = torch.topk(x, k, axis, largest=not ascending).values
        if x.dim() == 1 and not bool(torch.isnan(bound).any()):
            edge = bound.max() if ascending else bound.min()
            places = torch.nonzero(x <= edge if ascending else x >= edge).reshape(-1)
            values, order = torch.sort(x[places], descending=not ascending, stable=True)
            values, indices = values[:k], places[order[:k]].to(torch.int32)
            return (values, indices) if return_indices else values
    values, order = torch.sort(x, dim=axis, descending=not ascending, stable=True)
    values = values.narrow(axis, 0, k)
    return (values, order.narrow(axis, 0, k).to(torch.int32)) if return_indices else values


def _argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    order = torch.argsort(x, dim=axis, descending=not ascending, stable=True)
    return order.to(torch.int32)


def _cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    if reverse:
        x = x.flip(axis)
    total = torch.cumsum(x, axis, dtype=x.dtype)
    if exclusive:
        total = total - x
    return total.flip(axis) if reverse else total


OPERATORS: dict[str, Function] = {
    "argsort": _argsort,
    "batch_norm": _batch_norm,
    "cumsum": _cumsum,
    "instance_norm": _instance_norm,
    "l2_norm": _l2_norm,
    "layer_norm": _layer_norm,
    "local_response_norm": _local_response_norm,
    "reduce_argmax": _argmax,
    "reduce_argmin": _argmin,
    "softmax": _softmax,
    "topk": _topk,
    **{
        f"reduce_{name}": _reduction(function)
        for name, function in {
            "l1_norm": lambda x, axes, keepdim: _sum(torch.abs(x), axes, keepdim),
            "l2_norm": lambda x, axes, keepdim: torch.sqrt(_sum(x * x, axes, keepdim)),
            "log_sum": lambda x, axes, keepdim: torch.log(_sum(x, axes, keepdim)),
            "log_sum_exp": lambda x, axes, keepdim: torch.logsumexp(x, axes, keepdim=keepdim),
            "max": lambda x, axes, keepdim: torch.amax(x, axes, keepdim=keepdim),
            "mean": _mean,
            "min": lambda x, axes, keepdim: torch.amin(x, axes, keepdim=keepdim),
            "prod": _product,
            "sum": _sum,
            "sum_square": lambda x, axes, keepdim: _sum(x * x, axes, keepdim),
        }.items()
    },
}
