"""An inference request as it came: JSON, and the binary tensors behind it.

What can be checked without knowing the model is checked here; tensors stay as they came
until their names and shapes are known to be the model's.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from broker.oip.datatypes import Datatype, Values, read_binary, read_json
from edge_runtime.contract import limits
from edge_runtime.contract.errors import LimitExceeded, TensorError, WireError

__all__ = [
    "HEADER_LENGTH",
    "InferRequest",
    "RequestedOutput",
    "SentTensor",
    "check_header_length",
    "decode_control",
    "output_options",
    "parse_header_length",
    "parse_infer",
]

HEADER_LENGTH: Final = "Inference-Header-Content-Length"
"""HTTP header: bytes of the JSON in a body that goes on with binary tensors; 0: the body is
one tensor, without any JSON."""

_DIGITS: Final = re.compile(r"[0-9]{1,10}\Z")
_MAX_UINT64: Final = 2**64 - 1

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=limits.MAX_NAME_CHARS)]
Shape = Annotated[
    tuple[Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_TENSOR_ELEMENTS)], ...],
    msgspec.Meta(max_length=limits.MAX_TENSOR_RANK),
]
Parameters = Annotated[
    dict[str, bool | int | float | str], msgspec.Meta(max_length=limits.MAX_INFER_PARAMETERS)
]
_Id = Annotated[str, msgspec.Meta(max_length=limits.MAX_INFER_ID_CHARS)]


class _Input(msgspec.Struct, frozen=True, kw_only=True):
    name: Name
    shape: Shape
    datatype: Datatype
    parameters: Parameters | None = None
    data: msgspec.Raw = msgspec.Raw(b"")


class RequestedOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of ``outputs``."""

    name: Name
    parameters: Parameters | None = None


class _Message(msgspec.Struct, frozen=True, kw_only=True):
    id: _Id | None = None
    parameters: Parameters | None = None
    inputs: Annotated[tuple[_Input, ...], msgspec.Meta(min_length=1, max_length=limits.MAX_TENSORS)]
    outputs: (
        Annotated[tuple[RequestedOutput, ...], msgspec.Meta(max_length=limits.MAX_TENSORS)] | None
    ) = None


class _Control(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a repository request."""

    ready: bool = False
    parameters: Parameters | None = None


_decoder = msgspec.json.Decoder(_Message)
_control_decoder = msgspec.json.Decoder(_Control)


@dataclass(frozen=True, slots=True)
class SentTensor:
    """An input, not read yet: exactly one of ``json`` and ``binary`` holds it."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    is_base64: bool
    """Elements of BYTES in JSON are base64 (``content_type``, as MLServer writes it)."""
    json: bytes | None = None
    binary: memoryview | None = None

    def read(self) -> Values:
        """Its numbers or elements. Raises ``TensorError``."""
        if self.binary is not None:
            return read_binary(self.name, self.datatype, self.shape, self.binary)
        assert self.json is not None  # noqa: S101
        return read_json(self.name, self.datatype, self.shape, self.json)


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One request, its parameters checked."""

    id: str | None
    inputs: tuple[SentTensor, ...]
    outputs: tuple[RequestedOutput, ...]
    """Empty: all there are."""
    binary_output: bool
    """For outputs that do not say it themselves."""
    timeout_us: int | None
    priority: int | None = None
    """1 is the highest; None or absent: the server's own."""
    """None, or 0 on the wire: the request does not say."""


def parse_header_length(value: str | None) -> int | None:
    """``Inference-Header-Content-Length``; None: absent. Raises ``WireError``."""
    if value is None:
        return None
    if not _DIGITS.match(value):
        raise WireError(f"{HEADER_LENGTH} must be a whole number of bytes")
    return int(value)


def check_header_length(header_length: int | None, body_bytes: int) -> int:
    """How much of a body is JSON. Raises ``WireError`` or ``LimitExceeded``."""
    json_bytes = body_bytes if header_length is None else header_length
    if json_bytes > body_bytes:
        raise WireError(f"{HEADER_LENGTH} is {json_bytes} and the body has {body_bytes} bytes only")
    if json_bytes > limits.MAX_INFER_JSON_BYTES:
        raise LimitExceeded(
            f"the JSON has more than {limits.MAX_INFER_JSON_BYTES} bytes: send tensors as "
            "binary data"
        )
    return json_bytes


def parse_infer(body: bytes, header_length: int | None) -> InferRequest:
    """Read a body that begins with JSON; ``header_length`` None: it is nothing else.

    Raises ``WireError`` on JSON that makes no sense, ``LimitExceeded`` on too much of it,
    and ``TensorError`` where binary data is not as long as the JSON says.
    """
    json_bytes = check_header_length(header_length, len(body))
    view = memoryview(body)
    message = _decode(view[:json_bytes])
    parameters = message.parameters or {}
    if parameters.get("sequence_id", 0) not in (0, ""):
        raise WireError("sequence_id: models here keep no state between requests: leave it out")
    timeout_us = _count(parameters, "timeout")
    priority = _count(parameters, "priority")
    return InferRequest(
        id=message.id,
        inputs=_sent_tensors(message.inputs, view[json_bytes:]),
        outputs=message.outputs or (),
        binary_output=_flag(parameters, "binary_data_output"),
        timeout_us=timeout_us or None,
        priority=priority or None,
    )


def _decode(data: memoryview) -> _Message:
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"the inference request makes no sense: {error}") from None


def decode_control(body: bytes) -> tuple[bool, Parameters]:
    """``ready`` and ``parameters`` of a repository request, whose body may be empty.

    Raises ``WireError``.
    """
    if not body.strip():
        return False, {}
    try:
        control = _control_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"the repository request makes no sense: {error}") from None
    return control.ready, control.parameters or {}


def _sent_tensors(inputs: tuple[_Input, ...], rest: memoryview) -> tuple[SentTensor, ...]:
    """Give each input its part of the binary data, in the order of the JSON."""
    if len({one.name for one in inputs}) != len(inputs):
        raise WireError("an input is there twice")
    tensors = []
    for one in inputs:
        parameters = one.parameters or {}
        if math.prod(one.shape) > limits.MAX_TENSOR_ELEMENTS:
            raise LimitExceeded(
                f"input {one.name!r} has more than {limits.MAX_TENSOR_ELEMENTS} elements"
            )
        _refuse_shared_memory(parameters)
        size_bytes = _count(parameters, "binary_data_size")
        data = bytes(one.data)
        has_json = data not in (b"", b"null")
        if has_json == (size_bytes is not None):
            raise TensorError(
                f"input {one.name!r} must have either data or the parameter binary_data_size"
            )
        sent = SentTensor(
            name=one.name,
            datatype=one.datatype,
            shape=one.shape,
            is_base64=parameters.get("content_type") == "base64",
            json=data if has_json else None,
            binary=None if size_bytes is None else rest[:size_bytes],
        )
        if size_bytes is not None:
            if size_bytes > len(rest):
                raise TensorError(
                    f"input {one.name!r}: binary_data_size is {size_bytes} and {len(rest)} bytes "
                    f"are left after the JSON: {HEADER_LENGTH} must be the length of the JSON"
                )
            rest = rest[size_bytes:]
        tensors.append(sent)
    if len(rest):
        raise TensorError(
            f"{len(rest)} bytes of the body belong to no input: "
            "the binary_data_size of all inputs together must be what follows the JSON"
        )
    return tuple(tensors)


def _refuse_shared_memory(parameters: Parameters) -> None:
    if any(name.startswith("shared_memory_") for name in parameters):
        raise WireError("shared memory is not offered: send and take tensors in the body")


def _count(parameters: Parameters, name: str) -> int | None:
    """A parameter that is a whole number from 0; None when absent. Raises ``WireError``."""
    value = parameters.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_UINT64:
        raise WireError(f"parameter {name} must be a whole number, at least 0")
    return value


def _flag(parameters: Parameters, name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise WireError(f"parameter {name} must be true or false")
    return value


def output_options(requested: RequestedOutput, *, binary: bool) -> tuple[bool, int]:
    """Whether an output goes out as binary data, and its classification count (0: none).

    ``binary``: what the request says for all. Raises ``WireError``.
    """
    parameters = requested.parameters or {}
    _refuse_shared_memory(parameters)
    classes = _count(parameters, "classification") or 0
    if classes > limits.MAX_TOP_K:
        raise LimitExceeded(f"classification must be at most {limits.MAX_TOP_K}")
    own = "binary_data" in parameters
    return (_flag(parameters, "binary_data") if own else binary), classes
