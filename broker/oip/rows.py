"""From an inference request to the bodies that the model's process takes, one a row."""

from __future__ import annotations

import binascii
from functools import lru_cache
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker.executors.base import BatchItem
from broker.oip.answers import Wanted, places_of, tensor_bytes, wanted_outputs
from broker.oip.datatypes import Values
from broker.oip.interface import InputSlot, Interface, rows_of
from broker.oip.message import InferRequest, SentTensor, parse_infer
from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    ImageTooLarge,
    ImageUnreadable,
    LimitExceeded,
    TensorError,
    WireError,
)
from edge_runtime.contract.imaging import sniff_media_type
from edge_runtime.contract.tensors import to_little_endian
from edge_runtime.contract.wire import MAX_SEED, encode_seed

__all__ = ["Asked", "read_infer"]

_KEPT_JSON_BYTES: Final = 1024
_KEPT_PLANS: Final = 64


class Asked(msgspec.Struct, frozen=True):
    """A request, checked against the model it is for."""

    id: str | None
    items: tuple[BatchItem, ...]
    """One a row."""
    wanted: tuple[Wanted, ...]
    timeout_us: int | None
    priority: int | None = None


def read_infer(interface: Interface, body: bytes, header_length: int | None) -> Asked:
    """Read and check a whole request body; see ``parse_infer`` for ``header_length``.

    0 is a raw request: the body is one row of the one input it can be, an encoded image or
    a tensor, and all outputs come back as binary data. Raises ``WireError``, ``TensorError``,
    ``LimitExceeded``, or an ``ImageError``.
    """
    if header_length == 0:
        slot, row = _raw_row(interface, body)
        reading = _raw_reading(interface)
        return Asked(None, (_item(row, slot, reading),), reading.wanted, None)
    json = None
    if header_length is not None and header_length <= _KEPT_JSON_BYTES:
        json = body[:header_length]
        plan = _plans(interface).get(json)
        if plan is not None and len(body) == header_length + plan.row_bytes:
            return plan.asked(body[header_length:])
    request = parse_infer(body, header_length)
    slot, bodies = _sent_rows(interface, request.inputs)
    reading = _reading(interface, request, len(bodies))
    if json is not None and _is_plain(request, slot, bodies, body, len(json)):
        plans = _plans(interface)
        if len(plans) >= _KEPT_PLANS:
            plans.clear()
        plans[json] = _Plan(
            slot, reading, len(bodies[0]), request.id, request.timeout_us, request.priority
        )
    return Asked(
        id=request.id,
        items=tuple(_item(row, slot, reading) for row in bodies),
        wanted=reading.wanted,
        timeout_us=request.timeout_us,
        priority=request.priority,
    )


class _Reading(NamedTuple):
    """What every row of a request is asked for."""

    wanted: tuple[Wanted, ...]
    places: tuple[int, ...] | None
    output_bytes: int
    answered: bool


class _Plan(NamedTuple):
    """What the JSON before one row of numbers says: clients say the same again and again."""

    slot: InputSlot
    reading: _Reading
    row_bytes: int
    id: str | None
    timeout_us: int | None
    priority: int | None

    def asked(self, row: bytes) -> Asked:
        """The request with these numbers. Raises ``TensorError``."""
        _check_finite(self.slot, np.frombuffer(row, self.slot.stored))
        item = _item(row, self.slot, self.reading)
        return Asked(self.id, (item,), self.reading.wanted, self.timeout_us, self.priority)


@lru_cache(maxsize=limits.MAX_MODELS)
def _plans(interface: Interface) -> dict[bytes, _Plan]:  # noqa: ARG001  # the cache's key
    """The latest ones of a model, by their JSON."""
    return {}


def _is_plain(
    request: InferRequest, slot: InputSlot, bodies: list[bytes], body: bytes, json_bytes: int
) -> bool:
    """Whether what follows the JSON is the one row as it is: no other type, nothing to check."""
    return (
        slot.kind == "tensor"
        and slot.stored.kind in "fiu"
        and len(bodies) == len(request.inputs) == 1
        and request.inputs[0].binary is not None
        and request.inputs[0].datatype == slot.datatype
        and len(bodies[0]) == len(body) - json_bytes
    )


def _reading(interface: Interface, request: InferRequest, rows: int) -> _Reading:
    wanted = wanted_outputs(interface, request, rows=rows)
    answered = any(one.slot.field is not None for one in wanted)
    return _Reading(wanted, places_of(wanted) or None, tensor_bytes(wanted), answered)


@lru_cache(maxsize=limits.MAX_MODELS)
def _raw_reading(interface: Interface) -> _Reading:
    """Of a request without JSON, which says nothing: it is the same for all of them."""
    request = InferRequest(id=None, inputs=(), outputs=(), binary_output=True, timeout_us=None)
    return _reading(interface, request, 1)


def _item(row: bytes, slot: InputSlot, reading: _Reading) -> BatchItem:
    return BatchItem(
        row,
        tensor=slot.kind == "tensor",
        outputs=reading.places,
        output_bytes=reading.output_bytes,
        answered=reading.answered,
    )


def _sent_rows(
    interface: Interface, inputs: tuple[SentTensor, ...]
) -> tuple[InputSlot, list[bytes]]:
    slots = [interface.input(sent.name) for sent in inputs]
    if len(inputs) != 1:
        names = " or ".join(repr(slot.name) for slot in slots)
        raise WireError(f"send either {names}: each of them is the whole input")
    (slot,), (sent,) = slots, inputs
    if sent.datatype not in slot.takes:
        raise TensorError(
            f"inference input {sent.name!r} data-type is {sent.datatype!r}, but the model "
            f"expects {' or '.join(map(repr, slot.takes))}"
        )
    rows = rows_of(slot, sent.shape)
    if slot.kind == "image":
        return slot, [_checked_image(element) for element in _elements(sent)]
    values = sent.read()
    assert isinstance(values, np.ndarray)  # noqa: S101  # its datatype is none of BYTES
    if slot.kind == "seed":
        return slot, [_seed(number) for number in values.ravel().tolist()]
    return slot, _tensor_rows(slot, values, rows)


def _elements(sent: SentTensor) -> list[bytes]:
    values: Values = sent.read()
    elements = [bytes(element) for element in values]
    if sent.json is None:
        return elements
    if not sent.is_base64:
        raise TensorError(
            f"input {sent.name!r}: an image cannot be text: send binary data, or base64 with the "
            'parameter "content_type": "base64"'
        )
    try:
        return [binascii.a2b_base64(element, strict_mode=True) for element in elements]
    except binascii.Error as error:
        raise TensorError(f"input {sent.name!r} is no base64: {error}") from None


def _checked_image(image: bytes) -> bytes:
    if len(image) > limits.MAX_IMAGE_BYTES:
        raise ImageTooLarge(
            f"an image has more than {limits.MAX_IMAGE_BYTES} bytes: "
            "send a smaller or more strongly compressed one"
        )
    if sniff_media_type(image) is None:
        raise ImageUnreadable("an element is no JPEG, PNG or WebP image: send one of those")
    return image


def _seed(number: int) -> bytes:
    if not 0 <= number <= MAX_SEED:
        raise LimitExceeded(f"a seed must be 0 to {MAX_SEED}")
    return encode_seed(number)


def _tensor_rows(slot: InputSlot, values: NDArray[np.generic], rows: int) -> list[bytes]:
    typed = values.astype(slot.spec.dtype, copy=False)
    _check_finite(slot, typed)
    return [to_little_endian(typed[row]) for row in range(rows)]


def _check_finite(slot: InputSlot, values: NDArray[np.generic]) -> None:
    # The ufunc's own reduction: ``all()`` of an array takes three times as long.
    if values.dtype.kind == "f" and not np.logical_and.reduce(np.isfinite(values), axis=None):
        raise TensorError(f"input {slot.name!r} holds NaN or infinity: send finite numbers")


def _raw_row(interface: Interface, body: bytes) -> tuple[InputSlot, bytes]:
    tensor, other = interface.inputs
    if other.kind == "image" and sniff_media_type(body) is not None:
        return other, _checked_image(body)
    if len(body) != tensor.size_bytes:
        image = "an encoded image, or " if other.kind == "image" else ""
        raise TensorError(
            f"a body without JSON must be {image}{tensor.size_bytes} bytes of {tensor.name!r}, "
            f"one row of {tensor.datatype}{list(tensor.row_shape)}; got {len(body)} bytes"
        )
    _check_finite(tensor, np.frombuffer(body, dtype=tensor.stored))
    return tensor, body
