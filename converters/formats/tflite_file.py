"""The flatbuffer of a ``.tflite``: names, metadata, and one self-contained block.

ai-edge-quantizer stores large constants behind the flatbuffer (``Buffer.offset``), which
interpreters before 2024 do not read, and which a plain repack loses. Here they are taken
in, each at a multiple of 16 bytes as the schema asks (``force_align``).

Equal vectors of numbers are written once, which readers cannot tell: every channel of every
weight and bias has a zero point of eight bytes, and all of them are 0. That is a tenth of an
int8 MobileNetV1-0.25.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_runtime.contract.errors import ConversionError

__all__ = ["METADATA_NAME", "finish", "operator_names", "read_model", "write_model"]

METADATA_NAME = "nearfar.json"
_ALIGNMENT = 16
_IDENTIFIER = b"TFL3"


def read_model(data: bytes) -> Any:
    """The file as a ``ModelT`` of ``schema_py_generated``, all constants inside."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(data, 0)
    for buffer in model.buffers:
        if buffer.offset > 1:
            outside = data[buffer.offset : buffer.offset + buffer.size]
            buffer.data = np.frombuffer(outside, dtype=np.uint8)
        buffer.offset = buffer.size = 0
    return model


def operator_names(model: Any, graph: Any) -> list[str]:
    """The built-in name (``CONV_2D``) of each operator of a subgraph, in order."""
    from ai_edge_litert import schema_py_generated as schema

    known = {code: name for name, code in vars(schema.BuiltinOperator).items() if name[0] != "_"}
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    return [known[codes[operator.opcodeIndex]] for operator in graph.operators]


def write_model(model: Any) -> bytes:
    """Pack a ``ModelT``; the same model gives the same bytes."""
    builder = _sharing_builder()
    for buffer in model.buffers:
        _align(buffer)
    builder.Finish(model.Pack(builder), file_identifier=_IDENTIFIER)
    return bytes(builder.Output())


def _sharing_builder() -> Any:
    """A flatbuffer builder that points to an equal vector where it wrote one before."""
    import flatbuffers  # type: ignore[import-untyped]

    class SharingBuilder(flatbuffers.Builder):
        def __init__(self) -> None:
            super().__init__(1024)
            self._written: dict[tuple[str, bytes], int] = {}

        def CreateNumpyVector(self, x: Any) -> int:  # noqa: N802  # the base class's name
            key = (x.dtype.str, x.tobytes())
            if key not in self._written:
                self._written[key] = super().CreateNumpyVector(x)
            return self._written[key]

    return SharingBuilder()


def _align(buffer: Any) -> None:
    """Make ``buffer.Pack`` start its data at a multiple of 16 bytes."""
    from ai_edge_litert import schema_py_generated as schema

    def pack(builder: Any) -> Any:
        offset = None
        if buffer.data is not None and len(buffer.data):
            raw = np.asarray(buffer.data, dtype=np.uint8).tobytes()
            builder.StartVector(1, len(raw), _ALIGNMENT)
            builder.head -= len(raw)
            builder.Bytes[builder.head : builder.head + len(raw)] = raw
            offset = builder.EndVector()
        schema.BufferStart(builder)
        if offset is not None:
            schema.BufferAddData(builder, offset)
        return schema.BufferEnd(builder)

    buffer.Pack = pack


def finish(data: bytes, input_name: str, output_names: Sequence[str], metadata: str) -> bytes:
    """Name the tensors, put the outputs in this order, store ``metadata`` (JSON).

    Takes a file as litert-torch wrote it (outputs ``output_0``, ...) or one that was
    finished before. Raises ``ConversionError`` when the outputs are others.
    """
    model = read_model(data)
    (signature,) = model.signatureDefs
    graph = model.subgraphs[signature.subgraphIndex]
    given = {entry.name.decode(): entry for entry in signature.outputs}
    if set(given) == set(output_names):
        ordered = [given[name] for name in output_names]
    elif set(given) == {f"output_{number}" for number in range(len(output_names))}:
        ordered = [given[f"output_{number}"] for number in range(len(output_names))]
    else:
        raise ConversionError(
            f"litert-torch gave the outputs {sorted(given)}, expected were "
            f"{list(output_names)}: report this model"
        )
    for entry, name in zip(ordered, output_names, strict=True):
        entry.name = name.encode()
    signature.outputs = ordered
    graph.outputs = [entry.tensorIndex for entry in ordered]
    signature.inputs[0].name = input_name.encode()
    _store(model, metadata)
    return write_model(model)


def _store(model: Any, metadata: str) -> None:
    from ai_edge_litert import schema_py_generated as schema

    content = np.frombuffer(metadata.encode(), dtype=np.uint8)
    for entry in model.metadata or []:
        if entry.name == METADATA_NAME.encode():
            model.buffers[entry.buffer].data = content
            return
    buffer = schema.BufferT()
    buffer.data = content
    buffer.offset = buffer.size = 0
    model.buffers.append(buffer)
    entry = schema.MetadataT()
    entry.name = METADATA_NAME.encode()
    entry.buffer = len(model.buffers) - 1
    model.metadata = [*(model.metadata or []), entry]
