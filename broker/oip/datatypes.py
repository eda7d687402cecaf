"""Tensors of the Open Inference Protocol, as JSON and as binary data.

https://github.com/kserve/open-inference-protocol and Triton's binary tensor data extension:
little-endian, row-major, without padding; BOOL is one byte, 0 or 1; an element of BYTES is
its length as four bytes and then itself; BF16 is the upper half of a float32.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import InferenceError, TensorError
from edge_runtime.contract.tensors import DType

__all__ = [
    "DATATYPES",
    "Datatype",
    "Values",
    "datatype_of",
    "element_bytes",
    "read_binary",
    "read_json",
    "write_binary",
    "write_json",
]

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BF16", "BYTES",
]  # fmt: skip
Values = NDArray[Any] | Sequence[bytes]
"""Numbers in the shape of their tensor, or the elements of a BYTES tensor in row-major order."""

_STORED: Final[Mapping[Datatype, str]] = MappingProxyType(
    {
        "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
        "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
        "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BF16": "<u2",
    }
)  # fmt: skip
DATATYPES: Final[tuple[Datatype, ...]] = (*_STORED, "BYTES")
_OF_DTYPE: Final[Mapping[DType, Datatype]] = MappingProxyType(
    {
        "float32": "FP32", "float16": "FP16", "int8": "INT8", "uint8": "UINT8",
        "int16": "INT16", "int32": "INT32", "int64": "INT64", "bool": "BOOL",
    }
)  # fmt: skip
_BINARY_ONLY: Final = ("FP16", "BF16")
_LENGTH: Final = struct.Struct("<I")


def datatype_of(dtype: DType) -> Datatype:
    """The protocol's name of a manifest's dtype."""
    return _OF_DTYPE[dtype]


def element_bytes(datatype: Datatype) -> int:
    """Bytes of one number; of an element of BYTES, its length alone."""
    return _LENGTH.size if datatype == "BYTES" else np.dtype(_STORED[datatype]).itemsize


def read_binary(name: str, datatype: Datatype, shape: tuple[int, ...], data: memoryview) -> Values:
    """The tensor in ``data``, which holds nothing else; BF16 becomes float32, exactly.

    Raises ``TensorError`` when it is another size than the shape says.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        return _read_elements(name, count, data)
    expected = count * element_bytes(datatype)
    if len(data) != expected:
        raise TensorError(
            f"input {name!r}: {datatype}{list(shape)} takes {expected} bytes, got {len(data)}"
        )
    stored = np.frombuffer(data, dtype=_STORED[datatype]).reshape(shape)
    if datatype == "BF16":
        return (stored.astype("<u4") << 16).view("<f4")
    if datatype == "BOOL" and stored.view("u1").max(initial=0) > 1:
        raise TensorError(f"input {name!r}: a byte of BOOL must be 0 or 1")
    return stored


def _read_elements(name: str, count: int, data: memoryview) -> list[bytes]:
    elements: list[bytes] = []
    at = 0
    while at < len(data) and len(elements) < count:
        start = at + _LENGTH.size
        if start > len(data):
            break
        at = start + int(_LENGTH.unpack_from(data, at)[0])
        if at > len(data):
            raise TensorError(
                f"input {name!r}: element {len(elements)} ends {at - len(data)} bytes after the "
                "tensor: send each as its length in four little-endian bytes, then itself"
            )
        elements.append(bytes(data[start:at]))
    if len(elements) != count or at != len(data):
        raise TensorError(
            f"input {name!r}: {len(data)} bytes are not {count} elements, each with its length "
            "in four little-endian bytes before it"
        )
    return elements


def read_json(name: str, datatype: Datatype, shape: tuple[int, ...], data: bytes) -> Values:
    """The tensor in a JSON array, flat or nested as its shape is; elements of BYTES are text.

    Brackets and commas are counted first, so that the array becomes as large as the shape
    says and not larger. Raises ``TensorError``.
    """
    if datatype in _BINARY_ONLY:
        raise TensorError(
            f"input {name!r}: {datatype} cannot be sent as JSON: use the binary data format"
        )
    count = math.prod(shape)
    nested = 1 + sum(math.prod(shape[:depth]) for depth in range(1, len(shape)))
    lists = data.count(b"[")
    depth = len(shape) if lists == nested else 1
    fits = lists in (1, nested) and data.count(b",") == max(count - 1, 0)
    if datatype == "BYTES":  # text may hold brackets and commas
        fits = lists <= nested
    if not fits:
        raise TensorError(
            f"input {name!r}: data must be {count} elements, in one array or nested as "
            f"{list(shape)}"
        )
    try:
        decoded = _decoder(datatype, depth).decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TensorError(f"input {name!r}: {error}, for data of {datatype}") from None
    if datatype == "BYTES":
        return _text_elements(name, shape, decoded, depth)
    array = _numbers(name, datatype, decoded)
    if array.shape != (shape if depth > 1 else (count,)):
        raise TensorError(f"input {name!r}: data is {list(array.shape)}, not {list(shape)}")
    return array.reshape(shape)


@functools.cache
def _decoder(datatype: Datatype, depth: int) -> msgspec.json.Decoder[Any]:
    kind: Any = int
    if datatype in ("FP32", "FP64"):
        kind = float
    elif datatype in ("BOOL", "BYTES"):
        kind = bool if datatype == "BOOL" else str
    for _ in range(depth):
        kind = list[kind]
    return msgspec.json.Decoder(kind)


def _numbers(name: str, datatype: Datatype, decoded: Any) -> NDArray[Any]:
    try:
        if datatype not in ("FP32", "FP64"):
            return np.array(decoded, dtype=_STORED[datatype])
        with np.errstate(over="ignore"):
            array = np.array(decoded, dtype="<f8").astype(_STORED[datatype], copy=False)
    except (ValueError, OverflowError) as error:  # ragged, or out of the datatype's range
        raise TensorError(f"input {name!r}: {error}") from None
    if not np.isfinite(array).all():
        raise TensorError(f"input {name!r}: a number is out of the range of {datatype}")
    return array


def _text_elements(name: str, shape: tuple[int, ...], decoded: Any, depth: int) -> list[bytes]:
    sizes_fit = True
    for size in shape[1:depth]:
        sizes_fit = sizes_fit and all(len(part) == size for part in decoded)
        decoded = [element for part in decoded for element in part]
    if not sizes_fit or len(decoded) != math.prod(shape):
        raise TensorError(f"input {name!r}: data must be {list(shape)} texts")
    return [text.encode() for text in decoded]


def write_binary(datatype: Datatype, values: Values) -> bytes:
    """The bytes of a tensor; of every datatype but BF16, which no model here gives."""
    if isinstance(values, np.ndarray):
        return values.astype(_STORED[datatype], copy=False).tobytes()
    return b"".join(_LENGTH.pack(len(element)) + element for element in values)


def write_json(name: str, values: Values) -> list[Any]:
    """The elements of a tensor, flat, as JSON can say them.

    Raises ``InferenceError`` on NaN, infinity and bytes that are no text, which it cannot.
    """
    if not isinstance(values, np.ndarray):
        try:
            return [element.decode() for element in values]
        except UnicodeDecodeError:
            raise InferenceError(
                f"output {name!r} holds bytes that JSON cannot: ask for it as binary data"
            ) from None
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InferenceError(
            f"output {name!r} holds numbers that JSON cannot: ask for it as binary data"
        )
    found: list[Any] = values.ravel().tolist()
    return found
