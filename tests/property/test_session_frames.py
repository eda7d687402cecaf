"""Any frame comes back as it was; any bytes are a frame or one of two errors."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.contract import limits
from edge_runtime.contract.errors import LimitExceeded, WireError
from edge_runtime.contract.frames import (
    MAX_ID,
    Admit,
    Cancel,
    Data,
    Error,
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
from mobile_samples.conformance.frames import EXAMPLES

ids = st.integers(1, MAX_ID)
u32 = st.integers(0, 2**32 - 1)
maybe_u32 = st.none() | u32
text = st.text(max_size=20)
keys = st.text("azAZ09_.-", min_size=1, max_size=20)
milliseconds = st.none() | st.floats(0, 1e9)
models = st.none() | st.builds(
    ModelRef, name=text, version=text, sha256=text, labels_sha256=st.none() | text
)
regions = st.none() | st.tuples(*[st.floats(-1e6, 1e6)] * 4)


def refusals(kind: Any, of: Any) -> Any:
    return st.builds(
        kind,
        id=of,
        code=text,
        detail=text,
        status=st.integers(400, 599),
        retryable=st.booleans(),
        retry_after_ms=maybe_u32,
        queue_delay_ms=maybe_u32,
        request_id=text,
    )


@st.composite
def results(draw: Any) -> Result:
    data = draw(st.binary(max_size=200))
    return draw(
        st.builds(
            Result,
            id=ids,
            media_type=text,
            size_bytes=st.integers(len(data), 2**32 - 1),
            model=models,
            region=regions,
            recv_ms=milliseconds,
            queue_ms=milliseconds,
            inference_ms=milliseconds,
            queue_delay_ms=maybe_u32,
            request_id=text,
            data=st.just(data),
        )
    )


any_frame = st.one_of(
    st.builds(Hello, api_key=st.none() | text, client=text),
    st.builds(Welcome, max_requests=u32, idle_ms=u32),
    st.builds(
        Request,
        id=ids,
        model=text,
        media_type=text,
        size_bytes=u32,
        deadline_ms=u32,
        key=st.none() | keys,
        priority=st.integers(0, 7),
        accept=text,
        top_k=maybe_u32,
        palette=st.none() | st.booleans(),
        request_id=st.none() | keys,
    ),
    st.builds(Admit, id=ids, queue_delay_ms=u32, received_bytes=u32),
    refusals(Reject, ids),
    refusals(Error, u32),
    st.builds(Data, id=ids, offset=u32, data=st.binary(min_size=1, max_size=300)),
    st.builds(Progress, id=ids, received_bytes=u32, t_us=u32),
    st.builds(Cancel, id=ids),
    results(),
    st.builds(Hint, model=st.none() | text, queue_delay_ms=maybe_u32, draining=st.booleans()),
    st.builds(Ping, id=u32),
    st.builds(Pong, id=u32, ready=st.booleans(), draining=st.booleans()),
)


@settings(max_examples=40)
@given(any_frame)
def test_every_frame_comes_back_as_it_was(frame: Any) -> None:
    message = encode_frame(frame)
    assert len(message) <= limits.MAX_FRAME_BYTES
    assert decode_frame(message) == frame


def refused_or_read(message: bytes) -> None:
    try:
        frame = decode_frame(message)
    except (WireError, LimitExceeded):
        return
    assert decode_frame(encode_frame(frame)) == frame


@given(st.binary(max_size=64))
def test_any_bytes_are_a_frame_or_a_typed_error(message: bytes) -> None:
    refused_or_read(message)


@given(st.sampled_from(EXAMPLES), st.integers(0, 300), st.integers(1, 255), st.integers(0, 300))
def test_a_damaged_frame_is_another_one_or_a_typed_error(
    frame: Any, at: int, change: int, cut: int
) -> None:
    message = bytearray(encode_frame(frame))
    message[at % len(message)] ^= change
    refused_or_read(bytes(message))
    refused_or_read(bytes(message[: cut % (len(message) + 1)]))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50)
@given(st.sampled_from([1, 2, 3, 4, 5, 9, 10, 11]), u32, json_values, st.binary(max_size=8))
def test_any_json_is_a_frame_or_a_typed_error(
    kind: int, number: int, value: Any, rest: bytes
) -> None:
    body = json.dumps(value).encode()
    head = bytes([kind]) + number.to_bytes(4, "big")
    refused_or_read(head + (len(body).to_bytes(2, "big") if kind == 9 else b"") + body + rest)
