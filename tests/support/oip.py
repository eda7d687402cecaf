"""What tests of the Open Inference Protocol send, written out without the broker's codec."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from broker.models.servable import OpenedServable
from edge_runtime.contract.files import file_entries
from edge_runtime.contract.manifest import (
    REFERENCE_RECORD_NAME,
    SERVABLE_NAME,
    Labels,
    Provenance,
    Reference,
    ReferenceRecord,
    Servable,
    canonical_json,
    labels_digest,
)
from edge_runtime.contract.tasks import TaskName, has_labels
from edge_runtime.contract.tensors import DType, TensorSpec
from tests.support import tasks
from tests.support.tasks import Ending, InputMode

DTYPES: tuple[DType, ...] = (
    "float32", "float16", "int8", "uint8", "int16", "int32", "int64", "bool",
)  # fmt: skip
DATATYPES = {
    "float32": "FP32", "float16": "FP16", "int8": "INT8", "uint8": "UINT8", "int16": "INT16",
    "int32": "INT32", "int64": "INT64", "bool": "BOOL",
}  # fmt: skip
NUMPY = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
    "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
    "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
EVERY_DTYPE = "every-dtype"


def opened(
    name: TaskName, *, mode: InputMode = "float", ending: Ending = "", outputs: Any = None
) -> OpenedServable:
    """The manifest of ``tests.support.tasks`` alone: no file, no model."""
    task = tasks.task_of(name)
    labelled = has_labels(task)
    labels = Labels(path="labels.txt", count=len(tasks.LABELS), sha256=labels_digest(tasks.LABELS))
    manifest = Servable(
        name=f"large-{name.replace('_', '-')}",
        version="1.0.0",
        task=task,
        preprocess=tasks.preprocess_of(name),
        labels=labels if labelled else None,
        model=Reference(
            path="model.pt2",
            inputs=(tasks.input_spec(name, mode),),
            outputs=outputs or tasks.output_specs(name, ending),
        ),
        provenance=Provenance(source="test", weights="none", nearfar="0.1.0", tools={}),
        files=(),
    )
    return OpenedServable(
        root=Path("nowhere"),
        manifest=manifest,
        sha256="0" * 64,
        labels=tasks.LABELS if labelled else (),
    )


def binary(values: Any, datatype: str) -> bytes:
    """A tensor as binary data."""
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(one)) + one for one in values)
    if datatype == "BF16":
        return (np.asarray(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return np.asarray(values).astype(NUMPY[datatype]).tobytes()


def body_of(
    inputs: list[dict[str, Any]],
    tails: Sequence[bytes] = (),
    **more: Any,
) -> tuple[bytes, dict[str, str]]:
    """A request body and its headers; ``tails``: the binary data of the inputs that have any."""
    text = json.dumps({"inputs": inputs, **more}).encode()
    if not tails:
        return text, {}
    return text + b"".join(tails), {"Inference-Header-Content-Length": str(len(text))}


def input_of(
    name: str, datatype: str, shape: list[int], *, data: Any = None, size: int | None = None
) -> dict[str, Any]:
    """One entry of ``inputs``."""
    entry: dict[str, Any] = {"name": name, "shape": shape, "datatype": datatype}
    if data is not None:
        entry["data"] = data
    if size is not None:
        entry["parameters"] = {"binary_data_size": size}
    return entry


def read_answer(body: bytes, header_length: str | None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The JSON of an answer, and its binary outputs by name."""
    size = len(body) if header_length is None else int(header_length)
    message = json.loads(body[:size])
    at = size
    found = {}
    for output in message["outputs"]:
        length = output.get("parameters", {}).get("binary_data_size")
        if length is not None:
            found[output["name"]] = body[at : at + length]
            at += length
    assert at == len(body)
    return message, found


@functools.cache
def every_dtype_servable() -> Path:
    """A servable whose outputs are an image and one tensor ``[n, 4]`` of every dtype.

    Each holds 0, 1, 2 and 3 times the mean of its input image, rounded.
    """
    import atexit
    import shutil
    import tempfile

    import torch

    class Net(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            steps = torch.tensor([0.0, 1.0, 2.0, 3.0])
            values = (x.mean((1, 2, 3))[:, None] * steps).round()
            return (x, *(values.to(getattr(torch, dtype)) for dtype in DTYPES))

    root = Path(tempfile.mkdtemp(prefix="nearfar-test-servable-")) / EVERY_DTYPE
    root.mkdir()
    atexit.register(shutil.rmtree, root.parent, ignore_errors=True)
    task, record = tasks.task_of("reconstruction"), tasks.preprocess_of("reconstruction")
    inputs = (tasks.input_spec("reconstruction"),)
    image = TensorSpec(name="image_out", dtype="float32", shape=inputs[0].shape, layout="NCHW")
    outputs = (
        image,
        *(TensorSpec(name=dtype, dtype=dtype, shape=(1, 4), layout="NC") for dtype in DTYPES),
    )
    exported = torch.export.export(
        Net().eval(),
        (torch.zeros((2, *inputs[0].shape[1:])),),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=256)},),
    )
    inside = ReferenceRecord(task=task, preprocess=record, inputs=inputs, outputs=outputs)
    extra = {REFERENCE_RECORD_NAME: canonical_json(inside).decode()}
    torch.export.save(exported, root / "model.pt2", extra_files=extra)
    manifest = Servable(
        name=EVERY_DTYPE,
        version="1.0.0",
        task=task,
        preprocess=record,
        model=Reference(path="model.pt2", inputs=inputs, outputs=outputs),
        provenance=Provenance(source="test", weights="none", nearfar="0.1.0", tools={}),
        files=file_entries(root),
    )
    manifest.check()
    (root / SERVABLE_NAME).write_bytes(canonical_json(manifest))
    return root


def renamed(servable: OpenedServable, **changes: object) -> OpenedServable:
    """The same with other entries in its manifest."""
    manifest = msgspec.structs.replace(servable.manifest, **changes)
    return msgspec.structs.replace(servable, manifest=manifest)
