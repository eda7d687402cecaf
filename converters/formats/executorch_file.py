"""Read a ``.pte`` without ExecuTorch: what it calls, what it delegates, what it stores.

The file is a FlatBuffer (``schema/program.fbs`` of ExecuTorch 1.3, identifier ``ET12``), then
segments of data. A blob for XNNPACK is a header and a FlatBuffer of its own
(``backends/xnnpack/serialization/schema.fbs``). Field numbers below are positions in those
tables, which FlatBuffers fixes for good: fields are only ever added at the end.
"""

from __future__ import annotations

import struct
from pathlib import Path

import msgspec

from edge_runtime.contract.errors import ModelLoadError

__all__ = ["METADATA_METHOD", "PteFile", "read_metadata", "read_pte"]

METADATA_METHOD = "nearfar_metadata"
"""The method of the ``.pte`` that returns the metadata: one string, JSON."""

_STRING = 6  # KernelTypes
_TENSOR = 5
_KERNEL_CALL, _DELEGATE_CALL = 1, 2  # InstructionArguments
_SCALAR_TYPES = {
    0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32",
    7: "float64", 11: "bool", 15: "bfloat16",
}  # fmt: skip
_XNN_TYPES = {
    1: "float32", 2: "float16", 3: "int8", 4: "uint8", 5: "int32", 6: "int8", 7: "int32",
    8: "int4", 9: "int8", 10: "int4", 11: "int8", 12: "int32", 13: "float32", 14: "bfloat16",
}  # fmt: skip
_XNN_NODES = (
    "NONE", "Add", "FullyConnected", "Softmax", "Sigmoid", "StaticTranspose", "Clamp", "Conv2d",
    "Div", "StaticResizeBilinear2D", "StaticConstantPad", "AvgPooling2d", "Minimum",
    "DepthwiseConv2d", "MaxPooling2d", "Multiply", "Subtract", "Floor", "Convert",
    "GlobalAvgPooling2d", "StaticReshape", "ArgMaxPooling2d", "SquareRoot", "Ceiling",
    "Hardswish", "LeakyReLU", "Maximum", "Negate", "Square", "ELU", "Abs", "PReLU",
    "Concatenate2", "Concatenate3", "Concatenate4", "StaticSlice", "ScaledDotProductAttention",
    "BatchMatrixMultiply", "Concatenate5", "ConvTranspose2d", "ReciprocalSquareRoot", "Log",
    "Gelu", "Tanh", "Exp", "Sin", "Copy", "Cos",
)  # fmt: skip
_QUANTIZED = 2  # XValueUnion: XNNQuantizedTensorValue


class PteFile(msgspec.Struct, frozen=True, kw_only=True):
    """What one method of a ``.pte`` consists of."""

    kernels: dict[str, int]
    """Calls of ExecuTorch's own kernels, ``aten::topk.values``: how often."""
    delegated: dict[str, int]
    """Operators inside XNNPACK's blobs, ``Conv2d``: how often."""
    delegated_int8: int
    """Of those, the ones whose output is an 8-bit tensor."""
    delegates: tuple[str, ...]
    """The backend of each blob."""
    constants: dict[str, int]
    """Bytes of constants by number type."""

    @property
    def delegated_share(self) -> float:
        """Operators on XNNPACK over all operators, 0..1."""
        inside, outside = sum(self.delegated.values()), sum(self.kernels.values())
        return inside / (inside + outside) if inside + outside else 0.0


class _Table:
    """One table of a FlatBuffer."""

    def __init__(self, data: memoryview, at: int) -> None:
        self._data = data
        self._at = at
        self._vtable = at - struct.unpack_from("<i", data, at)[0]
        self._fields = struct.unpack_from("<H", data, self._vtable)[0] // 2 - 2

    def _field(self, number: int) -> int:
        """Where the field lies; 0: absent, so it has its default."""
        if number >= self._fields:
            return 0
        offset = struct.unpack_from("<H", self._data, self._vtable + 4 + 2 * number)[0]
        return self._at + offset if offset else 0

    def number(self, number: int, code: str = "i", default: int = 0) -> int:
        """A scalar; ``code`` as in ``struct``."""
        at = self._field(number)
        return int(struct.unpack_from(f"<{code}", self._data, at)[0]) if at else default

    def _pointed(self, number: int) -> int:
        at = self._field(number)
        return at + struct.unpack_from("<I", self._data, at)[0] if at else 0

    def table(self, number: int) -> _Table | None:
        """A table, also the value of a union."""
        at = self._pointed(number)
        return _Table(self._data, at) if at else None

    def text(self, number: int) -> str:
        """A string; empty when absent."""
        return self.raw(number).decode()

    def raw(self, number: int) -> bytes:
        """A vector of bytes."""
        at = self._pointed(number)
        if not at:
            return b""
        size = struct.unpack_from("<I", self._data, at)[0]
        if at + 4 + size > len(self._data):
            raise ValueError("a vector leaves the file")
        return bytes(self._data[at + 4 : at + 4 + size])

    def numbers(self, number: int, code: str) -> tuple[int, ...]:
        """A vector of scalars."""
        at = self._pointed(number)
        if not at:
            return ()
        count = struct.unpack_from("<I", self._data, at)[0]
        return struct.unpack_from(f"<{count}{code}", self._data, at + 4)

    def tables(self, number: int) -> list[_Table]:
        """A vector of tables."""
        at = self._pointed(number)
        if not at:
            return []
        count = struct.unpack_from("<I", self._data, at)[0]
        places = struct.unpack_from(f"<{count}I", self._data, at + 4)
        return [
            _Table(self._data, at + 4 + 4 * index + place) for index, place in enumerate(places)
        ]


def read_metadata(path: Path) -> str:
    """The JSON that the converter stored in a ``.pte``; empty for a file without.

    Reads the file alone: neither the bundle nor ExecuTorch is needed. An app on a phone gets
    the same string by executing the method ``nearfar_metadata``. Raises ``ModelLoadError``.
    """
    try:
        program, _ = _open(path)
        for plan in program.tables(1):
            if plan.text(0) == METADATA_METHOD:
                value = plan.tables(2)[plan.numbers(4, "i")[0]]
                string = value.table(1)
                if value.number(0, "B") != _STRING or string is None:
                    raise ValueError("the metadata are no string")
                return string.text(0)
    except (struct.error, ValueError, IndexError) as error:
        raise _broken(path, error) from None
    return ""


def read_pte(path: Path, method: str = "forward") -> PteFile:
    """What a method consists of. Raises ``ModelLoadError``."""
    try:
        program, segments = _open(path)
        for plan in program.tables(1):
            if plan.text(0) == method:
                return _read_plan(program, plan, segments)
    except (struct.error, ValueError, IndexError) as error:
        raise _broken(path, error) from None
    raise ModelLoadError(f"{path.name} has no method {method!r}: convert the model again")


def _broken(path: Path, error: Exception) -> ModelLoadError:
    return ModelLoadError(f"{path.name} is no readable .pte ({error}): copy or convert it again")


def _open(path: Path) -> tuple[_Table, memoryview]:
    """The root table, and the segments' bytes (empty when there are none)."""
    try:
        data = memoryview(path.read_bytes())
    except OSError as error:
        raise ModelLoadError(f"cannot read {path.name}: {error.strerror}") from None
    if bytes(data[4:8]) != b"ET12":
        raise ValueError("its identifier is not ET12")
    segments = data[len(data) :]
    if bytes(data[8:12]) == b"eh00":
        size, base = struct.unpack_from("<QQ", data, 16)
        if size > len(data) or base > len(data):
            raise ValueError("it is cut off")
        segments = data[base:] if base else segments
        data = data[:size]
    return _Table(data, struct.unpack_from("<I", data, 0)[0]), segments


def _read_plan(program: _Table, plan: _Table, segments: memoryview) -> PteFile:
    operators = [_operator_name(one) for one in plan.tables(6)]
    blobs = [_blob(program, one, segments) for one in plan.tables(7)]
    kernels: dict[str, int] = {}
    delegated: dict[str, int] = {}
    constants = _plan_constants(plan)
    int8 = 0
    for chain in plan.tables(5):
        for instruction in chain.tables(2):
            kind, arguments = instruction.number(0, "B"), instruction.table(1)
            if kind == _KERNEL_CALL and arguments is not None:
                _add(kernels, operators[arguments.number(0)], 1)
            elif kind == _DELEGATE_CALL and arguments is not None:
                name, blob = blobs[arguments.number(0)]
                if name == "XnnpackBackend":
                    int8 += _read_xnnpack(blob, delegated, constants)
    return PteFile(
        kernels=kernels,
        delegated=delegated,
        delegated_int8=int8,
        delegates=tuple(name for name, _ in blobs),
        constants=constants,
    )


def _add(counts: dict[str, int], key: str, more: int) -> None:
    counts[key] = counts.get(key, 0) + more


def _operator_name(operator: _Table) -> str:
    overload = operator.text(1)
    return operator.text(0) + (f".{overload}" if overload else "")


def _blob(program: _Table, delegate: _Table, segments: memoryview) -> tuple[str, memoryview]:
    """The backend's name and its bytes: in a segment of the file, or in the program."""
    name, place = delegate.text(0), delegate.table(1)
    if place is None:
        return name, segments[:0]
    index = place.number(1, "I")
    if place.number(0, "b") == 0:
        return name, memoryview(program.tables(3)[index].raw(0))
    segment = program.tables(4)[index]
    start, size = segment.number(0, "Q"), segment.number(1, "Q")
    if start + size > len(segments):
        raise ValueError("a segment leaves the file")
    return name, segments[start : start + size]


def _plan_constants(plan: _Table) -> dict[str, int]:
    """Constants that the kernels read: tensors whose data lie in the file."""
    constants: dict[str, int] = {}
    for value in plan.tables(2):
        tensor = value.table(1)
        if value.number(0, "B") != _TENSOR or tensor is None or not tensor.number(5, "I"):
            continue
        if tensor.table(6) is not None:  # memory is planned for it: an initial value
            continue
        name = _SCALAR_TYPES.get(tensor.number(0, "b"), "other")
        _add(constants, name, _count(tensor.numbers(2, "i")) * _item_bits(name) // 8)
    return constants


def _count(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _item_bits(name: str) -> int:
    return {"bool": 8, "bfloat16": 16, "other": 8, "int4": 4}.get(
        name, int(name.lstrip("abcdefghijklmnopqrstuvwxyz") or 8)
    )


def _read_xnnpack(blob: memoryview, nodes: dict[str, int], constants: dict[str, int]) -> int:
    """Add one blob's operators and constants; how many operators answer in 8 bits."""
    if bytes(blob[4:8]) == b"XH00":
        at, size = struct.unpack_from("<II", blob, 10)
        blob = blob[at : at + size]
    graph = _Table(blob, struct.unpack_from("<I", blob, 0)[0])
    types: dict[int, str] = {}
    for value in graph.tables(2):
        kind, tensor = value.number(0, "B"), value.table(1)
        if kind == _QUANTIZED and tensor is not None:
            tensor = tensor.table(0)
        if tensor is None:
            continue
        name = _XNN_TYPES.get(tensor.number(0, "h"), "other")
        types[tensor.number(6, "I")] = name
        if tensor.number(3, "I"):
            sizes = tensor.numbers(2, "I")
            _add(constants, name, _count(sizes) * _item_bits(name) // 8)
    int8 = 0
    for node in graph.tables(1):
        kind, body = node.number(0, "B"), node.table(1)
        name = _XNN_NODES[kind] if kind < len(_XNN_NODES) else f"node {kind}"
        _add(nodes, name, 1)
        output = _output_field(name)
        if body is not None and types.get(body.number(output, "I")) == "int8":
            int8 += 1
    return int8


def _output_field(name: str) -> int:
    """Which field of a node's table names its output."""
    if "onv" in name and name not in ("Convert",):
        return 18
    if name.startswith("Concatenate"):
        return 5
    special = {
        "FullyConnected": 3, "AvgPooling2d": 11, "MaxPooling2d": 11, "StaticTranspose": 3,
        "StaticResizeBilinear2D": 3, "StaticConstantPad": 4, "StaticReshape": 3,
        "StaticSlice": 4, "LeakyReLU": 2, "ELU": 2, "ArgMaxPooling2d": 7,
        "ScaledDotProductAttention": 5,
    }  # fmt: skip
    if name in special:
        return special[name]
    pairs = ("Add", "Div", "Minimum", "Multiply", "Subtract", "Maximum", "PReLU",
             "BatchMatrixMultiply")  # fmt: skip
    return 2 if name in pairs else 1
