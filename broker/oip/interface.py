"""A servable as the protocol sees it: its inputs and outputs by name.

A model takes one of two inputs: the tensor that its pre-processing would make, or what a
device has, an encoded image (a seed, where the model generates). It gives the tensors that
its manifest records, and beside them the answer of its task, under names of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from broker.models.servable import OpenedServable
from broker.oip.datatypes import Datatype, datatype_of
from edge_runtime.contract import limits
from edge_runtime.contract.errors import TensorError, WireError
from edge_runtime.contract.tasks import (
    ClassificationTask,
    DetectionTask,
    SegmentationTask,
    Task,
)
from edge_runtime.contract.tensors import TensorSpec

__all__ = ["PLATFORM", "InputSlot", "Interface", "OutputSlot", "TaskField", "rows_of"]

PLATFORM: Final = "pytorch_exportedprogram"

TaskField = Literal["labels", "scores", "indices", "boxes", "counts", "mask", "image"]
_ANY: Final = -1

_TASK_OUTPUTS: Final[tuple[tuple[TaskField, Datatype, tuple[int, ...]], ...]] = (
    ("labels", "BYTES", (_ANY,)),
    ("scores", "FP32", (_ANY,)),
    ("indices", "INT32", (_ANY,)),
    ("boxes", "FP32", (_ANY, 4)),
    ("counts", "INT32", (1,)),
    ("mask", "BYTES", (1,)),
    ("image", "BYTES", (1,)),
)
_WIDENED: Final[dict[Datatype, tuple[Datatype, ...]]] = {"FP32": ("FP32", "FP16", "BF16")}
"""Half-precision numbers are float32 numbers too: taking them loses nothing."""


@dataclass(frozen=True, slots=True)
class InputSlot:
    """One of the inputs that a request may choose from."""

    name: str
    kind: Literal["tensor", "image", "seed"]
    datatype: Datatype
    row_shape: tuple[int, ...]
    """Of one image, seed or latent: without the batch axis."""
    spec: TensorSpec
    """Of the model's own input."""
    size_bytes: int
    """Of one row of it."""
    stored: np.dtype[np.generic]
    """Of its numbers, as they travel: little-endian."""

    @property
    def takes(self) -> tuple[Datatype, ...]:
        """Datatypes that a request may send."""
        return _WIDENED.get(self.datatype, (self.datatype,))


@dataclass(frozen=True, slots=True)
class OutputSlot:
    """One output; exactly one of ``place`` and ``field`` is set."""

    name: str
    datatype: Datatype
    row_shape: tuple[int, ...]
    """Of one row; -1 where it depends on the answer."""
    place: int | None = None
    """Among the model's own outputs."""
    field: TaskField | None = None
    """Of the task's answer."""
    size_bytes: int = 0
    """Of one row of the model's own output."""


_KNOWN: Final[dict[str, Interface]] = {}
"""By digest of the manifest; bounded."""


class Interface:
    """What a servable takes and gives."""

    def __init__(self, servable: OpenedServable) -> None:
        manifest = servable.manifest
        self.servable = servable
        (spec,) = manifest.model.inputs
        own = {one.name for one in (*manifest.model.inputs, *manifest.model.outputs)}
        stored: np.dtype[np.generic] = np.dtype(spec.dtype).newbyteorder("<")
        own_input = (spec, spec.size_bytes, stored)
        self.inputs: tuple[InputSlot, ...] = (
            InputSlot(spec.name, "tensor", datatype_of(spec.dtype), spec.shape[1:], *own_input),
            InputSlot(_free("seed", own), "seed", "INT64", (1,), *own_input)
            if manifest.preprocess is None
            else InputSlot(_free("encoded_image", own), "image", "BYTES", (1,), *own_input),
        )
        self.outputs: tuple[OutputSlot, ...] = (
            *(
                OutputSlot(
                    one.name,
                    datatype_of(one.dtype),
                    one.shape[1:],
                    place=place,
                    size_bytes=one.size_bytes,
                )
                for place, one in enumerate(manifest.model.outputs)
            ),
            *_task_outputs(servable.task, own),
        )

    @classmethod
    def of(cls, servable: OpenedServable) -> Interface:
        """The same as the constructor gives; made once for each servable that is in use."""
        known = _KNOWN.get(servable.sha256)
        if known is None or known.servable is not servable:
            while len(_KNOWN) >= limits.MAX_MODELS:
                del _KNOWN[next(iter(_KNOWN))]
            known = _KNOWN[servable.sha256] = cls(servable)
        return known

    def input(self, name: str) -> InputSlot:
        """Raises ``WireError`` naming those there are."""
        for slot in self.inputs:
            if slot.name == name:
                return slot
        raise WireError(
            f"unexpected inference input {name!r} for model {self.servable.manifest.name!r}: "
            f"it takes {_names(self.inputs, 'or')}"
        )

    def output(self, name: str) -> OutputSlot:
        """Raises ``WireError`` naming those there are."""
        for slot in self.outputs:
            if slot.name == name:
                return slot
        raise WireError(
            f"unexpected inference output {name!r} for model {self.servable.manifest.name!r}: "
            f"it gives {_names(self.outputs, 'and')}"
        )

    def metadata(self, versions: Sequence[str]) -> dict[str, object]:
        """The model metadata response, with the versions in service.

        The first axis, -1, is the batch.
        """
        manifest = self.servable.manifest
        return {
            "name": manifest.name,
            "versions": list(versions),
            "platform": PLATFORM,
            "inputs": [
                _metadata(slot) | {"parameters": {"alternative": slot.kind}} for slot in self.inputs
            ],
            "outputs": [_metadata(slot) for slot in self.outputs],
        }

    @property
    def config(self) -> dict[str, object]:
        """What of Triton's model configuration there is here, under Triton's names."""
        manifest = self.servable.manifest
        layout = self.inputs[0].spec.layout
        image_format = f"FORMAT_{layout}" if layout in ("NCHW", "NHWC") else "FORMAT_NONE"
        return {
            "name": manifest.name,
            "platform": PLATFORM,
            "backend": "nearfar",
            "version_policy": {"all": {}},
            "max_batch_size": limits.MAX_INFER_ROWS,
            "input": [
                _config(slot)
                | {
                    "format": image_format if slot.kind == "tensor" else "FORMAT_NONE",
                    "optional": True,
                }
                for slot in self.inputs
            ],
            "output": [_config(slot) for slot in self.outputs],
            "dynamic_batching": {
                "preserve_ordering": False,
                "default_queue_policy": {
                    "timeout_action": "REJECT",
                    "default_timeout_microseconds": limits.DEFAULT_INFER_DEADLINE_MS * 1000,
                    "allow_timeout_override": True,
                },
            },
            "instance_group": [],
            "parameters": {
                "task": {"string_value": self.servable.task_name},
                "version": {"string_value": manifest.version},
            },
        }


def _names(slots: Iterable[InputSlot | OutputSlot], word: str) -> str:
    *some, last = (repr(slot.name) for slot in slots)
    return f"{', '.join(some)} {word} {last}" if some else last


def _free(name: str, taken: set[str]) -> str:
    """``name``, with underscores behind it while the model itself has a tensor of that name."""
    while name in taken:
        name += "_"
    return name


def _task_outputs(task: Task, taken: set[str]) -> list[OutputSlot]:
    fields: tuple[TaskField, ...]
    if isinstance(task, ClassificationTask):
        fields = ("labels", "scores", "indices")
    elif isinstance(task, DetectionTask):
        fields = ("labels", "scores", "indices", "boxes", "counts")
    else:
        fields = ("mask",) if isinstance(task, SegmentationTask) else ("image",)
    return [
        OutputSlot(_free(f"answer_{field}", taken), datatype, row_shape, field=field)
        for field, datatype, row_shape in _TASK_OUTPUTS
        if field in fields
    ]


def _metadata(slot: InputSlot | OutputSlot) -> dict[str, object]:
    return {"name": slot.name, "datatype": slot.datatype, "shape": [_ANY, *slot.row_shape]}


def _config(slot: InputSlot | OutputSlot) -> dict[str, object]:
    name = "STRING" if slot.datatype == "BYTES" else slot.datatype
    return {"name": slot.name, "data_type": f"TYPE_{name}", "dims": list(slot.row_shape)}


def rows_of(slot: InputSlot, shape: tuple[int, ...]) -> int:
    """How many rows a tensor of ``shape`` has, where it fits the slot. Raises ``TensorError``."""
    fits = shape[1:] == slot.row_shape or (slot.kind != "tensor" and len(shape) == 1)
    if not shape or not fits:
        wanted = [_ANY, *slot.row_shape]
        raise TensorError(
            f"unexpected shape for input {slot.name!r}: expected {wanted}, got {list(shape)}"
        )
    rows = shape[0]
    if not 1 <= rows <= limits.MAX_INFER_ROWS:
        raise TensorError(
            f"input {slot.name!r} has a batch of {rows}: send 1 to {limits.MAX_INFER_ROWS}"
        )
    return rows
