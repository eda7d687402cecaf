"""Plant the mistakes of converters in saved files, as further variants of a sound bundle."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from converters.formats.metadata import read_metadata
from converters.formats.tflite_file import METADATA_NAME, operator_names, read_model, write_model
from edge_runtime.contract.manifest import Manifest, Variant
from edge_runtime.runtimes.mil.program import model_file, read_spec
from tests.support.mend import mend, read

__all__ = [
    "add_softmax",
    "add_variant",
    "edit_tflite",
    "mirror_padding",
    "mirror_padding_coreml",
    "narrow_coreml",
    "narrow_tflite",
    "save_lite",
    "swap_channels",
    "swap_classes",
    "wrap_lite",
]

Write = Callable[[Path], None]


def add_variant(
    root: Path,
    base: str,
    name: str,
    write: Write,
    change: Callable[[Variant], Variant] = lambda variant: variant,
) -> str:
    """A copy of variant ``base`` under the id ``name-<format>``, its file changed by ``write``.

    Digests are mended. Returns the new id.
    """
    sound = read(root).variant(base)
    variant_id = f"{name}-{sound.format}"
    path = Path(sound.path).with_name(variant_id).with_suffix(Path(sound.path).suffix)
    source, target = root / sound.path, root / path
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
    write(target)
    added = change(msgspec.structs.replace(sound, id=variant_id, path=str(path)))

    def append(manifest: Manifest) -> Manifest:
        return msgspec.structs.replace(manifest, variants=(*manifest.variants, added))

    mend(root, append)
    return variant_id


# TFLite ------------------------------------------------------------------------------------


def edit_tflite(path: Path, change: Callable[[Any, Any, list[str]], None]) -> None:
    """Rewrite a file after ``change(model, main graph, operator names)``."""
    model = read_model(path.read_bytes())
    graph = model.subgraphs[0]
    change(model, graph, operator_names(model, graph))
    path.write_bytes(write_model(model))


def _constant(model: Any, graph: Any, index: int, dtype: str) -> np.ndarray:
    data = np.asarray(model.buffers[graph.tensors[index].buffer].data, np.uint8).tobytes()
    return np.frombuffer(data, dtype).reshape(graph.tensors[index].shape).copy()


def _store(model: Any, graph: Any, index: int, values: np.ndarray) -> None:
    buffer = model.buffers[graph.tensors[index].buffer]
    buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)


def swap_channels(path: Path) -> None:
    """The first convolution of an fp32 file takes blue for red."""

    def change(model: Any, graph: Any, names: list[str]) -> None:
        weight = graph.operators[names.index("CONV_2D")].inputs[1]
        values = _constant(model, graph, weight, "<f4")
        _store(model, graph, weight, values[..., ::-1])

    edit_tflite(path, change)


def swap_classes(path: Path) -> None:
    """The last layer of an fp32 file gives its classes in the reverse order."""

    def change(model: Any, graph: Any, names: list[str]) -> None:
        last = graph.operators[len(names) - 1 - names[::-1].index("FULLY_CONNECTED")]
        for index in last.inputs[1:3]:
            _store(model, graph, index, _constant(model, graph, index, "<f4")[::-1])

    edit_tflite(path, change)


def mirror_padding(path: Path) -> None:
    """The strided convolution, "SAME" in the file, gets its padding left and top instead.

    With an even input and stride 2 that is what symmetric padding of 1 comes to.
    """
    from ai_edge_litert import schema_py_generated as schema

    def change(model: Any, graph: Any, names: list[str]) -> None:
        (place,) = [
            number
            for number, (operator, name) in enumerate(zip(graph.operators, names, strict=True))
            if name == "CONV_2D" and operator.builtinOptions.strideH == 2
        ]
        convolution = graph.operators[place]
        assert convolution.builtinOptions.padding == schema.Padding.SAME
        convolution.builtinOptions.padding = schema.Padding.VALID
        taken = graph.tensors[convolution.inputs[0]]
        sides, padded = schema.TensorT(), schema.TensorT()
        buffer = schema.BufferT()
        buffer.data = np.array([0, 0, 1, 0, 1, 0, 0, 0], "<i4").view(np.uint8)
        buffer.offset = buffer.size = 0
        model.buffers.append(buffer)
        sides.name, sides.shape = b"sides", [4, 2]
        sides.type, sides.buffer = schema.TensorType.INT32, len(model.buffers) - 1
        batch, height, width, channels = taken.shape
        padded.name, padded.shape = b"padded", [batch, height + 1, width + 1, channels]
        padded.type, padded.buffer, padded.quantization = taken.type, 0, taken.quantization
        graph.tensors += [sides, padded]
        count = len(graph.tensors)
        operator = schema.OperatorT()
        operator.opcodeIndex = _opcode(model, schema.BuiltinOperator.PAD, version=2)
        operator.inputs, operator.outputs = [convolution.inputs[0], count - 2], [count - 1]
        convolution.inputs = [count - 1, *convolution.inputs[1:]]
        graph.operators.insert(place, operator)

    edit_tflite(path, change)


def _opcode(model: Any, builtin: int, *, version: int) -> int:
    from ai_edge_litert import schema_py_generated as schema

    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = builtin
    code.version = version
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def narrow_tflite(path: Path, factor: float) -> None:
    """Every activation's range times ``factor``: values beyond saturate."""

    def change(model: Any, graph: Any, names: list[str]) -> None:
        count = 0
        for tensor in graph.tensors:
            data = model.buffers[tensor.buffer].data
            scaled = tensor.quantization is not None and tensor.quantization.scale is not None
            if scaled and len(tensor.quantization.scale) == 1 and (data is None or not len(data)):
                tensor.quantization.scale = [float(tensor.quantization.scale[0]) * factor]
                count += 1
        assert count >= 4
        for operator, name in zip(graph.operators, names, strict=True):
            if name in ("CONV_2D", "FULLY_CONNECTED"):  # bias scale = input scale * weight scale
                bias = operator.inputs[2]
                exact = _constant(model, graph, bias, "<i4").astype(np.float64) / factor
                _store(model, graph, bias, np.rint(exact).astype("<i4"))
                quantization = graph.tensors[bias].quantization
                quantization.scale = [float(scale) * factor for scale in quantization.scale]

    edit_tflite(path, change)


def add_softmax(path: Path) -> None:
    """A softmax behind the logits of an fp32 file."""
    from ai_edge_litert import schema_py_generated as schema

    def change(model: Any, graph: Any, names: list[str]) -> None:
        logits = int(graph.outputs[0])
        tensor = schema.TensorT()
        tensor.name, tensor.shape = b"scores", list(graph.tensors[logits].shape)
        tensor.type, tensor.buffer = schema.TensorType.FLOAT32, 0
        graph.tensors.append(tensor)
        operator = schema.OperatorT()
        operator.opcodeIndex = _opcode(model, schema.BuiltinOperator.SOFTMAX, version=1)
        operator.inputs, operator.outputs = [logits], [len(graph.tensors) - 1]
        operator.builtinOptionsType = schema.BuiltinOptions.SoftmaxOptions
        operator.builtinOptions = schema.SoftmaxOptionsT()
        operator.builtinOptions.beta = 1.0
        graph.operators.append(operator)
        graph.outputs = operator.outputs
        model.signatureDefs[0].outputs[0].tensorIndex = operator.outputs[0]

    edit_tflite(path, change)


# Core ML -----------------------------------------------------------------------------------


def _edit_coreml(path: Path, change: Callable[[list[Any]], int]) -> None:
    spec = read_spec(path)
    function = spec.mlProgram.functions["main"]
    assert change(list(function.block_specializations[function.opset].operations))
    model_file(path).write_bytes(spec.SerializeToString(deterministic=True))


def _values(operation: Any) -> Any:
    return operation.attributes["val"].immediateValue.tensor


def narrow_coreml(path: Path, factor: float) -> None:
    """Every activation's range times ``factor``: values beyond saturate."""

    def change(operations: list[Any]) -> int:
        scales = {
            operation.inputs["scale"].arguments[0].name
            for operation in operations
            if operation.type in ("quantize", "dequantize")
        }
        found = [one for one in operations if one.type == "const" and one.outputs[0].name in scales]
        for operation in found:
            tensor = _values(operation)
            if tensor.WhichOneof("value") == "bytes":
                half = np.frombuffer(tensor.bytes.values, np.float16) * np.float16(factor)
                tensor.bytes.values = half.astype(np.float16).tobytes()
            else:
                tensor.floats.values[:] = [value * factor for value in tensor.floats.values]
        return len(found)

    _edit_coreml(path, change)


def mirror_padding_coreml(path: Path) -> None:
    """As ``mirror_padding``: ``pad`` of the convolution, or of an operator before it."""

    def change(operations: list[Any]) -> int:
        names = {
            operation.inputs["pad"].arguments[0].name
            for operation in operations
            if operation.type in ("conv", "pad")
        }
        count = 0
        for operation in operations:
            if operation.type != "const" or operation.outputs[0].name not in names:
                continue
            values = _values(operation).ints.values
            pairs = list(zip(values[::2], values[1::2], strict=True))
            if any(low != high for low, high in pairs):
                values[:] = [side for low, high in pairs for side in (high, low)]
                count += 1
        return count

    _edit_coreml(path, change)


# TorchScript -------------------------------------------------------------------------------


def save_lite(module: Any, path: Path, metadata: str | None) -> None:
    """Write a scripted module for the lite interpreter, with the record of another file."""
    extra = {} if metadata is None else {METADATA_NAME: metadata}
    module._save_for_lite_interpreter(str(path), _extra_files=extra)


def wrap_lite(path: Path, around: Callable[[Any], Any]) -> None:
    """Replace a ``.ptl`` by ``around(its module)``, an ``nn.Module`` that can be scripted."""
    import torch

    metadata = read_metadata(path)
    inner = torch.jit.load(str(path))
    save_lite(torch.jit.script(around(inner).eval()), path, metadata)
