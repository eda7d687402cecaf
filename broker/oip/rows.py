"""From an inference request to the bodies that the model's process takes, one a row."""

from __future__ import annotations

import binascii
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Asked:
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
        request = InferRequest(id=None, inputs=(), outputs=(), binary_output=True, timeout_us=None)
        slot, bodies = _raw_row(interface, body)
    else:
        request = parse_infer(body, header_length)
        slot, bodies = _sent_rows(interface, request.inputs)
    wanted = wanted_outputs(interface, request, rows=len(bodies))
    places = places_of(wanted)
    template = BatchItem(
        b"",
        tensor=slot.kind == "tensor",
        outputs=places or None,
        output_bytes=tensor_bytes(wanted),
        answered=any(one.slot.field is not None for one in wanted),
    )
    return Asked(
        id=request.id,
        items=tuple(_with_body(template, body) for body in bodies),
        wanted=wanted,
        timeout_us=request.timeout_us,
        priority=request.priority,
    )


def _with_body(template: BatchItem, body: bytes) -> BatchItem:
    return BatchItem(
        body,
        tensor=template.tensor,
        outputs=template.outputs,
        output_bytes=template.output_bytes,
        answered=template.answered,
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
    if typed.dtype.kind == "f" and not np.isfinite(typed).all():
        raise TensorError(f"input {slot.name!r} holds NaN or infinity: send finite numbers")
    return [to_little_endian(typed[row]) for row in range(rows)]


def _raw_row(interface: Interface, body: bytes) -> tuple[InputSlot, list[bytes]]:
    tensor, other = interface.inputs
    if other.kind == "image" and sniff_media_type(body) is not None:
        return other, [_checked_image(body)]
    size_bytes = tensor.spec.size_bytes
    if len(body) != size_bytes:
        image = "an encoded image, or " if other.kind == "image" else ""
        raise TensorError(
            f"a body without JSON must be {image}{size_bytes} bytes of {tensor.name!r}, one row "
            f"of {tensor.datatype}{list(tensor.row_shape)}; got {len(body)} bytes"
        )
    stored = np.frombuffer(body, dtype=np.dtype(tensor.spec.dtype).newbyteorder("<"))
    return tensor, _tensor_rows(tensor, stored.reshape(tensor.spec.shape), 1)
