"""Read the record that nearfar stores inside each model file, without any converter.

* ``.tflite``: a metadata buffer named ``nearfar.json``;
* ``.ptl``: the archive member ``extra/nearfar.json``;
* ``.mlpackage``: the user-defined metadata entry ``nearfar.json``.

Files come from outside: whatever is wrong with one is a ``ModelLoadError``, and no number
in it is trusted.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from edge_runtime.contract import limits
from edge_runtime.contract.errors import ModelLoadError

__all__ = ["RECORD_NAME", "read_metadata", "read_mlpackage", "read_ptl", "read_tflite"]

RECORD_NAME = "nearfar.json"

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DESCRIPTION, _METADATA, _USER_DEFINED = 2, 100, 100
_KEY, _VALUE = 1, 2
"""Field numbers of Core ML's Model.proto (description.metadata.userDefined, a map)."""


def read_metadata(path: Path) -> str | None:
    """The JSON inside a model file, by its suffix; None: it has none, or no such format.

    Raises ``ModelLoadError`` for a file that is not what its suffix says.
    """
    reader = _READERS.get(path.suffix)
    return reader(path) if reader is not None else None


def read_tflite(path: Path) -> str | None:
    """From a ``.tflite``. Needs ``ai-edge-litert`` for the flatbuffer's schema."""
    from ai_edge_litert import schema_py_generated as schema

    data = path.read_bytes()
    if data[4:8] != b"TFL3":
        raise ModelLoadError(f"{path.name} is no TensorFlow Lite file")
    try:
        model = schema.Model.GetRootAs(data, 0)
        for number in range(model.MetadataLength()):
            entry = model.Metadata(number)
            if entry.Name() == RECORD_NAME.encode():
                buffer = model.Buffers(entry.Buffer())
                content = buffer.DataAsNumpy()
                return _text(path, b"" if buffer.DataIsNone() else content.tobytes())
    except ModelLoadError:
        raise
    except Exception as error:  # flatbuffers reads where the file points, and raises many types
        raise ModelLoadError(f"{path.name} is damaged: {type(error).__name__}") from None
    return None


def read_ptl(path: Path) -> str | None:
    """From a ``.ptl``, which is a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.filename.endswith(f"/extra/{RECORD_NAME}"):
                    if member.file_size > limits.MAX_MANIFEST_BYTES:
                        raise ModelLoadError(f"{path.name}: its {RECORD_NAME} is too large")
                    return _text(path, archive.read(member))
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
        raise ModelLoadError(f"{path.name} is no TorchScript archive: {error}") from None
    return None


def read_mlpackage(path: Path) -> str | None:
    """From an ``.mlpackage`` folder: its ``.mlmodel`` is one protobuf message."""
    found = sorted(path.glob("Data/*/*.mlmodel"))
    if not found:
        raise ModelLoadError(f"{path.name} holds no .mlmodel: it is no Core ML package")
    data = found[0].read_bytes()
    try:
        for description in _fields(data, _DESCRIPTION):
            for metadata in _fields(description, _METADATA):
                for entry in _fields(metadata, _USER_DEFINED):
                    key = b"".join(_fields(entry, _KEY))
                    if key == RECORD_NAME.encode():
                        return _text(path, b"".join(_fields(entry, _VALUE)))
    except IndexError:
        raise ModelLoadError(f"{path.name} is damaged: a protobuf field is cut off") from None
    return None


_READERS: dict[str, Callable[[Path], str | None]] = {
    ".tflite": read_tflite,
    ".ptl": read_ptl,
    ".mlpackage": read_mlpackage,
}


def _text(path: Path, content: bytes) -> str:
    if len(content) > limits.MAX_MANIFEST_BYTES:
        raise ModelLoadError(f"{path.name}: its {RECORD_NAME} is too large")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ModelLoadError(f"{path.name}: its {RECORD_NAME} is no UTF-8 text") from None


def _fields(data: bytes, wanted: int) -> Iterator[bytes]:
    """Contents of the length-delimited fields of number ``wanted``, in order.

    Protobuf wire format: a varint tag (field number * 8 + wire type) before each value.
    ``IndexError`` where the message is cut off or has another wire type.
    """
    view, position = memoryview(data), 0
    while position < len(view):
        tag, position = _varint(view, position)
        kind = tag & 7
        if kind == _BYTES:
            length, position = _varint(view, position)
            if position + length > len(view):
                raise IndexError
            if tag >> 3 == wanted:
                yield bytes(view[position : position + length])
            position += length
        elif kind == _VARINT:
            _, position = _varint(view, position)
        elif kind in (_FIXED32, _FIXED64):
            position += 4 if kind == _FIXED32 else 8
        else:
            raise IndexError


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise IndexError
