"""From the answers of a request's rows to its output tensors, and to the body they go in."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker.models.servable import OpenedServable
from broker.oip.datatypes import Datatype, Values, write_binary, write_json
from broker.oip.interface import Interface, OutputSlot, TaskField
from broker.oip.message import InferRequest, RequestedOutput, output_options
from broker.scheduling.ticket import Answer
from edge_runtime.contract import limits
from edge_runtime.contract.errors import LimitExceeded, WireError
from edge_runtime.contract.tasks import ClassificationTask
from edge_runtime.contract.tasks.classification import Prediction
from edge_runtime.contract.tasks.detection import Box
from edge_runtime.contract.tensors import from_little_endian
from edge_runtime.contract.wire import EncodedAnswer, Picture

__all__ = ["Wanted", "encode_infer", "places_of", "tensor_bytes", "wanted_outputs"]

_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class Wanted:
    """One output of one request, and how it goes out."""

    slot: OutputSlot
    binary: bool
    classes: int
    """Give this many classes as ``score:index:label`` instead of the numbers; 0: the numbers."""


def wanted_outputs(interface: Interface, request: InferRequest, *, rows: int) -> tuple[Wanted, ...]:
    """What a request asks for: what it lists, else all there is.

    Raises ``WireError``, and ``LimitExceeded`` where the answer would be too large.
    """
    requested = request.outputs or tuple(
        RequestedOutput(name=slot.name) for slot in interface.outputs
    )
    if len({one.name for one in requested}) != len(requested):
        raise WireError("an output is asked for twice")
    wanted = []
    for one in requested:
        slot = interface.output(one.name)
        binary, classes = output_options(one, binary=request.binary_output)
        if classes and slot.place is None:
            raise WireError(f"classification is for the model's own outputs, not {one.name!r}")
        wanted.append(Wanted(slot, binary, classes))
    answer_bytes = rows * tensor_bytes(wanted)
    if answer_bytes > limits.MAX_INFER_ANSWER_BYTES:
        raise LimitExceeded(
            f"the outputs of {rows} rows take {answer_bytes} bytes, more than "
            f"{limits.MAX_INFER_ANSWER_BYTES}: ask for fewer outputs, or send fewer rows"
        )
    numbers = rows * sum(
        math.prod(one.slot.row_shape)
        for one in wanted
        if one.slot.place is not None and (one.classes or not one.binary)
    )
    if numbers > limits.MAX_INFER_JSON_NUMBERS:
        raise LimitExceeded(
            f"the outputs are {numbers} numbers, more than {limits.MAX_INFER_JSON_NUMBERS} for "
            "JSON or classification: set binary_data_output, or ask for fewer outputs"
        )
    return tuple(wanted)


def places_of(wanted: Sequence[Wanted]) -> tuple[int, ...]:
    """Which of the model's own outputs these are."""
    return tuple(one.slot.place for one in wanted if one.slot.place is not None)


def tensor_bytes(wanted: Sequence[Wanted]) -> int:
    """What the model's own outputs among them take, of one row."""
    return sum(one.slot.size_bytes for one in wanted)


def encode_infer(
    servable: OpenedServable,
    request_id: str | None,
    wanted: Sequence[Wanted],
    answers: Sequence[Answer],
) -> tuple[bytes, int | None]:
    """The body of the answer, and the length of the JSON in it (None: there is nothing else).

    Raises ``InferenceError`` where an output has what JSON cannot hold.
    """
    places = places_of(wanted)
    outputs: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for one in wanted:
        own_rows: list[bytes] = []
        datatype: Datatype = one.slot.datatype
        values: Values = ()
        if one.slot.field is not None:
            shape, values = _task_output(one.slot.field, [answer.encoded for answer in answers])
        else:
            assert one.slot.place is not None  # noqa: S101  # one of the two is set
            at = places.index(one.slot.place)
            own_rows = [answer.tensors[at] for answer in answers]
            shape = [len(answers), *one.slot.row_shape]
            if one.classes:
                datatype, shape, values = _classified(servable, one, own_rows)
            elif not one.binary:
                values = _array(servable, one, own_rows)
        entry: dict[str, Any] = {"name": one.slot.name, "datatype": datatype, "shape": shape}
        if one.binary:
            # The model's own numbers are in the format already.
            parts = own_rows if own_rows and not one.classes else [write_binary(datatype, values)]
            tail += parts
            entry["parameters"] = {"binary_data_size": sum(map(len, parts))}
        elif one.slot.field in ("mask", "image"):
            entry["parameters"] = {"content_type": "base64"}
            entry["data"] = [base64.b64encode(picture).decode() for picture in values]
        else:
            entry["data"] = write_json(one.slot.name, values)
        outputs.append(entry)
    message: dict[str, Any] = {} if request_id is None else {"id": request_id}
    message |= {
        "model_name": servable.manifest.name,
        "model_version": servable.manifest.version,
        "outputs": outputs,
    }
    json = _encoder.encode(message)
    return (b"".join((json, *tail)), len(json)) if tail else (json, None)


def _array(servable: OpenedServable, one: Wanted, rows: list[bytes]) -> NDArray[Any]:
    assert one.slot.place is not None  # noqa: S101
    spec = servable.manifest.model.outputs[one.slot.place]
    return np.concatenate([from_little_endian(row, spec) for row in rows])


def _classified(
    servable: OpenedServable, one: Wanted, rows: list[bytes]
) -> tuple[Datatype, list[int], Values]:
    scores = _array(servable, one, rows).reshape(len(rows), -1)
    labels = servable.labels if isinstance(servable.task, ClassificationTask) else ()
    if len(labels) != scores.shape[1]:
        labels = ()
    texts = [text for row in scores for text in _classes(row, one.classes, labels)]
    return "BYTES", [len(rows), len(texts) // len(rows)], texts


def _classes(scores: NDArray[Any], count: int, labels: tuple[str, ...]) -> list[bytes]:
    """``score:index:label`` of the highest scores, highest first (Triton's extension)."""
    order = np.argsort(-scores.astype(np.float64), kind="stable")[:count]
    texts = []
    for index in order.tolist():
        value = scores[index].item()
        text = f"{value:f}:{index}" if isinstance(value, float) else f"{int(value)}:{index}"
        texts.append(f"{text}:{labels[index]}".encode() if labels else text.encode())
    return texts


_FIELDS: Final[dict[str, tuple[str, Callable[[Any], Any], Any]]] = {
    "labels": ("O", lambda entry: entry.label.encode(), b""),
    "scores": ("<f4", lambda entry: entry.score, 0.0),
    "indices": ("<i4", lambda entry: entry.index, -1),
    "boxes": ("<f4", lambda box: (box.x_min, box.y_min, box.x_max, box.y_max), (0.0,) * 4),
}
"""Dtype, how to read it from an entry, and what stands where a row has fewer of them."""


def _task_output(field: TaskField, answers: list[EncodedAnswer]) -> tuple[list[int], Values]:
    rows = len(answers)
    if field in ("mask", "image"):
        return [rows, 1], [_picture(answer).data for answer in answers]
    entries = [_entries(answer) for answer in answers]
    if field == "counts":
        counts = np.array([[len(row)] for row in entries], dtype="<i4")
        return [rows, 1], counts
    dtype, read, nothing = _FIELDS[field]
    most = max(len(row) for row in entries)
    filled = [
        [*(read(entry) for entry in row), *(nothing for _ in range(most - len(row)))]
        for row in entries
    ]
    if dtype == "O":
        return [rows, most], [element for row in filled for element in row]
    shape = [rows, most, 4] if field == "boxes" else [rows, most]
    return shape, np.array(filled, dtype=dtype).reshape(shape)


def _entries(answer: EncodedAnswer) -> Sequence[Prediction] | Sequence[Box]:
    entries = answer.predictions if answer.predictions is not None else answer.boxes
    assert entries is not None  # noqa: S101  # the slots are those of the task
    return entries


def _picture(answer: EncodedAnswer) -> Picture:
    picture = answer.mask or answer.image
    assert picture is not None  # noqa: S101  # the slots are those of the task
    return picture
