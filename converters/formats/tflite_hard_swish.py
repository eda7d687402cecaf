"""Write hard swish as operators that XNNPACK runs in 8 bits.

LiteRT's delegate has no 8-bit HARD_SWISH: each one ends a delegated part of the graph and
runs on the slow reference kernel, which makes an int8 MobileNetV3 slower than a float one.

    hard_swish(x) = x * relu6(x + 3) / 6        (Howard et al., ICCV 2019, section 5.2)

as ADD with a fused RELU6, and two MULs. The last one costs no accuracy: its output has the
grid of its input, a sixth as wide.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from converters.formats.tflite_file import operator_names, read_model, write_model

__all__ = ["split_hard_swish"]


def split_hard_swish(data: bytes) -> tuple[bytes, int]:
    """A float file without HARD_SWISH, and how many there were (0: ``data`` itself)."""
    from ai_edge_litert import schema_py_generated as schema

    model = read_model(data)
    count = 0
    for graph in model.subgraphs:
        names = operator_names(model, graph)
        if "HARD_SWISH" not in names:
            continue
        parts = _Parts(model, graph)
        operators: list[Any] = []
        for operator, name in zip(graph.operators, names, strict=True):
            if name != "HARD_SWISH":
                operators.append(operator)
                continue
            (source,), (target,) = operator.inputs, operator.outputs
            gate, product = parts.like(target, "gate"), parts.like(target, "product")
            relu6 = schema.ActivationFunctionType.RELU6
            operators += [
                parts.operator("ADD", [source, parts.three], gate, relu6),
                parts.operator("MUL", [source, gate], product),
                parts.operator("MUL", [product, parts.sixth], target),
            ]
            count += 1
        graph.operators = operators
    return (write_model(model), count) if count else (data, 0)


class _Parts:
    """Adds tensors and operators to one subgraph."""

    def __init__(self, model: Any, graph: Any) -> None:
        self.model = model
        self.graph = graph
        self.three = self._constant("three", 3.0)
        self.sixth = self._constant("sixth", 1.0 / 6.0)

    def like(self, target: int, role: str) -> int:
        """A tensor of the shape of ``target``, under its module's name."""
        from ai_edge_litert import schema_py_generated as schema

        model = self.graph.tensors[target]
        tensor = schema.TensorT()
        tensor.shape, tensor.shapeSignature = model.shape, model.shapeSignature
        tensor.hasRank = model.hasRank
        tensor.type = model.type
        tensor.buffer = 0
        tensor.name = (model.name or b"") + f"hard_swish_{role}_{target};".encode()
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def operator(self, kind: str, inputs: list[int], output: int, activation: int = 0) -> Any:
        from ai_edge_litert import schema_py_generated as schema

        operator = schema.OperatorT()
        operator.opcodeIndex = self._opcode(kind)
        operator.inputs, operator.outputs = inputs, [output]
        options = {"ADD": schema.AddOptionsT, "MUL": schema.MulOptionsT}[kind]()
        options.fusedActivationFunction = activation
        operator.builtinOptions = options
        operator.builtinOptionsType = {
            "ADD": schema.BuiltinOptions.AddOptions,
            "MUL": schema.BuiltinOptions.MulOptions,
        }[kind]
        return operator

    def _constant(self, name: str, value: float) -> int:
        from ai_edge_litert import schema_py_generated as schema

        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.float32(value).tobytes(), dtype=np.uint8)
        buffer.offset = buffer.size = 0
        self.model.buffers.append(buffer)
        tensor = schema.TensorT()
        tensor.shape, tensor.hasRank = [1], True
        tensor.type = schema.TensorType.FLOAT32
        tensor.buffer = len(self.model.buffers) - 1
        tensor.name = f"hard_swish_{name}".encode()
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def _opcode(self, kind: str) -> int:
        from ai_edge_litert import schema_py_generated as schema

        code = getattr(schema.BuiltinOperator, kind)
        for index, known in enumerate(self.model.operatorCodes):
            if max(known.builtinCode, known.deprecatedBuiltinCode) == code:
                return index
        entry = schema.OperatorCodeT()
        entry.builtinCode = entry.deprecatedBuiltinCode = code
        entry.version = 1
        self.model.operatorCodes.append(entry)
        return len(self.model.operatorCodes) - 1
