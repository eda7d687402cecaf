"""Frames of a session, byte for byte, and messages that are none."""

from __future__ import annotations

from typing import Any

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.errors import NearfarError
from edge_runtime.contract.frames import (
    Admit,
    Cancel,
    Data,
    Error,
    Frame,
    Hello,
    Hint,
    Ping,
    Pong,
    Progress,
    Reject,
    Request,
    Result,
    Welcome,
    decode_frame,
    encode_frame,
)
from edge_runtime.contract.wire import ModelRef

__all__ = ["EXAMPLES", "frame_vectors"]

_MODEL = ModelRef(name="scenes", version="1.0.0", sha256="ab" * 32, labels_sha256=None)

EXAMPLES: tuple[Frame, ...] = (
    Hello(),
    Hello(api_key="nf_aaaaaaaaaaaa." + "A" * 43, client="sample-web"),
    Welcome(),
    Welcome(max_requests=8, idle_ms=60_000),
    Request(id=1, model="digits-large", media_type="image/jpeg", size_bytes=19_000),
    Request(
        id=2**32 - 1,
        model="scenes",
        media_type="image/png",
        size_bytes=8 * 2**20,
        deadline_ms=250,
        key="0f8b-1.a_b",
        priority=0,
        accept="image/png",
        palette=True,
        request_id="dev-1.a",
    ),
    Request(id=3, model="digits", media_type="image/webp", size_bytes=1, top_k=5),
    Admit(id=1),
    Admit(id=2, queue_delay_ms=42, received_bytes=19_000),
    Reject(
        id=7,
        code="overloaded",
        detail="ask again later: Gerät müde",
        status=503,
        retryable=True,
        retry_after_ms=1000,
        queue_delay_ms=730,
        request_id="dev-1.a",
    ),
    Data(id=1, offset=0, data=b"\xff\xd8\xff"),
    Data(id=1, offset=2**32 - 2, data=b"\x00"),
    Progress(id=1, received_bytes=8192, t_us=41_337),
    Cancel(id=1),
    Result(id=1, media_type="application/json", size_bytes=2, data=b"{}"),
    Result(
        id=2,
        media_type="image/png",
        size_bytes=40_000,
        model=_MODEL,
        region=(106.5, 0.0, 533.25, 426.0),
        recv_ms=4.125,
        queue_ms=0.25,
        inference_ms=9.5,
        queue_delay_ms=0,
        request_id="dev-1.a",
        data=b"\x89PNG",
    ),
    Hint(draining=True),
    Hint(model="digits-large", queue_delay_ms=120),
    Error(id=0, code="unauthorized", detail="this API key is not valid here", status=401),
    Error(id=5, code="deadline_exceeded", detail="late", status=504, retryable=True),
    Ping(id=0),
    Pong(id=9, ready=True),
    Pong(id=2**32 - 1, ready=False, draining=True),
)

_REFUSED: tuple[bytes, ...] = (
    b"",
    b"\x0c\x00\x00\x00",
    b"\x00\x00\x00\x00\x01",
    b"\x0e\x00\x00\x00\x01",
    b"\x01\x00\x00\x00\x00",
    b"\x01\x00\x00\x00\x01{}",
    b"\x01\x00\x00\x00\x00[]",
    b'\x01\x00\x00\x00\x00{"token":"x"}',
    b'\x01\x00\x00\x00\x00{"api_key":1}',
    b"\x01\x00\x00\x00\x00\xff\xfe",
    b"\x01\x00\x00\x00\x00" + b"[" * 5000,
    b'\x03\x00\x00\x00\x00{"model":"m","media_type":"image/png","size_bytes":1}',
    b'\x03\x00\x00\x00\x01{"model":"m","media_type":"image/png"}',
    b'\x03\x00\x00\x00\x01{"id":1,"model":"m","media_type":"image/png","size_bytes":1}',
    b'\x03\x00\x00\x00\x01{"model":"m","media_type":"image/png","size_bytes":-1}',
    b'\x03\x00\x00\x00\x01{"model":"m","media_type":"image/png","size_bytes":1.5}',
    b'\x03\x00\x00\x00\x01{"model":"m","media_type":"image/png","size_bytes":4294967296}',
    b'\x03\x00\x00\x00\x01{"model":"m","media_type":"image/png","size_bytes":1,"priority":8}',
    b'\x03\x00\x00\x00\x01{"model":"m","media_type":"image/png","size_bytes":1,"key":""}',
    b'\x03\x00\x00\x00\x01{"model":"m","media_type":"image/png","size_bytes":1,"key":"a b"}',
    b"\x06\x00\x00\x00\x01\x00\x00\x00\x00",
    b"\x06\x00\x00\x00\x00\x00\x00\x00\x00x",
    b"\x07\x00\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00",
    b"\x08\x00\x00\x00\x01\x00",
    b"\x09\x00\x00\x00\x01\x00",
    b"\x09\x00\x00\x00\x01\x00\x05{}",
    b'\x09\x00\x00\x00\x01\x00\x2f{"media_type":"application/json","size_bytes":1}xx',
    b"\x0d\x00\x00\x00\x01\x04",
    b"\x0b\x00\x00\x00\x01{}",
)


def frame_vectors() -> dict[str, Any]:
    """What each example looks like as bytes; ``error`` is the code of a refusal."""
    refused = []
    oversized = (
        b"\x06\x00\x00\x00\x01\x00\x00\x00\x00" + bytes(limits.MAX_DATA_BYTES + 1),
        b"\x0c" + bytes(limits.MAX_FRAME_BYTES),
        b"\x01\x00\x00\x00\x00" + b" " * (limits.MAX_CONTROL_BYTES + 1),
    )
    for message in (*_REFUSED, *oversized):
        try:
            decode_frame(message)
        except NearfarError as error:
            shown: dict[str, Any] = {"error": error.code}
            if len(message) <= 200:
                shown["hex"] = message.hex()
            else:  # its beginning, and one byte so many times
                shown |= {"hex": message[:16].hex(), "then": message[-1:].hex()}
                shown["size_bytes"] = len(message)
            refused.append(shown)
    return {
        "frames": [
            {
                "name": type(frame).__name__.upper(),
                "fields": _plain(msgspec.to_builtins(frame, builtin_types=(bytes,))),
                "hex": encode_frame(frame).hex(),
            }
            for frame in EXAMPLES
        ],
        "refused": refused,
    }


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Bytes as hexadecimal digits."""
    return {
        name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items()
    }
