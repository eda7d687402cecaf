"""The frames of a session: one WebSocket, many requests, ``docs/session.md``.

Subprotocol ``nearfar.v1``. Every WebSocket message is binary and is one frame. Numbers are
unsigned and big-endian::

    byte 0      type
    bytes 1-4   id: the request's, chosen by the device: 1 or more, each larger than the
                one before it. PING and PONG: any number. HELLO, WELCOME, HINT: 0.
    bytes 5-    by type:

    0x01 HELLO     to broker   JSON ``Hello``
    0x02 WELCOME   to device   JSON ``Welcome``
    0x03 REQUEST   to broker   JSON ``Request`` without its id
    0x04 ADMIT     to device   JSON ``Admit`` without its id
    0x05 REJECT    to device   JSON ``Reject`` without its id
    0x06 DATA      both        offset (4 bytes), then 1 to 65536 bytes of the body
    0x07 PROGRESS  to device   received_bytes (4), t_us (4)
    0x08 CANCEL    both        nothing
    0x09 RESULT    to device   length of the JSON (2), JSON ``Result`` without id and data,
                               then the first 0 to 65536 bytes of the body; the others
                               follow in DATA frames of the same id
    0x0a HINT      to device   JSON ``Hint``
    0x0b ERROR     to device   JSON ``Error`` without its id; id 0: the session ends
    0x0c PING      to broker   nothing
    0x0d PONG      to device   flags (1): bit 0 a batch can run now, bit 1 draining

JSON is UTF-8, an object of at most 8 KiB; keys at their default may be left out. What goes
to the broker may hold no key that is not listed here; a device ignores such keys.

``decode_frame`` raises ``WireError`` or, on a size, ``LimitExceeded``; nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Annotated, Any, Final, TypeVar

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.errors import LimitExceeded, WireError
from edge_runtime.contract.wire import JSON_MEDIA_TYPE, ModelRef, Region

__all__ = [
    "DEFAULT_PRIORITY",
    "MAX_ID",
    "MAX_PRIORITY",
    "SESSION_PATH",
    "SUBPROTOCOL",
    "Admit",
    "Cancel",
    "Data",
    "Error",
    "Frame",
    "Hello",
    "Hint",
    "Ping",
    "Pong",
    "Progress",
    "Reject",
    "Request",
    "Result",
    "Welcome",
    "decode_frame",
    "encode_frame",
]

SUBPROTOCOL: Final = "nearfar.v1"
SESSION_PATH: Final = "/v1/session"
MAX_ID: Final = 2**32 - 1
DEFAULT_PRIORITY: Final = 3
MAX_PRIORITY: Final = 7

_MAX_U32: Final = 2**32 - 1
_Id = Annotated[int, msgspec.Meta(ge=1, le=MAX_ID)]
_U32 = Annotated[int, msgspec.Meta(ge=0, le=_MAX_U32)]
_Name = Annotated[str, msgspec.Meta(max_length=limits.MAX_NAME_CHARS)]
_Text = Annotated[str, msgspec.Meta(max_length=limits.MAX_TEXT_CHARS)]
_Key = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}$(?!\n)")]
_Priority = Annotated[int, msgspec.Meta(ge=0, le=MAX_PRIORITY)]


class Hello(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """The device's first frame. Requests may follow at once."""

    api_key: Annotated[str, msgspec.Meta(max_length=512)] | None = None
    """Here, as a page in a browser cannot set headers of a WebSocket."""
    client: _Name = ""
    """Which implementation speaks; for the broker's log."""


class Welcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The broker's first frame: its bounds."""

    max_requests: _U32 = limits.MAX_SESSION_REQUESTS
    """In flight at one time."""
    idle_ms: _U32 = limits.MAX_SESSION_IDLE_MS
    """Without a frame, the broker closes the session after this."""


class Request(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """An image or seed is about to come.

    Says what ``POST /v1/models/{model}:predict`` says in its path and headers.
    """

    id: _Id
    model: _Name
    media_type: _Name
    size_bytes: _U32
    """Of the whole body."""
    version: _Name | None = None
    """Version or alias of the model; None: the broker chooses."""
    deadline_ms: _U32 = limits.DEFAULT_DEADLINE_MS
    """Left when the frame was made; the broker counts from its arrival."""
    key: _Key | None = None
    """Idempotency key: a retry under the same key joins the first try, or gets its answer."""
    priority: _Priority = DEFAULT_PRIORITY
    """0 first (RFC 9218): whose bytes go first on this session, in both directions."""
    accept: Annotated[str, msgspec.Meta(max_length=limits.MAX_HEADER_CHARS)] = JSON_MEDIA_TYPE
    top_k: _U32 | None = None
    palette: bool | None = None
    request_id: _Key | None = None
    """For the logs of both sides."""


class Admit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Go on with the upload."""

    id: _Id
    queue_delay_ms: _U32 = 0
    """Predicted wait of a new request."""
    received_bytes: _U32 = 0
    """What the broker has of the body already: all of it when a retry joins its first try."""


class Reject(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """No, on the request frame alone: stop sending."""

    id: _Id
    code: _Name
    """Of ``contract/errors.py``."""
    detail: _Text
    status: Annotated[int, msgspec.Meta(ge=400, le=599)]
    """What HTTP would have answered."""
    retryable: bool = False
    retry_after_ms: _U32 | None = None
    queue_delay_ms: _U32 | None = None
    request_id: _Name = ""


class Data(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a body, in order. ``offset``: of its first byte in the body."""

    id: _Id
    offset: _U32
    data: Annotated[bytes, msgspec.Meta(min_length=1, max_length=limits.MAX_DATA_BYTES)]


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What the broker has received: the only measure of the uplink.

    A local send returns long before its bytes have left the device.
    """

    id: _Id
    received_bytes: _U32
    t_us: _U32
    """On the broker's clock since it saw the REQUEST frame."""


class Cancel(msgspec.Struct, frozen=True, kw_only=True):
    """No more bytes of this body come, and no answer is wanted.

    The broker says the same back, which proves that every byte sent before has arrived.
    """

    id: _Id


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer, or its beginning."""

    id: _Id
    media_type: _Name
    size_bytes: _U32
    """Of the whole body."""
    model: ModelRef | None = None
    """Where the body is a picture; JSON names it itself."""
    region: Region | None = None
    recv_ms: float | None = None
    queue_ms: float | None = None
    inference_ms: float | None = None
    queue_delay_ms: _U32 | None = None
    request_id: _Name = ""
    data: bytes = b""


class Hint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """News that nobody asked for."""

    model: _Name | None = None
    queue_delay_ms: _U32 | None = None
    """Predicted wait of a new request to ``model``."""
    draining: bool = False
    """The broker shuts down: no new request is admitted, those in flight are answered."""


class Error(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An admitted request failed; with id 0 the session, which is closed after it."""

    id: _U32
    code: _Name
    detail: _Text
    status: Annotated[int, msgspec.Meta(ge=400, le=599)]
    retryable: bool = False
    retry_after_ms: _U32 | None = None
    queue_delay_ms: _U32 | None = None
    request_id: _Name = ""


class Ping(msgspec.Struct, frozen=True, kw_only=True):
    """Keeps the path warm and measures it. When: the device's choice."""

    id: _U32


class Pong(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to the PING of this id."""

    id: _U32
    ready: bool
    draining: bool = False


Frame = (
    Hello
    | Welcome
    | Request
    | Admit
    | Reject
    | Data
    | Progress
    | Cancel
    | Result
    | Hint
    | Error
    | Ping
    | Pong
)

_HEADER = struct.Struct(">BI")
_DATA = struct.Struct(">BII")
_PROGRESS = struct.Struct(">BIII")
_PONG = struct.Struct(">BIB")
_RESULT = struct.Struct(">BIH")
_READY, _DRAINING = 1, 2

_HELLO, _WELCOME, _REQUEST, _ADMIT, _REJECT, _DATA_TYPE, _PROGRESS_TYPE = range(1, 8)
_CANCEL, _RESULT_TYPE, _HINT, _ERROR, _PING, _PONG_TYPE = range(8, 14)

_JSON_TYPES: Final[dict[type, int]] = {
    Hello: _HELLO,
    Welcome: _WELCOME,
    Request: _REQUEST,
    Admit: _ADMIT,
    Reject: _REJECT,
    Hint: _HINT,
    Error: _ERROR,
}
_WITHOUT_ID: Final[frozenset[type]] = frozenset((Hello, Welcome, Hint))
_F = TypeVar("_F")


# Encoding ------------------------------------------------------------------------------


def encode_frame(frame: Frame) -> bytes:
    """One WebSocket message. Raises ``LimitExceeded`` when the frame would be too large."""
    if isinstance(frame, Data):
        if not 1 <= len(frame.data) <= limits.MAX_DATA_BYTES:
            raise LimitExceeded(f"DATA carries 1 to {limits.MAX_DATA_BYTES} bytes")
        return _DATA.pack(_DATA_TYPE, frame.id, frame.offset) + frame.data
    if isinstance(frame, Progress):
        return _PROGRESS.pack(_PROGRESS_TYPE, frame.id, frame.received_bytes, frame.t_us)
    if isinstance(frame, Cancel):
        return _HEADER.pack(_CANCEL, frame.id)
    if isinstance(frame, Ping):
        return _HEADER.pack(_PING, frame.id)
    if isinstance(frame, Pong):
        flags = _READY * frame.ready | _DRAINING * frame.draining
        return _PONG.pack(_PONG_TYPE, frame.id, flags)
    fields: dict[str, Any] = msgspec.to_builtins(frame, builtin_types=(bytes,))
    frame_id = fields.pop("id", 0)
    if isinstance(frame, Result):
        fields.pop("data", None)
        head = _bounded(msgspec.json.encode(fields))
        if len(frame.data) > limits.MAX_DATA_BYTES:
            raise LimitExceeded(f"RESULT carries at most {limits.MAX_DATA_BYTES} bytes")
        return _RESULT.pack(_RESULT_TYPE, frame_id, len(head)) + head + frame.data
    return _HEADER.pack(_JSON_TYPES[type(frame)], frame_id) + _bounded(msgspec.json.encode(fields))


def _bounded(text: bytes) -> bytes:
    if len(text) > limits.MAX_CONTROL_BYTES:
        raise LimitExceeded(f"the JSON of a frame has at most {limits.MAX_CONTROL_BYTES} bytes")
    return text


# Decoding ------------------------------------------------------------------------------


def decode_frame(message: bytes) -> Frame:
    """The frame in one WebSocket message. Raises ``WireError`` or ``LimitExceeded``."""
    if len(message) > limits.MAX_FRAME_BYTES:
        raise LimitExceeded(f"a frame has at most {limits.MAX_FRAME_BYTES} bytes")
    if len(message) < _HEADER.size:
        raise WireError("a frame has at least 5 bytes: its type and an id")
    kind, frame_id = _HEADER.unpack_from(message)
    read = _READERS.get(kind)
    if read is None:
        raise WireError(f"no frame has the type 0x{kind:02x}")
    if not frame_id and kind in _OF_REQUESTS:
        raise WireError("the id of a request is 1 or more")
    return read(frame_id, message)


def _read_data(frame_id: int, message: bytes) -> Data:
    if len(message) <= _DATA.size:
        raise WireError("a DATA frame carries at least one byte")
    if len(message) > _DATA.size + limits.MAX_DATA_BYTES:
        raise LimitExceeded(f"a DATA frame carries at most {limits.MAX_DATA_BYTES} bytes")
    _, _, offset = _DATA.unpack_from(message)
    return Data(id=frame_id, offset=offset, data=message[_DATA.size :])


def _read_progress(frame_id: int, message: bytes) -> Progress:
    _require_size("PROGRESS", message, _PROGRESS.size)
    _, _, received_bytes, t_us = _PROGRESS.unpack(message)
    return Progress(id=frame_id, received_bytes=received_bytes, t_us=t_us)


def _read_cancel(frame_id: int, message: bytes) -> Cancel:
    _require_size("CANCEL", message, _HEADER.size)
    return Cancel(id=frame_id)


def _read_ping(frame_id: int, message: bytes) -> Ping:
    _require_size("PING", message, _HEADER.size)
    return Ping(id=frame_id)


def _read_pong(frame_id: int, message: bytes) -> Pong:
    _require_size("PONG", message, _PONG.size)
    flags = message[-1]
    if flags & ~(_READY | _DRAINING):
        raise WireError("PONG sets a flag that means nothing")
    return Pong(id=frame_id, ready=bool(flags & _READY), draining=bool(flags & _DRAINING))


def _read_result(frame_id: int, message: bytes) -> Result:
    if len(message) < _RESULT.size:
        raise WireError("a RESULT frame ends within its length")
    _, _, length = _RESULT.unpack_from(message)
    end = _RESULT.size + length
    if len(message) < end:
        raise WireError("a RESULT frame ends within its JSON")
    data = message[end:]
    if len(data) > limits.MAX_DATA_BYTES:
        raise LimitExceeded(f"a RESULT frame carries at most {limits.MAX_DATA_BYTES} bytes")
    fields = _object("RESULT", message[_RESULT.size : end], forbidden=("id", "data"))
    result = _convert("RESULT", fields | {"id": frame_id, "data": data}, Result)
    if len(data) > result.size_bytes:
        raise WireError("a RESULT frame carries more bytes than it announces")
    return result


def _json_reader(kind: type[_F], name: str) -> Callable[[int, bytes], _F]:
    has_id = kind not in _WITHOUT_ID

    def read(frame_id: int, message: bytes) -> _F:
        fields = _object(name, message[_HEADER.size :], forbidden=("id",))
        if has_id:
            fields["id"] = frame_id
        elif frame_id:
            raise WireError(f"the id of {name} is 0")
        return _convert(name, fields, kind)

    return read


def _require_size(name: str, message: bytes, size: int) -> None:
    if len(message) != size:
        raise WireError(f"a {name} frame has {size} bytes, not {len(message)}")


def _object(name: str, text: bytes, *, forbidden: tuple[str, ...]) -> dict[str, Any]:
    if len(text) > limits.MAX_CONTROL_BYTES:
        raise LimitExceeded(f"the JSON of {name} has more than {limits.MAX_CONTROL_BYTES} bytes")
    try:
        fields = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"the JSON of {name} makes no sense: {error}") from None
    if not isinstance(fields, dict):
        raise WireError(f"the JSON of {name} must be an object")
    for key in forbidden:
        if key in fields:
            raise WireError(f"the JSON of {name} must not hold {key!r}")
    return fields


def _convert(name: str, fields: dict[str, Any], kind: type[_F]) -> _F:
    try:
        return msgspec.convert(fields, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise WireError(f"{name}: {error}") from None


_READERS: Final[dict[int, Callable[[int, bytes], Frame]]] = {
    _HELLO: _json_reader(Hello, "HELLO"),
    _WELCOME: _json_reader(Welcome, "WELCOME"),
    _REQUEST: _json_reader(Request, "REQUEST"),
    _ADMIT: _json_reader(Admit, "ADMIT"),
    _REJECT: _json_reader(Reject, "REJECT"),
    _DATA_TYPE: _read_data,
    _PROGRESS_TYPE: _read_progress,
    _CANCEL: _read_cancel,
    _RESULT_TYPE: _read_result,
    _HINT: _json_reader(Hint, "HINT"),
    _ERROR: _json_reader(Error, "ERROR"),
    _PING: _read_ping,
    _PONG_TYPE: _read_pong,
}
_OF_REQUESTS: Final = frozenset(
    (_REQUEST, _ADMIT, _REJECT, _DATA_TYPE, _PROGRESS_TYPE, _CANCEL, _RESULT_TYPE)
)
