"""What an ``.mlpackage`` holds: bytes of its weights by number type, operators by name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from converters.formats.census_types import Census, make_census
from edge_runtime.runtimes.mil.program import Operand, Operation, read_program

__all__ = ["census"]

_LEAST = 2
"""Numbers in a constant from which on it counts as a weight, not as an attribute."""
_SMALL = ("int8", "uint8", "int4", "uint4")
_ATTRIBUTES = frozenset({"bool", "string", "list", "dictionary"})


def census(path: Path) -> Census:
    """Count one package, without expanding its weights. Raises ``ModelLoadError``.

    Palette indices count by their bits (``uint4``), a sparsity mask as ``uint1``. Constants
    that several operators read count once. ``quantized_ops`` are the operators that expand
    weights of 8 bits or fewer, and those between numbers and 8-bit activations.
    """
    program = read_program(path)
    sizes: Counter[str] = Counter()
    quantized = 0
    seen: set[int] = set()
    for op in program.operations:
        small = op.op_type in ("quantize", "dequantize")
        for argument, operand in op.inputs.items():
            for one in operand if isinstance(operand, tuple) else (operand,):
                if not _is_weight(one) or id(one.val) in seen:
                    continue
                seen.add(id(one.val))
                name = _stored_type(op, argument, one)
                sizes[name] += one.stored_bytes
                small |= op.op_type.startswith("constexpr_") and name in _SMALL
        quantized += small
    return make_census(sizes, Counter(op.op_type for op in program.operations), quantized)


def _stored_type(op: Operation, argument: str, operand: Operand) -> str:
    """The number type, also where iOS 16's forms hide it in packed bytes."""
    assert operand.type is not None  # noqa: S101  # _is_weight saw to it
    if "shape" in op.inputs and argument == "mask":
        return "uint1"
    if "shape" in op.inputs and argument == "indices":
        table = op.inputs["lut"]
        count = np.asarray(table.val).size if isinstance(table, Operand) else 0
        return f"uint{max(count - 1, 1).bit_length()}"
    return operand.type.dtype


def _is_weight(operand: Operand) -> bool:
    if operand.val is None or operand.type is None or operand.type.dtype in _ATTRIBUTES:
        return False
    count = 1
    for size in operand.type.shape:
        count *= size
    return count >= _LEAST
