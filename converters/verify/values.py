"""The values inside a saved file while it runs, and the range each quantized one declares.

Runs in a child process, for files that can be taken apart: TFLite, Core ML, TorchScript.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.jobs import VariantRun

__all__ = [
    "READERS",
    "Value",
    "as_reference",
    "declared_in_program",
    "declared_range",
    "sampled",
]

_SAMPLE = 8191
"""A prime: evenly spaced places then meet every row, column and channel alike."""

_SAME_SCALE = 1e-3
"""Relative: scales are stored in half precision."""

Array = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Value:
    """One tensor of the file, in the order of computation, batch 1."""

    array: Array
    """In the file's own layout, dequantized."""
    low: float | None = None
    high: float | None = None
    """The range that the file declares for it, when it is stored in integers."""


def declared_range(scale: float, zero_point: int, dtype: np.dtype[Any]) -> tuple[float, float]:
    """The smallest and largest number that integers of ``dtype`` stand for."""
    bounds = np.iinfo(dtype)
    return (bounds.min - zero_point) * scale, (bounds.max - zero_point) * scale


def as_reference(value: Array, shape: tuple[int, ...]) -> Array | None:
    """``value`` in the reference's shape, when a change of layout leads there."""
    if value.shape == shape:
        return value
    if len(shape) == 4 and value.ndim == 4:
        turned = value.transpose(0, 3, 1, 2)
        if turned.shape == shape:
            return turned
    if value.size == int(np.prod(shape)) and max(shape, default=0) == value.size:
        return value.reshape(shape)
    return None


def sampled(array: NDArray[Any]) -> Array:
    """Evenly spaced values of it, in C order, at most 8191: enough to tell tensors apart."""
    if array.size <= _SAMPLE:
        return np.asarray(array, np.float32).reshape(-1)
    places = np.linspace(0, array.size - 1, _SAMPLE).astype(np.int64)
    return np.asarray(array[np.unravel_index(places, array.shape)], np.float32)


def _tflite_values(item: VariantRun, batch: NDArray[Any]) -> Iterator[Value]:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_path=item.path,
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        num_threads=1,
    )
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], batch)
    interpreter.invoke()
    details = {detail["index"]: detail for detail in interpreter.get_tensor_details()}
    for index in _computed(interpreter, details):
        detail = details[index]
        try:
            value = interpreter.get_tensor(index)
        except ValueError:  # scratch memory, or a tensor without data
            continue
        scale, zero = detail["quantization"]
        if value.dtype in (np.int8, np.uint8, np.int16) and scale:
            exact = ((value.astype(np.float32) - zero) * scale).astype(np.float32)
            yield Value(exact, *declared_range(float(scale), int(zero), value.dtype))
        elif value.dtype == np.float32:
            yield Value(value)


def _computed(interpreter: Any, details: dict[int, Any]) -> list[int]:
    """Indices of the tensors that operators make, in that order, then what is left."""
    order = [int(entry["index"]) for entry in interpreter.get_input_details()]
    for operator in interpreter._get_ops_details():
        order += [int(index) for index in operator["outputs"]]
    known = dict.fromkeys(index for index in order if index in details)
    return list(known)


def _coreml_values(item: VariantRun, batch: NDArray[Any]) -> Iterator[Value]:
    from edge_runtime.runtimes.mil.interpreter import Interpreter
    from edge_runtime.runtimes.mil.program import read_program

    program = read_program(Path(item.path))
    ranges, foreign = declared_in_program(program)
    values: list[Value] = []

    def observe(name: str, value: Any) -> None:
        if value.is_floating_point() and name not in foreign:
            low, high = ranges.get(name, (None, None))
            values.append(Value(value.detach().float().numpy().copy(), low, high))

    interpreter = Interpreter(program)
    interpreter.run({item.variant.inputs[0].name: batch.astype(np.float32)}, observe)
    yield from values


def declared_in_program(program: Any) -> tuple[dict[str, tuple[float, float]], set[str]]:
    """The range of each ``dequantize`` output, and the outputs that are in other units.

    Core ML adds integers on one scale: coremltools reads both terms of a sum with scales of
    which one is 1, and stores the sum accordingly. Such a term is the value that its
    ``quantize`` stored, times a factor; its range says nothing.
    """
    stored = {
        name: (operation.inputs["scale"], np.dtype(kind.dtype))
        for operation in program.operations
        if operation.op_type == "quantize"
        for name, kind in operation.outputs
    }
    users: dict[str, set[str]] = {}
    for operation in program.operations:
        for operand in operation.inputs.values():
            for one in operand if isinstance(operand, tuple) else (operand,):
                users.setdefault(one.name, set()).add(operation.op_type)
    ranges: dict[str, tuple[float, float]] = {}
    foreign: set[str] = set()
    for operation in program.operations:
        source = getattr(operation.inputs.get("input"), "name", "")
        scale, zero = operation.inputs.get("scale"), operation.inputs.get("zero_point")
        if operation.op_type != "dequantize" or source not in stored:
            continue
        if getattr(scale, "val", None) is None:
            continue
        before, kind = stored[source]
        step, known = _number(scale, 0.0), _number(before, 0.0)
        output = operation.outputs[0][0]
        if abs(step - known) > _SAME_SCALE * known and users.get(output) == {"add"}:
            foreign.add(output)
            continue
        ranges[output] = declared_range(step, int(_number(zero, 0)), kind)
    return ranges, foreign


def _number(operand: Any, default: float) -> float:
    """A constant argument's value; ``default`` where there is none."""
    value = getattr(operand, "val", None)
    return float(default if value is None else np.asarray(value).item())


def _torchscript_values(item: VariantRun, batch: NDArray[Any]) -> Iterator[Value]:
    """A ``.ptl`` holds its TorchScript beside the bytecode: every tensor becomes an output."""
    import torch

    torch.backends.quantized.engine = "qnnpack"
    module = torch.jit.load(item.path)
    graph = module.inlined_graph.copy()
    count = len(list(graph.outputs()))
    for node in graph.nodes():
        if node.kind() in ("prim::Constant", "prim::GetAttr"):
            continue  # weights
        for output in node.outputs():
            if str(output.type()) == "Tensor":
                graph.registerOutput(output)
    with torch.no_grad():
        answers = torch._C._jit_interpret_graph(graph, (module._c, torch.from_numpy(batch)))
    for value in (answer.detach() for answer in answers[count:]):
        if value.is_quantized and value.qscheme() in (
            torch.per_tensor_affine,
            torch.per_tensor_symmetric,
        ):
            kind = np.dtype(np.uint8 if value.dtype == torch.quint8 else np.int8)
            bounds = declared_range(value.q_scale(), value.q_zero_point(), kind)
            yield Value(value.dequantize().contiguous().numpy().astype(np.float32), *bounds)
        elif value.is_floating_point():
            yield Value(value.contiguous().numpy().astype(np.float32))


READERS: dict[str, Callable[[VariantRun, NDArray[Any]], Iterator[Value]]] = {
    "tflite": _tflite_values,
    "coreml": _coreml_values,
    "torchscript": _torchscript_values,
}
