"""Run a MIL program, operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.contract.errors import InferenceError, ModelLoadError
from edge_runtime.runtimes.mil.ops import OPERATORS

__all__ = ["Interpreter", "Observer"]

Observer = Callable[[str, torch.Tensor], None]
"""Called with each named value as it is computed (calibration, bisection)."""


class Interpreter:
    """One loaded program.

    Operators whose MIL type is fp16 compute in fp32 and round each result to fp16: that
    is the type's storage, not any one chip's accumulator. Thread-safe once built.
    """

    def __init__(self, function: Any) -> None:
        self._operations = [op for op in function.operations if op.op_type != "const"]
        self._outputs = [var.name for var in function.outputs]
        self._inputs = list(function.inputs)
        unknown = sorted(
            {
                op.op_type
                for op in self._operations
                if op.op_type not in OPERATORS and not op.op_type.startswith("constexpr_")
            }
        )
        if unknown:
            raise ModelLoadError(f"MIL operators not implemented here: {', '.join(unknown)}")
        self._constants: dict[str, Any] = {}
        for op in self._operations:
            if op.op_type.startswith("constexpr_"):
                self._keep_constant(op.outputs[0], op.materialized_val_inference())
            for value in op.inputs.values():
                for var in value if isinstance(value, list | tuple) else (value,):
                    if var is not None and var.op is not None and var.op.op_type == "const":
                        self._keep_constant(var, var.val)
        self._operations = [
            op for op in self._operations if not op.op_type.startswith("constexpr_")
        ]
        self._last_use = self._find_last_use()

    def _keep_constant(self, var: Any, value: Any) -> None:
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu" and value.ndim > 0:
            array = value.astype(np.float32) if value.dtype == np.float16 else value
            value = torch.from_numpy(np.array(array))
        self._constants[var.name] = value

    def _find_last_use(self) -> list[list[str]]:
        """For each operator, the names that nothing after it reads (freed there)."""
        last: dict[str, int] = {}
        for index, op in enumerate(self._operations):
            for value in op.inputs.values():
                for var in value if isinstance(value, list | tuple) else (value,):
                    if var is not None:
                        last[var.name] = index
        free: list[list[str]] = [[] for _ in self._operations]
        for name, index in last.items():
            if name not in self._constants and name not in self._outputs:
                free[index].append(name)
        return free

    @property
    def input_names(self) -> list[str]:
        """Names of the program's inputs, in order."""
        return self._inputs

    @property
    def output_names(self) -> list[str]:
        """Names of the program's outputs, in order."""
        return self._outputs

    @property
    def operator_types(self) -> list[str]:
        """The type of each operator, in order; constants left out."""
        return [op.op_type for op in self._operations]

    def run(
        self, inputs: Mapping[str, NDArray[np.generic]], observer: Observer | None = None
    ) -> dict[str, NDArray[np.generic]]:
        """One inference: arrays by input name to arrays by output name."""
        values: dict[str, Any] = {
            name: torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in self._inputs
        }
        if observer is not None:
            for name, value in values.items():
                observer(name, value)
        with torch.inference_mode():
            for index, op in enumerate(self._operations):
                try:
                    result = OPERATORS[op.op_type](self._gather(op, values))
                except (RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
                    raise InferenceError(
                        f"MIL operator {op.op_type} ({op.name}) failed: {error}"
                    ) from error
                results = result if isinstance(result, tuple) else (result,)
                for var, tensor in zip(op.outputs, results, strict=True):
                    tensor = _round(tensor, var)
                    values[var.name] = tensor
                    if observer is not None:
                        observer(var.name, tensor)
                for name in self._last_use[index]:
                    values.pop(name, None)
        return {name: values[name].contiguous().numpy() for name in self._outputs}

    def _gather(self, op: Any, values: dict[str, Any]) -> dict[str, Any]:
        def look_up(var: Any) -> Any:
            if var.name in values:
                return values[var.name]
            return self._constants[var.name]

        return {
            name: [look_up(v) for v in value] if isinstance(value, list | tuple) else look_up(value)
            for name, value in op.inputs.items()
            if value is not None
        }


def _round(tensor: torch.Tensor, var: Any) -> torch.Tensor:
    """Store as the MIL type does: fp16 keeps 11 significant bits."""
    if tensor.is_floating_point() and getattr(var.dtype, "__name__", "") == "fp16":
        return tensor.half().float()
    return tensor
