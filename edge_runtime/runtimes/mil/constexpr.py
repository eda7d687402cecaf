"""Expand compressed weights: the ``constexpr_*`` operators, in numpy.

They run once, when a program is loaded. The iOS 16 forms keep packed bytes and a shape, the
iOS 18 forms typed tensors; both mean the same. Source: the operator references in
``coremltools.converters.mil.mil.ops.defs.iOS16.constexpr_ops`` and ``iOS18.compression``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import ModelLoadError
from edge_runtime.runtimes.mil.blob import unpack

__all__ = ["CONSTEXPR", "expand"]

Array = NDArray[Any]
Inputs = Mapping[str, Any]
Expander = Callable[[Inputs], tuple[Array, ...]]


def expand(op_type: str, inputs: Inputs) -> tuple[Array, ...]:
    """The outputs of one ``constexpr_*`` operator. Raises ``ModelLoadError``."""
    function = CONSTEXPR.get(op_type)
    if function is None:
        raise ModelLoadError(f"MIL operators not implemented here: {op_type}")
    try:
        return function(inputs)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ModelLoadError(f"{op_type} makes no sense: {error}") from None


def _spread(parameter: Array, shape: tuple[int, ...]) -> Array:
    """Repeat block parameters along each axis up to ``shape``."""
    for axis, (size, target) in enumerate(zip(parameter.shape, shape, strict=True)):
        if target % size:
            raise ValueError(f"{size} blocks do not divide an axis of {target}")
        if size not in (1, target):
            parameter = np.repeat(parameter, target // size, axis)
    return parameter


def _along(parameter: Any, rank: int, axis: int) -> Array:
    array = np.asarray(parameter)
    if array.ndim == 0:
        return array
    shape = [1] * rank
    shape[axis] = -1
    return array.reshape(shape)


def _scaled(data: Array, scale: Array, offset: Any) -> Array:
    """``scale * (data - offset)``, rounded once to the type of ``scale``."""
    wide = data.astype(np.float32)
    if offset is not None:
        wide = wide - np.asarray(offset, dtype=np.float32)
    return (wide * scale.astype(np.float32)).astype(scale.dtype)


def _affine_dequantize(i: Inputs) -> tuple[Array, ...]:
    data, axis = np.asarray(i["quantized_data"]), int(i["axis"])
    scale = _along(i["scale"], data.ndim, axis)
    return (_scaled(data, scale, _along(i["zero_point"], data.ndim, axis)),)


def _blockwise_shift_scale(i: Inputs) -> tuple[Array, ...]:
    data, scale = np.asarray(i["data"]), np.asarray(i["scale"])
    offset = i.get("offset")
    if offset is not None:
        offset = _spread(np.asarray(offset), data.shape)
    return (_scaled(data, _spread(scale, data.shape), offset),)


def _look_up(indices: Array, lut: Array, axis: int | None) -> Array:
    """``indices`` of rank K into tables ``[g0, ..., g(K-1), palettes, vector]``."""
    groups = lut.shape[: indices.ndim]
    position = np.zeros(indices.shape, dtype=np.int64)  # number of the table of each index
    for dimension, (count, size) in enumerate(zip(groups, indices.shape, strict=True)):
        if size % count:
            raise ValueError(f"{count} tables do not divide an axis of {size}")
        shape = [1] * indices.ndim
        shape[dimension] = size
        position = position * count + (np.arange(size) // (size // count)).reshape(shape)
    palettes, vector = lut.shape[-2:]
    found = lut.reshape(-1, vector)[position * palettes + indices]
    if vector == 1:
        return found[..., 0]
    if axis is None:
        raise ValueError("vector palettes without vector_axis")
    axis %= indices.ndim
    joined = np.moveaxis(found, -1, axis + 1)
    shape = list(indices.shape)
    shape[axis] *= vector
    return joined.reshape(shape)


def _lut_to_dense(i: Inputs) -> tuple[Array, ...]:
    lut = np.asarray(i["lut"])
    if "shape" in i:  # iOS 16: packed bytes, one table
        shape = tuple(int(size) for size in np.asarray(i["shape"]))
        bits = int(math.log2(lut.size))
        packed = np.ascontiguousarray(i["indices"], dtype=np.uint8)
        return (lut[unpack(packed.tobytes(), f"uint{bits}", shape)],)
    axis = i.get("vector_axis")
    return (_look_up(np.asarray(i["indices"]), lut, None if axis is None else int(axis)),)


def _scatter(mask: Array, values: Array) -> Array:
    chosen = mask.astype(bool)
    if int(chosen.sum()) != values.size:
        raise ValueError(f"{values.size} values for {int(chosen.sum())} places")
    dense = np.zeros(mask.shape, dtype=values.dtype)
    dense[chosen] = values.reshape(-1)
    return dense


def _sparse_to_dense(i: Inputs) -> tuple[Array, ...]:
    values, mask = np.asarray(i["nonzero_data"]), np.asarray(i["mask"])
    if "shape" in i:
        shape = tuple(int(size) for size in np.asarray(i["shape"]))
        mask = unpack(np.ascontiguousarray(mask, dtype=np.uint8).tobytes(), "uint1", shape)
    return (_scatter(mask, values),)


def _lut_to_sparse(i: Inputs) -> tuple[Array, ...]:
    """Palette indices of the places in the mask: the mask, and their values."""
    mask, lut = np.asarray(i["indices_mask"]), np.asarray(i["lut"])
    axis = i.get("vector_axis")
    axis = None if axis is None else int(axis) % mask.ndim
    dense = _look_up(_scatter(mask, np.asarray(i["indices_nonzero_data"])), lut, axis)
    if lut.shape[-1] > 1 and axis is not None:
        mask = np.repeat(mask, lut.shape[-1], axis)
    return mask, dense[mask.astype(bool)]


def _sparse_blockwise_shift_scale(i: Inputs) -> tuple[Array, ...]:
    mask, scale = np.asarray(i["data_mask"]), np.asarray(i["scale"])
    data = _scatter(mask, np.asarray(i["nonzero_data"]))
    offset = i.get("offset")
    if offset is not None:
        offset = _spread(np.asarray(offset), data.shape)
    return mask, _scaled(data, _spread(scale, data.shape), offset)[mask.astype(bool)]


def _cast(i: Inputs) -> tuple[Array, ...]:
    return (np.asarray(i["source_val"]).astype(np.float32),)


CONSTEXPR: dict[str, Expander] = {
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_blockwise_shift_scale": _blockwise_shift_scale,
    "constexpr_cast": _cast,
    "constexpr_lut_to_dense": _lut_to_dense,
    "constexpr_lut_to_sparse": _lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": _sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": _sparse_to_dense,
}
"""Operator type to function of its inputs by name."""
