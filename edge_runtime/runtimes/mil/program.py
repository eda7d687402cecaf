"""Read the MIL program and its constants out of an ``.mlpackage``.

Operators and values keep their names. Constants are decoded here; ``constexpr_*`` operators
(compressed weights) stay operators, so that a census can see them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract import limits
from edge_runtime.contract.errors import ModelLoadError
from edge_runtime.runtimes.mil.blob import BlobFile, element_bytes, unpack
from edge_runtime.runtimes.mil.schema import load_schema

__all__ = [
    "Constant",
    "Function",
    "Operand",
    "Operation",
    "Type",
    "model_file",
    "read_function",
    "read_program",
    "read_spec",
    "weights_folder",
]

Constant: TypeAlias = NDArray[Any] | np.generic | str | tuple[Any, ...]
"""An array, a number, a text, or a list of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Type:
    """A MIL tensor type; ``dtype`` in lower case, ``shape`` () for a scalar."""

    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operand:
    """One argument: a value's name, and for a constant what it is."""

    name: str
    val: Constant | None = None
    type: Type | None = None
    stored_bytes: int = 0
    """In the file, when it is a constant."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """One operator; an argument that is a list of values is a tuple."""

    op_type: str
    name: str
    inputs: Mapping[str, Operand | tuple[Operand, ...]]
    outputs: tuple[tuple[str, Type], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
    """What ``main`` computes."""

    inputs: Mapping[str, Type]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]
    """In the order of computation; without ``const``."""


def weights_folder(package: Path) -> Path:
    """Where an ``.mlpackage`` keeps its weight blobs."""
    return package / "Data" / "com.apple.CoreML" / "weights"


def model_file(package: Path) -> Path:
    """Where an ``.mlpackage`` keeps its program."""
    return package / "Data" / "com.apple.CoreML" / "model.mlmodel"


def read_spec(package: Path) -> Any:
    """The package's protobuf ``Model``. Raises ``ModelLoadError``.

    Not through ``coremltools.utils.load_spec``, which rewrites ``Manifest.json`` as it
    reads and so breaks the package's digest.
    """
    spec = load_schema("Model_pb2").Model()
    try:
        spec.ParseFromString(model_file(package).read_bytes())
    except Exception as error:  # OSError, protobuf's DecodeError
        raise ModelLoadError(
            f"{package.name} holds no Core ML model: {type(error).__name__}: {error}"
        ) from None
    return spec


def read_program(package: Path) -> Function:
    """The ``main`` function of the package's ML program.

    Raises ``ModelLoadError`` for a folder that is no ML program package, or one that uses
    what is not read here (control flow, states, dynamic shapes).
    """
    return read_function(read_spec(package), weights_folder(package), package.name)


def read_function(spec: Any, weights: Path, name: str) -> Function:
    """The same, from a protobuf ``Model`` and its folder of blobs; ``name`` is for errors."""
    if spec.WhichOneof("Type") != "mlProgram":
        raise ModelLoadError(f"{name} is no ML program: convert it again")
    if "main" not in spec.mlProgram.functions:
        raise ModelLoadError(f"{name} has no function main")
    function = spec.mlProgram.functions["main"]
    if function.opset not in function.block_specializations:
        raise ModelLoadError(f"{name} has no program for its own operator set")
    try:
        return _Reader(weights).function(function)
    except ModelLoadError as error:
        raise ModelLoadError(f"{name}: {error.detail}") from None
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise ModelLoadError(f"{name} makes no sense: {type(error).__name__}: {error}") from None


class _Reader:
    """One pass over a function."""

    def __init__(self, weights: Path) -> None:
        self._weights = weights
        self._files: dict[str, BlobFile] = {}
        self._known: dict[str, Operand] = {}
        self._dtypes = {
            number: name.lower()
            for name, number in load_schema("MIL_pb2").DataType.items()
        }  # fmt: skip

    def function(self, function: Any) -> Function:
        inputs = {item.name: self._type(item.type) for item in function.inputs}
        for name, kind in inputs.items():
            self._known[name] = Operand(name=name, type=kind)
        block = function.block_specializations[function.opset]
        operations = []
        for op in block.operations:
            if op.type == "const":
                self._constant(op)
            else:
                operations.append(self._operation(op))
        for name in block.outputs:
            if name not in self._known:
                raise ModelLoadError(f"output {name!r} is never computed")
        return Function(inputs=inputs, outputs=tuple(block.outputs), operations=tuple(operations))

    def _type(self, kind: Any) -> Type:
        which = kind.WhichOneof("type")
        if which in ("dictionaryType", "listType"):
            return Type(dtype=which.removesuffix("Type"), shape=())
        if which != "tensorType":
            raise ModelLoadError(f"values of {which} are not supported here")
        tensor = kind.tensorType
        shape = []
        for dimension in tensor.dimensions:
            if dimension.WhichOneof("dimension") != "constant":
                raise ModelLoadError("dynamic shapes are not supported here")
            shape.append(int(dimension.constant.size))
        if len(shape) != tensor.rank or len(shape) > limits.MAX_TENSOR_RANK:
            raise ModelLoadError(f"a tensor of rank {tensor.rank} has shape {shape}")
        return Type(dtype=self._dtypes[tensor.dataType], shape=tuple(shape))

    def _constant(self, op: Any) -> None:
        output = op.outputs[0]
        value, size = self._value(op.attributes["val"])
        self._known[output.name] = Operand(
            name=output.name, val=value, type=self._type(output.type), stored_bytes=size
        )

    def _operation(self, op: Any) -> Operation:
        if op.blocks:
            raise ModelLoadError(f"operator {op.type}: control flow is not supported here")
        inputs: dict[str, Operand | tuple[Operand, ...]] = {}
        name = op.outputs[0].name if op.outputs else op.type
        for key, attribute in op.attributes.items():
            if key == "name":
                name = str(self._value(attribute)[0])
            else:  # iOS 16's constexpr operators keep their data here
                value, size = self._value(attribute)
                kind = self._type(attribute.type)
                inputs[key] = Operand(name=key, val=value, type=kind, stored_bytes=size)
        for key, argument in op.inputs.items():
            operands = tuple(self._operand(binding) for binding in argument.arguments)
            # "values" of concat and stack is a list even when it has one member.
            inputs[key] = operands if len(operands) != 1 or key == "values" else operands[0]
        outputs = tuple((item.name, self._type(item.type)) for item in op.outputs)
        for output, kind in outputs:
            self._known[output] = Operand(name=output, type=kind)
        return Operation(op_type=op.type, name=name, inputs=inputs, outputs=outputs)

    def _operand(self, binding: Any) -> Operand:
        if binding.WhichOneof("binding") == "value":
            value, size = self._value(binding.value)
            kind = self._type(binding.value.type)
            return Operand(name="", val=value, type=kind, stored_bytes=size)
        if binding.name not in self._known:
            raise ModelLoadError(f"value {binding.name!r} is used before it is computed")
        return self._known[binding.name]

    def _value(self, value: Any) -> tuple[Constant, int]:
        """A constant, and how many bytes it takes in the file."""
        which = value.WhichOneof("value")
        if which == "blobFileValue":
            kind = self._type(value.type)
            array = self._file(value.blobFileValue.fileName).read(
                value.blobFileValue.offset, kind.dtype, kind.shape
            )
            return array, element_bytes(kind.dtype, math.prod(kind.shape))
        immediate = value.immediateValue
        if immediate.WhichOneof("value") == "list":
            members = [self._value(item) for item in immediate.list.values]
            return tuple(member for member, _ in members), sum(size for _, size in members)
        if immediate.WhichOneof("value") != "tensor":
            raise ModelLoadError("a constant is a dictionary: not supported here")
        kind = self._type(value.type)
        return self._tensor(immediate.tensor, kind)

    def _tensor(self, tensor: Any, kind: Type) -> tuple[Constant, int]:
        which = tensor.WhichOneof("value")
        if which == "strings":
            texts = tuple(str(text) for text in tensor.strings.values)
            return (texts[0] if kind.shape == () else texts), sum(map(len, texts))
        if which == "bytes":
            array = unpack(tensor.bytes.values, kind.dtype, kind.shape)
        else:
            stored = {
                "floats": np.float32, "ints": np.int32, "bools": np.bool_,
                "longInts": np.int64, "doubles": np.float64,
            }[which]  # fmt: skip
            array = np.array(getattr(tensor, which).values, dtype=stored).reshape(kind.shape)
        return (array[()] if kind.shape == () else array), array.nbytes

    def _file(self, name: str) -> BlobFile:
        prefix, _, base = name.rpartition("/")
        if prefix != "@model_path/weights" or base in ("", ".", ".."):
            raise ModelLoadError(f"weights are said to be in {name!r}, outside the package")
        if base not in self._files:
            self._files[base] = BlobFile(self._weights / base)
        return self._files[base]
