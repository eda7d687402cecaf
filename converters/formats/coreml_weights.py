"""Store the weights of an ML program compressed: as integers, a palette, or sparse.

Weights that ``compensate`` has put on a grid are recognized by their fp16 bytes and packed
as they are; any other weight of a layer gets a grid of its own here.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from converters.formats.coreml_grids import (
    Grid,
    Int4Grid,
    Int8Grid,
    Packed,
    PaletteGrid,
    SparseGrid,
    lamp_masks,
)
from converters.rewrites.compensate import is_wide
from edge_runtime.contract.manifest import Precision

__all__ = ["WEIGHTS", "compress_weights", "find_weights", "fit_grid", "weight_key"]

WEIGHTS = {"conv": "weight", "conv_transpose": "weight", "linear": "weight", "matmul": "y"}
"""Operators with weights, and which argument they are."""
_SMALLEST_NORMAL = 2.0**-14
_LEAST = 64
"""Numbers below which a compressed form is no smaller."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """One constant that layers take as weight."""

    constant: Any
    """The ``const`` operator."""
    output_axis: int
    input_axis: int

    @property
    def value(self) -> NDArray[Any]:
        """As the program holds it."""
        return np.asarray(self.constant.outputs[0].val)

    def canonical(self) -> torch.Tensor:
        """``[O, I, K]``, float32."""
        moved = np.moveaxis(self.value, (self.output_axis, self.input_axis), (0, 1))
        array = np.ascontiguousarray(moved, dtype=np.float32)
        return torch.from_numpy(array.reshape(*array.shape[:2], -1))

    def restored(self, array: NDArray[Any]) -> NDArray[Any]:
        """An array ``[O, I, K]``, or with 1 or fewer blocks in places, in the weight's axes."""
        moved = np.moveaxis(self.value, (self.output_axis, self.input_axis), (0, 1))
        kernel = moved.shape[2:] if array.shape[2] != 1 else (1,) * (moved.ndim - 2)
        full = array.reshape(*array.shape[:2], *kernel)
        back = np.moveaxis(full, (0, 1), (self.output_axis, self.input_axis))
        return np.ascontiguousarray(back)


def weight_key(array: NDArray[Any]) -> str:
    """What identifies a weight in module and program: the digest of its numbers in fp16.

    Subnormal numbers count as zero: coremltools moves them while it casts.
    """
    half = np.array(array, dtype=np.float16)
    half[np.abs(half) < _SMALLEST_NORMAL] = 0.0
    return hashlib.sha256(half.tobytes()).hexdigest()


def find_weights(block: Any) -> list[Weight]:
    """The weights of a program's layers, each once, in order of use."""
    found: dict[str, Weight] = {}
    for op in block.operations:
        argument = WEIGHTS.get(op.op_type)
        if argument is None:
            continue
        var = op.inputs[argument]
        if var.op is None or var.op.op_type != "const" or var.rank < 2:
            continue
        last = var.rank - 1
        axes = (0, 1)
        if op.op_type == "conv_transpose":
            axes = (1, 0)
        elif op.op_type == "matmul" and not bool(op.inputs["transpose_y"].val):
            axes = (last, last - 1)
        elif op.op_type == "matmul":
            axes = (last - 1, last)
        weight = Weight(constant=var.op, output_axis=axes[0], input_axis=axes[1])
        found.setdefault(var.name, weight)
    return list(found.values())


def fit_grid(
    precision: Precision,
    weight: torch.Tensor,
    importance: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> Grid | None:
    """The grid of one layer's weight ``[O, I, K]``; None: it stays fp16.

    ``mask``: what stays of a layer that is to be sparse.
    """
    wide = is_wide(weight.shape[1])
    if precision == "int4w" and wide:
        return Int4Grid(weight, importance)
    if precision == "pal4" and wide:
        return PaletteGrid(weight, importance)
    if mask is not None:
        return SparseGrid(weight, mask, quantized=precision == "int8w+sparse")
    return None if precision == "fp16+sparse" else Int8Grid(weight)


def compress_weights(
    block: Any,
    precision: Precision,
    *,
    ios: int,
    grids: Mapping[str, Grid],
    skip: set[str],
    sparsity: float,
) -> int:
    """Replace the weights in ``block`` by compressed ones; returns how many.

    ``grids``: by ``weight_key``, of weights that already lie on them. ``skip``: keys of
    weights that stay. ``sparsity``: the share of zeros where no grid is given.
    """
    chosen = []
    for weight in find_weights(block):
        least = 1 if precision == "int8" else _LEAST
        key = weight_key(weight.value)
        if key not in skip and weight.value.size >= least and weight.value.dtype == np.float16:
            chosen.append((weight, key))
    masks: dict[str, torch.Tensor] = {}
    if precision.endswith("sparse"):
        wide = [
            (key, w) for w, key in chosen if key not in grids and is_wide(w.canonical().shape[1])
        ]
        if wide:
            found = lamp_masks([w.canonical() for _, w in wide], sparsity)
            masks = dict(zip((key for key, _ in wide), found, strict=True))
    count = 0
    with block:
        for weight, key in chosen:
            values = weight.canonical()
            grid = grids.get(key) or fit_grid(precision, values, None, masks.get(key))
            if grid is not None:
                _replace(block, weight, _expression(weight, grid.pack(values), ios))
                count += 1
    return count


def _replace(block: Any, weight: Weight, var: Any) -> None:
    old = weight.constant
    block.replace_uses_of_var_after_op(
        anchor_op=old,
        old_var=old.outputs[0],
        new_var=var,
        no_check_var_types=True,
        force_replace=True,
    )
    block.remove_ops([old])


def _expression(weight: Weight, packed: Packed, ios: int) -> Any:
    """The ``constexpr_*`` operators that expand ``packed``, written before the constant."""
    from coremltools.converters.mil.mil import Builder

    before, name = weight.constant, f"{weight.constant.name}_compressed"
    data = weight.restored(packed.data)
    scale = None if packed.scale is None else weight.restored(packed.scale)
    if packed.mask is not None:
        return _sparse(weight, packed, data, scale, ios)
    if packed.palette is not None:
        return _palette(weight, packed.palette, data, ios)
    assert scale is not None  # noqa: S101  # integers have one
    if packed.bits == 8 and ios < 18:
        return Builder.constexpr_affine_dequantize(
            quantized_data=data,
            zero_point=np.int8(0),
            scale=scale.reshape(-1),
            axis=np.int32(weight.output_axis),
            before_op=before,
            name=name,
        )
    return Builder.constexpr_blockwise_shift_scale(
        data=_typed(data, packed.bits), scale=scale, before_op=before, name=name
    )


def _typed(data: NDArray[Any], bits: int) -> NDArray[Any]:
    """Integers of a type that coremltools stores in ``bits``."""
    from coremltools.converters.mil.mil import types

    if bits == 8:
        return data
    kind = types.uint4 if data.dtype == np.uint8 else types.int4
    return data.astype(types.nptype_from_builtin(kind))


def _nibbles(indices: NDArray[Any]) -> NDArray[np.uint8]:
    """Two 4-bit numbers a byte, the first in the low half."""
    flat = indices.astype(np.uint8).reshape(-1)
    flat = np.append(flat, np.zeros(flat.size % 2, dtype=np.uint8))
    return np.asarray(flat[0::2] | (flat[1::2] << 4), dtype=np.uint8)


def _palette(weight: Weight, palette: NDArray[Any], data: NDArray[Any], ios: int) -> Any:
    from coremltools.converters.mil.mil import Builder

    before, name = weight.constant, f"{weight.constant.name}_compressed"
    if ios < 18:
        return Builder.constexpr_lut_to_dense(
            indices=_nibbles(data),
            lut=palette,
            shape=np.array(data.shape, dtype=np.uint32),
            before_op=before,
            name=name,
        )
    table = palette.reshape([1] * data.ndim + [16, 1])
    return Builder.constexpr_lut_to_dense(
        indices=_typed(data, 4), lut=table, before_op=before, name=name
    )


def _sparse(
    weight: Weight, packed: Packed, data: NDArray[Any], scale: NDArray[Any] | None, ios: int
) -> Any:
    from coremltools.converters.mil.mil import Builder, types

    before, name = weight.constant, f"{weight.constant.name}_compressed"
    assert packed.mask is not None  # noqa: S101  # checked by the caller
    mask = weight.restored(packed.mask)
    if ios < 18:
        bits = np.packbits(mask.reshape(-1), bitorder="little")
        return Builder.constexpr_sparse_to_dense(
            nonzero_data=data[mask],
            mask=bits,
            shape=np.array(mask.shape, dtype=np.uint32),
            before_op=before,
            name=name,
        )
    flags = mask.astype(types.nptype_from_builtin(types.uint1))
    values: Any = data[mask]
    if scale is not None:
        flags, values = Builder.constexpr_sparse_blockwise_shift_scale(
            data_mask=flags,
            nonzero_data=values,
            scale=scale,
            before_op=before,
            name=f"{name}_values",
        )
    return Builder.constexpr_sparse_to_dense(
        nonzero_data=values, mask=flags, before_op=before, name=name
    )
