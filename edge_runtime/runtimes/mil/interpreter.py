"""Run a MIL program: prepared once, then operator by operator.

Operators compute in fp32. Where the program's type is fp16, each result is rounded to fp16,
to nearest with ties to even: the type's storage, not any one chip's accumulator. With
``arithmetic="fp32"`` nothing is rounded, which shows what half precision alone costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.contract.errors import InferenceError, ModelLoadError
from edge_runtime.runtimes.mil.constexpr import CONSTEXPR, expand
from edge_runtime.runtimes.mil.ops import EXACT, OPERATORS
from edge_runtime.runtimes.mil.pairs import find_pairs, quantized_values
from edge_runtime.runtimes.mil.program import Function, Operand, Operation, Type
from edge_runtime.runtimes.mil.quantization import round_trip
from edge_runtime.runtimes.mil.registry import as_tensor

__all__ = ["Arithmetic", "Interpreter", "Observer"]

Arithmetic = Literal["stored", "fp32"]
Observer = Callable[[str, torch.Tensor], None]
"""Called with each named value as it is computed (calibration, bisection)."""
Store = Callable[[Any], Any]

_FAILURES = (RuntimeError, KeyError, ValueError, TypeError, IndexError, ZeroDivisionError)


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """One operator, its arguments looked up and its attributes in plain Python."""

    operation: Operation
    function: Callable[..., Any]
    fixed: dict[str, Any]
    dynamic: tuple[tuple[str, str], ...]
    """(argument, value) of those that take a tensor as it is."""
    converted: tuple[tuple[str, str, Callable[[Any], Any]], ...]
    """The same where an attribute is computed by the program."""
    lists: tuple[tuple[str, tuple[Any, ...]], ...]
    """(argument, members), a member being a value's name or a constant tensor."""
    stores: tuple[Store | None, ...]
    free: tuple[str, ...]
    """Values that nothing after this step reads."""


def _to_half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half().float() if tensor.is_floating_point() else tensor


def _wrap_unsigned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor & 0xFFFF


def _wrap_signed(tensor: torch.Tensor) -> torch.Tensor:
    return ((tensor + 0x8000) & 0xFFFF) - 0x8000


def _representable(value: Any) -> bool:
    """Whether an attribute is no float, or one that fp16 holds."""
    return not isinstance(value, float) or float(np.float16(value)) == value


class Interpreter:
    """One loaded program. Its answer depends on nothing but its inputs; safe in threads."""

    def __init__(self, function: Function, *, arithmetic: Arithmetic = "stored") -> None:
        unknown = sorted(
            {
                op.op_type
                for op in function.operations
                if op.op_type not in OPERATORS and op.op_type not in CONSTEXPR
            }
        )
        if unknown:
            raise ModelLoadError(f"MIL operators not implemented here: {', '.join(unknown)}")
        self._arithmetic = arithmetic
        self._inputs = dict(function.inputs)
        self._outputs = list(function.outputs)
        self._types = [op.op_type for op in function.operations if op.op_type not in CONSTEXPR]
        self._known: dict[str, Any] = {}  # constants that operators computed
        self._tensors: dict[int, torch.Tensor] = {}  # one for each constant array
        self._declared = {name: kind for op in function.operations for name, kind in op.outputs}
        self._quantized = quantized_values(function)
        self._steps = self._prepare(function)
        self._tensors.clear()
        missing = [n for n in self._inputs if self._inputs[n].dtype not in ("float32", "float16",
                   "int32", "uint8", "int8", "bool")]  # fmt: skip
        if missing:
            raise ModelLoadError(f"inputs of this type are not supported: {missing}")

    # Preparation ------------------------------------------------------------------

    def _prepare(self, function: Function) -> list[_Step]:
        pairs = find_pairs(function)
        skipped = set(pairs.values())
        steps: list[_Step] = []
        for op in function.operations:
            if op.op_type in CONSTEXPR:
                self._expand(op)
            elif not (op.op_type == "quantize" and op.outputs[0][0] in skipped):
                step = self._step(op, pairs)
                if self._reads(step):
                    steps.append(step)
                else:
                    self._fold(step)
        return self._with_frees(steps)

    def _expand(self, op: Operation) -> None:
        given = {key: self._constant(operand) for key, operand in op.inputs.items()}
        results = expand(op.op_type, given)
        if len(results) != len(op.outputs):
            raise ModelLoadError(f"{op.op_type} {op.name} has {len(op.outputs)} outputs")
        for (name, kind), array in zip(op.outputs, results, strict=True):
            if array.shape != kind.shape:
                raise ModelLoadError(
                    f"{op.op_type} {op.name} gives {list(array.shape)}, not {list(kind.shape)}"
                )
            self._known[name] = array

    def _constant(self, operand: Operand | tuple[Operand, ...]) -> Any:
        """A constant's value, or None for a value computed at run time."""
        if isinstance(operand, tuple):
            return None
        return operand.val if operand.val is not None else self._known.get(operand.name)

    def _tensor(self, value: Any) -> torch.Tensor:
        """A constant as a tensor, made once however many operators read it."""
        if isinstance(value, np.ndarray) and value.size > 1:
            if id(value) not in self._tensors:
                self._tensors[id(value)] = as_tensor(value)
            return self._tensors[id(value)]
        return as_tensor(value)

    def _step(self, op: Operation, pairs: Mapping[str, str]) -> _Step:
        operator = OPERATORS[op.op_type]
        operator.check(op.inputs)
        fixed: dict[str, Any] = {}
        dynamic: list[tuple[str, str]] = []
        converted: list[tuple[str, str, Callable[[Any], Any]]] = []
        lists: list[tuple[str, tuple[Any, ...]]] = []
        try:
            for key, operand in op.inputs.items():
                if key in operator.ignored:
                    continue
                converter = operator.converter(key)
                if isinstance(operand, tuple):
                    lists.append((key, tuple(self._member(one) for one in operand)))
                    continue
                value = self._constant(operand)
                if value is not None:
                    fixed[key] = self._tensor(value) if converter is as_tensor else converter(value)
                elif converter is as_tensor:
                    dynamic.append((key, operand.name))
                else:
                    converted.append((key, operand.name, converter))
        except (TypeError, ValueError) as error:
            raise ModelLoadError(
                f"MIL operator {op.op_type} ({op.name}): {key} makes no sense: {error}"
            ) from None
        function: Callable[..., Any] = operator.function
        if op.outputs[0][0] in pairs:
            function, fixed = round_trip, self._round_trip(op)
            dynamic = [("x", self._quantized[pairs[op.outputs[0][0]]])]
        exact = op.op_type in EXACT and all(map(_representable, fixed.values()))
        stores = tuple(self._store(kind, exact=exact) for _, kind in op.outputs)
        return _Step(
            op, function, fixed, tuple(dynamic), tuple(converted), tuple(lists), stores, ()
        )

    def _round_trip(self, op: Operation) -> dict[str, Any]:
        source = op.inputs["input"]
        assert isinstance(source, Operand)  # noqa: S101  # find_pairs saw to it
        zero = op.inputs.get("zero_point")
        return {
            "scale": float(np.asarray(self._constant(op.inputs["scale"])).item()),
            "zero_point": 0 if zero is None else int(np.asarray(self._constant(zero)).item()),
            "output_dtype": self._declared[source.name].dtype,
        }

    def _member(self, operand: Operand) -> Any:
        value = self._constant(operand)
        return operand.name if value is None else self._tensor(value)

    def _store(self, kind: Type, *, exact: bool) -> Store | None:
        if kind.dtype == "float16" and self._arithmetic == "stored" and not exact:
            return _to_half
        return {"uint16": _wrap_unsigned, "int16": _wrap_signed}.get(kind.dtype)

    @staticmethod
    def _reads(step: _Step) -> list[str]:
        names = [name for _, name in step.dynamic]
        names += [name for _, name, _ in step.converted]
        names += [one for _, members in step.lists for one in members if isinstance(one, str)]
        return names

    def _fold(self, step: _Step) -> None:
        """An operator of constants alone: run it now."""
        values: dict[str, Any] = {}
        self._execute(step, values)
        for name, _ in step.operation.outputs:
            value = values[name]
            self._known[name] = value.numpy() if isinstance(value, torch.Tensor) else value

    def _with_frees(self, steps: list[_Step]) -> list[_Step]:
        last: dict[str, int] = {}
        for index, step in enumerate(steps):
            for name in self._reads(step):
                last[name] = index
            for name, _ in step.operation.outputs:
                last.setdefault(name, index)  # never read: free at once
        free: list[list[str]] = [[] for _ in steps]
        for name, index in last.items():
            if name not in self._outputs:
                free[index].append(name)
        return [
            dataclasses.replace(step, free=tuple(names))
            for step, names in zip(steps, free, strict=True)
        ]

    # Running ----------------------------------------------------------------------

    @property
    def input_names(self) -> list[str]:
        """Names of the program's inputs, in order."""
        return list(self._inputs)

    @property
    def output_names(self) -> list[str]:
        """Names of the program's outputs, in order."""
        return list(self._outputs)

    @property
    def operator_types(self) -> list[str]:
        """The type of each operator, in order; constants left out."""
        return list(self._types)

    def run(
        self, inputs: Mapping[str, NDArray[np.generic]], observer: Observer | None = None
    ) -> dict[str, Any]:
        """One inference: arrays by input name to arrays by output name.

        A classifier's label comes as ``str``, its dictionary as the array of its values in
        the order of the labels. Raises ``InferenceError``.
        """
        values: dict[str, Any] = {}
        for name, kind in self._inputs.items():
            values[name] = self._input(name, kind, inputs)
            if observer is not None:
                observer(name, values[name])
        with torch.inference_mode():
            for step in self._steps:
                self._execute(step, values)
                if observer is not None:
                    for name, _ in step.operation.outputs:
                        observer(name, values[name])
                for name in step.free:
                    values.pop(name, None)
        return {name: self._output(name, values) for name in self._outputs}

    def _input(
        self, name: str, kind: Type, inputs: Mapping[str, NDArray[np.generic]]
    ) -> torch.Tensor:
        if name not in inputs:
            raise InferenceError(f"input {name!r} is missing")
        array = np.ascontiguousarray(inputs[name])
        if array.shape != kind.shape:
            raise InferenceError(f"input {name!r} is {list(array.shape)}, not {list(kind.shape)}")
        if kind.dtype in ("float16", "float32"):
            tensor = torch.from_numpy(array.astype(np.float32, copy=False))
            rounded = kind.dtype == "float16" and self._arithmetic == "stored"
            return _to_half(tensor) if rounded else tensor
        return torch.from_numpy(array.astype(kind.dtype, copy=False))

    def _output(self, name: str, values: Mapping[str, Any]) -> Any:
        value = values[name] if name in values else self._known[name]
        return np.array(value.numpy()) if isinstance(value, torch.Tensor) else value

    @staticmethod
    def _execute(step: _Step, values: dict[str, Any]) -> None:
        arguments = dict(step.fixed)
        op = step.operation
        try:
            for key, name in step.dynamic:
                arguments[key] = values[name]
            for key, name, converter in step.converted:
                arguments[key] = converter(values[name])
            for key, members in step.lists:
                arguments[key] = [values[m] if isinstance(m, str) else m for m in members]
            result = step.function(**arguments)
        except _FAILURES as error:
            raise InferenceError(
                f"MIL operator {op.op_type} ({op.name}) failed: {error}"
            ) from error
        results = result if isinstance(result, tuple) else (result,)
        if len(results) != len(op.outputs):
            raise InferenceError(
                f"MIL operator {op.op_type} ({op.name}) gave {len(results)} values"
            )
        for (name, kind), value, store in zip(op.outputs, results, step.stores, strict=True):
            if store is not None:
                value = store(value)
            if (
                isinstance(value, torch.Tensor)
                and value.shape != kind.shape
                and kind.dtype != "dictionary"
            ):
                raise InferenceError(
                    f"MIL operator {op.op_type} ({op.name}) gave {list(value.shape)}, "
                    f"declared is {list(kind.shape)}"
                )
            values[name] = value
