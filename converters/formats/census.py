"""What ``.tflite`` and ``.ptl`` files hold, read without running them.

Neither function loads torch or TensorFlow. Files come from outside: nothing in one is
executed, and whatever is wrong with it is a ``ModelLoadError``.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converters.formats.census_types import Census, make_census
from edge_runtime.contract.errors import ModelLoadError

__all__ = ["census", "ptl_census", "tflite_census"]

_STORAGES = {
    "BFloat16Storage": ("bfloat16", 2), "ByteStorage": ("uint8", 1), "CharStorage": ("int8", 1),
    "DoubleStorage": ("float64", 8), "FloatStorage": ("float32", 4), "HalfStorage": ("float16", 2),
    "IntStorage": ("int32", 4), "LongStorage": ("int64", 8), "QInt32Storage": ("int32", 4),
    "QInt8Storage": ("int8", 1), "QUInt8Storage": ("uint8", 1),
}  # fmt: skip
"""Type and bytes of one number. ShortStorage is missing: QNNPACK's layer geometry."""
_CALLS = ("OP", "OPN")


def census(path: Path) -> Census | None:
    """Count by the file's suffix; None: a format that is not counted here.

    Raises ``ModelLoadError`` for a file that is not what its suffix says.
    """
    if path.suffix == ".tflite":
        return tflite_census(path)
    return ptl_census(path) if path.suffix == ".ptl" else None


def tflite_census(path: Path) -> Census:
    """Of a ``.tflite``. A constant that several tensors share counts once."""
    from converters.formats.tflite_file import operator_names, read_model

    data = path.read_bytes()
    if data[4:8] != b"TFL3":
        raise ModelLoadError(f"{path.name} is no TensorFlow Lite file")
    try:
        model = read_model(data)
        operators: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        quantized, seen = 0, set()
        types = _tensor_types()
        for graph in model.subgraphs:
            for tensor in graph.tensors:
                content = model.buffers[tensor.buffer].data
                if tensor.buffer not in seen and content is not None and len(content):
                    seen.add(tensor.buffer)
                    sizes[types[tensor.type]] += len(content)
            names = operator_names(model, graph)
            operators.update(names)
            quantized += sum(_is_quantized(graph, one, types) for one in graph.operators)
    except Exception as error:  # flatbuffers reads where the file points, and raises many types
        raise ModelLoadError(f"{path.name} is damaged: {type(error).__name__}") from None
    return make_census(sizes, operators, quantized)


def _tensor_types() -> dict[int, str]:
    from ai_edge_litert import schema_py_generated as schema

    return {code: name.lower() for name, code in vars(schema.TensorType).items() if name[0] != "_"}


def _is_quantized(graph: Any, operator: Any, types: dict[int, str]) -> bool:
    """Whether a tensor with a scale goes in or out, biases aside."""
    inputs = [] if operator.inputs is None else list(operator.inputs)
    for index in (*inputs, *operator.outputs):
        if index < 0:
            continue
        tensor = graph.tensors[index]
        scaled = tensor.quantization is not None and tensor.quantization.scale is not None
        if scaled and types[tensor.type] in ("int2", "int4", "int8", "uint8", "int16"):
            return True
    return False


def ptl_census(path: Path) -> Census:
    """Of a ``.ptl``: calls in its bytecode, tensors in its constants."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {
                name.partition("/")[2]: name for name in archive.namelist() if name.endswith(".pkl")
            }
            if "bytecode.pkl" not in members:
                raise ModelLoadError(f"{path.name} has no bytecode: it is for no lite interpreter")
            operators = Counter(_calls(_load(archive.read(members["bytecode.pkl"]))[0]))
            storages: dict[str, tuple[str, int]] = {}
            for name in members.values():  # they share one folder of storages
                for key, kind, count in _load(archive.read(name))[1]:
                    storages[key] = (kind, count)
    except ModelLoadError:
        raise
    except Exception as error:  # zip and pickle errors of many types
        raise ModelLoadError(f"{path.name} is damaged: {type(error).__name__}") from None
    sizes: Counter[str] = Counter()
    for kind, count in storages.values():
        if kind in _STORAGES:
            name, item = _STORAGES[kind]
            sizes[name] += item * count
    quantized = sum(n for name, n in operators.items() if name.startswith("quantized::"))
    return make_census(sizes, operators, quantized)


class _Inert:
    """Stands for every class named in a pickle: takes anything, does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass

    def append(self, _: object) -> None:
        """For list-like reductions."""


class _Reader(pickle.Unpickler):
    """Reads a pickle without importing or calling anything that it names."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.storages: list[tuple[str, str, int]] = []

    def find_class(self, module: str, name: str) -> Any:
        """An inert class; its name is kept, for storages are told by theirs."""
        return type(name, (_Inert,), {"__module__": module})

    def persistent_load(self, pid: Any) -> Any:
        """Note a tensor's storage: (``"storage"``, class, key, device, count)."""
        _, kind, key, _, count = pid
        self.storages.append((str(key), getattr(kind, "__name__", ""), int(count)))
        return None


def _load(data: bytes) -> tuple[Any, list[tuple[str, str, int]]]:
    reader = _Reader(data)
    return reader.load(), reader.storages


def _calls(bytecode: Any) -> Iterator[str]:
    """Names of the operators called, once for each call.

    ``(version, (method, (("instructions", ...), ("operators", ...), ...), schema), ...)``.
    """
    for method in bytecode:
        if not isinstance(method, tuple):
            continue
        table = dict(method[1])
        names = [entry[0] for entry in table["operators"]]
        for instruction in table["instructions"]:
            if instruction[0] in _CALLS:
                yield names[instruction[1]]
