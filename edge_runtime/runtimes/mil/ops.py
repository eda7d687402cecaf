"""Every MIL operator that is implemented here, by name.

Source of the semantics: the operator reference in
``coremltools.converters.mil.mil.ops.defs``. Not here: control flow, recurrent layers,
random numbers, states, and operators with shapes that depend on data.
"""

from __future__ import annotations

from typing import Final

from edge_runtime.runtimes.mil import (
    elementwise,
    indexing,
    layers,
    quantization,
    reductions,
    resizing,
    shapes,
)
from edge_runtime.runtimes.mil.registry import Operator

__all__ = ["EXACT", "OPERATORS"]

_IGNORED = {
    **dict.fromkeys(
        ("gather", "gather_along_axis", "gather_nd", "scatter", "scatter_along_axis", "scatter_nd"),
        frozenset({"validate_indices"}),  # always validated here
    ),
    # Always sorted here. Integer types come with the declared output.
    "topk": frozenset({"sort", "output_indices_dtype"}),
    "reduce_argmax": frozenset({"output_dtype"}),
    "reduce_argmin": frozenset({"output_dtype"}),
}

OPERATORS: Final[dict[str, Operator]] = {
    name: Operator(name, function, _IGNORED.get(name, frozenset()))
    for module in (elementwise, indexing, layers, quantization, reductions, resizing, shapes)
    for name, function in module.OPERATORS.items()
}

EXACT: Final = frozenset(shapes.OPERATORS) | {
    "abs", "argsort", "clip", "fill_like", "gather", "gather_along_axis", "gather_nd",
    "identity", "max_pool", "maximum", "minimum", "reduce_argmax", "reduce_argmin", "reduce_max",
    "reduce_min", "relu", "relu6", "resize_nearest_neighbor", "select", "sign", "threshold",
    "thresholded_relu", "topk", "upsample_nearest_neighbor",
}  # fmt: skip
"""Operators that only choose among numbers they were given: with fp16 in, nothing is left
to round."""
