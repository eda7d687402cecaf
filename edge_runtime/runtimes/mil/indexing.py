"""MIL operators that read or write by index, or make numbers from nothing."""

from __future__ import annotations

from typing import Any

import torch

from edge_runtime.runtimes.mil.registry import Function, Ints, Tensor

__all__ = ["OPERATORS"]


def _positive(indices: Tensor, length: int) -> Tensor:
    """Negative indices count from the end; raises ``IndexError`` outside."""
    wide = indices.long()
    if wide.numel() and not -length <= int(wide.min()) <= int(wide.max()) < length:
        raise IndexError(f"an index is outside an axis of {length}")
    return torch.where(wide < 0, wide + length, wide)


def _gather(x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0) -> Tensor:
    axis %= x.dim()
    places = _positive(indices, x.shape[axis])
    if batch_dims == 0:
        found = x.index_select(axis, places.reshape(-1))
        return found.reshape([*x.shape[:axis], *places.shape, *x.shape[axis + 1 :]])
    batch = list(x.shape[:batch_dims])
    flat_x = x.reshape(-1, *x.shape[batch_dims:])
    flat_places = places.reshape(flat_x.shape[0], *places.shape[batch_dims:])
    rows = [
        _gather(row, place, axis - batch_dims)
        for row, place in zip(flat_x, flat_places, strict=True)
    ]
    stacked = torch.stack(rows)
    return stacked.reshape([*batch, *stacked.shape[1:]])


def _gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, _positive(indices, x.shape[axis]))


def _gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0) -> Tensor:
    depth = indices.shape[-1]
    places = [_positive(indices[..., n], x.shape[batch_dims + n]) for n in range(depth)]
    if batch_dims == 0:
        return x[tuple(places)]
    lead = []
    for n in range(batch_dims):
        shape = [1] * (indices.dim() - 1)
        shape[n] = x.shape[n]
        lead.append(torch.arange(x.shape[n]).reshape(shape))
    return x[(*lead, *places)]


_REDUCE = {"mul": "prod", "max": "amax", "min": "amin"}


def _put(data: Tensor, index: tuple[Tensor, ...], updates: Tensor, mode: str) -> Tensor:
    """``data[index] (mode)= updates``; several updates of one place follow one another."""
    result = data.clone()
    if mode == "update":
        result[index] = updates
    elif mode in ("add", "sub"):
        result.index_put_(index, updates if mode == "add" else -updates, accumulate=True)
    elif mode in ("mul", "div", "max", "min"):
        if mode == "div":
            mode, updates = "mul", torch.reciprocal(updates)
        grids = torch.arange(data.numel()).reshape(data.shape)[index]
        flat = result.reshape(-1)
        flat.scatter_reduce_(0, grids.reshape(-1), updates.reshape(-1), _REDUCE[mode])
        result = flat.reshape(data.shape)
    else:
        raise ValueError(f"mode {mode!r}")
    return result


def _scatter(
    data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, mode: str = "add",
) -> Tensor:  # fmt: skip
    axis %= data.dim()
    index: list[Any] = [slice(None)] * axis
    index.append(_positive(indices, data.shape[axis]))
    grids = torch.arange(data.numel()).reshape(data.shape)[tuple(index)]
    flat = _put(data.reshape(-1), (grids.reshape(-1),), updates.reshape(-1), mode)
    return flat.reshape(data.shape)


def _scatter_along_axis(
    data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, mode: str = "add",
) -> Tensor:  # fmt: skip
    axis %= data.dim()
    places = _positive(indices, data.shape[axis])
    index: list[Tensor] = []
    for n in range(data.dim()):
        shape = [1] * data.dim()
        shape[n] = places.shape[n]
        index.append(places if n == axis else torch.arange(places.shape[n]).reshape(shape))
    broadcast = torch.broadcast_tensors(*index)
    return _put(data, tuple(broadcast), updates, mode)


def _scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add",
) -> Tensor:  # fmt: skip
    places = tuple(_positive(indices[..., n], data.shape[n]) for n in range(indices.shape[-1]))
    grids = torch.arange(data.numel()).reshape(data.shape)[places]
    flat = _put(data.reshape(-1), (grids.reshape(-1),), updates.reshape(-1), mode)
    return flat.reshape(data.shape)


def _one_hot(
    indices: Tensor, one_hot_vector_size: int, axis: int = -1,
    on_value: Tensor | None = None, off_value: Tensor | None = None,
) -> Tensor:  # fmt: skip
    on = torch.tensor(1, dtype=torch.int32) if on_value is None else on_value
    off = torch.tensor(0, dtype=torch.int32) if off_value is None else off_value
    rank = indices.dim() + 1
    axis %= rank
    shape = [1] * rank
    shape[axis] = one_hot_vector_size
    chosen = indices.long().unsqueeze(axis) == torch.arange(one_hot_vector_size).reshape(shape)
    return torch.where(chosen, on, off)


def _fill(shape: Ints, value: Tensor | None = None) -> Tensor:
    filled = torch.zeros(()) if value is None else value
    return filled.reshape(()).expand(shape).clone()


def _fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    return _fill(list(ref_tensor.shape), value)


def _range_1d(end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    values = torch.arange(start.item(), end.item(), step.item())
    return values.to(end.dtype)


OPERATORS: dict[str, Function] = {
    "fill": _fill,
    "fill_like": _fill_like,
    "gather": _gather,
    "gather_along_axis": _gather_along_axis,
    "gather_nd": _gather_nd,
    "one_hot": _one_hot,
    "range_1d": _range_1d,
    "scatter": _scatter,
    "scatter_along_axis": _scatter_along_axis,
    "scatter_nd": _scatter_nd,
}
