"""Find ``quantize`` and ``dequantize`` that undo each other: one step in place of two."""

from __future__ import annotations

import numpy as np

from edge_runtime.runtimes.mil.program import Function, Operand, Operation

__all__ = ["find_pairs", "quantized_values"]


def _operands(op: Operation) -> list[Operand]:
    found: list[Operand] = []
    for operand in op.inputs.values():
        found.extend(operand if isinstance(operand, tuple) else (operand,))
    return found


def quantized_values(function: Function) -> dict[str, str]:
    """The output of each ``quantize`` to the value it is made from."""
    found = {}
    for op in function.operations:
        source = op.inputs.get("input")
        if op.op_type == "quantize" and isinstance(source, Operand) and source.val is None:
            found[op.outputs[0][0]] = source.name
    return found


def find_pairs(function: Function) -> dict[str, str]:
    """Outputs of ``dequantize`` to the ``quantize`` output before it, where both are one step.

    That is, with the same scale and zero point for the whole tensor, and nobody else
    reading the integers.
    """
    makers = {op.outputs[0][0]: op for op in function.operations if op.op_type == "quantize"}
    readers: dict[str, list[Operation]] = {}
    for op in function.operations:
        for operand in _operands(op):
            if operand.name in makers:
                readers.setdefault(operand.name, []).append(op)
    return {
        user.outputs[0][0]: value
        for value, users in readers.items()
        if value not in function.outputs
        and all(user.op_type == "dequantize" and _same_scale(makers[value], user) for user in users)
        for user in users
    }


def _same_scale(first: Operation, second: Operation) -> bool:
    """Whether two operators have one scalar scale and zero point, both constants."""
    for key in ("scale", "zero_point"):
        one, other = first.inputs.get(key), second.inputs.get(key)
        if (one is None) != (other is None):
            return False
        if one is None or other is None:
            continue
        if isinstance(one, tuple) or isinstance(other, tuple):
            return False
        if one.val is None or other.val is None or np.ndim(one.val) or np.ndim(other.val):
            return False
        if one.val != other.val:
            return False
    return True
