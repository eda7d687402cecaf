"""Read tensors out of ``weight.bin``, the blob file beside a MIL program.

Little-endian throughout (``MILBlob/Blob/StorageFormat.hpp`` of coremltools): a header of 64
bytes (uint32 count, uint32 version 2), then for each blob a record of 64 bytes (uint32
sentinel, uint32 type, uint64 size in bytes, uint64 offset of the data, uint64 padding in
bits) and its data. A program names a blob by the offset of its record. Types below 8 bits
are packed, lowest bits first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract import limits
from edge_runtime.contract.errors import ModelLoadError

__all__ = ["BITS", "BlobFile", "element_bytes", "unpack"]

_RECORD = struct.Struct("<IIQQQ")
_SENTINEL = 0xDEADBEEF
_TYPES = {
    1: "float16", 2: "float32", 3: "uint8", 4: "int8", 5: "bfloat16", 6: "int16", 7: "uint16",
    8: "int4", 9: "uint1", 10: "uint2", 11: "uint4", 12: "uint3", 13: "uint6", 14: "int32",
    15: "uint32",
}  # fmt: skip

BITS: dict[str, int] = {
    "uint1": 1, "uint2": 2, "uint3": 3, "int4": 4, "uint4": 4, "uint6": 6, "int8": 8, "uint8": 8,
    "bool": 8, "int16": 16, "uint16": 16, "float16": 16, "bfloat16": 16, "int32": 32,
    "uint32": 32, "float32": 32, "int64": 64, "uint64": 64, "float64": 64,
}  # fmt: skip
"""Stored bits of one number, by MIL's own (lower-case) type name."""


def element_bytes(dtype: str, count: int) -> int:
    """Bytes that ``count`` packed numbers take."""
    return (BITS[dtype] * count + 7) // 8


def unpack(data: bytes | memoryview, dtype: str, shape: Sequence[int]) -> NDArray[np.generic]:
    """Numbers of a MIL type from their packed bytes.

    Below 8 bits they come as int8 or uint8, one number a byte; bfloat16 as float32. Raises
    ``ModelLoadError`` when the bytes do not fit the shape.
    """
    count = math.prod(shape)
    if dtype not in BITS or count > limits.MAX_TENSOR_ELEMENTS:
        raise ModelLoadError(f"a constant is {dtype}{list(shape)}: not supported")
    bits = BITS[dtype]
    size = element_bytes(dtype, count)
    if len(data) < size:
        raise ModelLoadError(f"a constant {dtype}{list(shape)} has {len(data)} of {size} bytes")
    if bits >= 8:
        if dtype == "bfloat16":
            wide = np.frombuffer(data, np.uint16, count).astype(np.uint32) << 16
            return wide.view(np.float32).reshape(shape)
        return np.frombuffer(data, np.dtype(dtype), count).reshape(shape)
    raw = np.frombuffer(data, np.uint8, size)
    if bits in (1, 2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        values = ((raw[:, None] >> shifts) & ((1 << bits) - 1)).reshape(-1)[:count]
    else:
        digits = np.unpackbits(raw, bitorder="little")[: count * bits].reshape(count, bits)
        values = (digits << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
    if dtype == "int4":  # two's complement
        values = (values ^ 8).astype(np.int8) - np.int8(8)
    return values.reshape(shape)


class BlobFile:
    """One ``weight.bin``, mapped into memory and read on demand."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            self._data: memoryview = memoryview(np.memmap(path, mode="r").data)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"weights {path.name} cannot be read: {error}") from None
        if len(self._data) < 64 or struct.unpack_from("<II", self._data)[1] != 2:
            raise ModelLoadError(f"weights {path.name} are no Core ML blob file of version 2")

    def read(self, offset: int, dtype: str, shape: Sequence[int]) -> NDArray[np.generic]:
        """The blob whose record is at ``offset``; it must hold ``dtype``.

        Raises ``ModelLoadError`` for anything that does not add up.
        """
        if not 0 <= offset <= len(self._data) - 64:
            raise ModelLoadError(f"{self.name}: no blob at {offset}")
        sentinel, kind, size, start, _ = _RECORD.unpack_from(self._data, offset)
        stored = _TYPES.get(kind, f"type {kind}")
        # Booleans are stored as uint8.
        if sentinel != _SENTINEL or stored != ("uint8" if dtype == "bool" else dtype):
            raise ModelLoadError(f"{self.name}: the blob at {offset} is no {dtype}")
        if start + size > len(self._data):
            raise ModelLoadError(f"{self.name}: the blob at {offset} reaches past the end")
        return unpack(self._data[start : start + size], dtype, shape)
