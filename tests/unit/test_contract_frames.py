"""Frames of a session: golden bytes, and hostile messages that end in two kinds of error."""

from __future__ import annotations

import json

import pytest

from edge_runtime.contract import frames, limits
from edge_runtime.contract.errors import LimitExceeded, WireError, error_from_code
from edge_runtime.contract.frames import (
    Cancel,
    Data,
    Error,
    Hint,
    Progress,
    Reject,
    Request,
    Result,
    decode_frame,
    encode_frame,
)
from mobile_samples.conformance import generate
from mobile_samples.conformance.frames import EXAMPLES

VECTORS = json.loads((generate.HERE / "frames.json").read_text())


@pytest.mark.parametrize(
    ("frame", "vector"),
    list(zip(EXAMPLES, VECTORS["frames"], strict=True)),
    ids=[type(frame).__name__ for frame in EXAMPLES],
)
def test_a_frame_has_its_golden_bytes_and_comes_back(
    frame: frames.Frame, vector: dict[str, str]
) -> None:
    assert encode_frame(frame).hex() == vector["hex"]
    assert decode_frame(bytes.fromhex(vector["hex"])) == frame


def test_the_layout_is_the_one_that_the_docstring_writes_down() -> None:
    assert encode_frame(Data(id=258, offset=3, data=b"ab")).hex() == "0600000102000000036162"
    assert encode_frame(Progress(id=1, received_bytes=2, t_us=3)).hex() == (
        "07000000010000000200000003"
    )
    assert encode_frame(Cancel(id=1)).hex() == "0800000001"
    result = encode_frame(Result(id=1, media_type="a", size_bytes=1, data=b"x"))
    assert result == b'\x09\x00\x00\x00\x01\x00\x21{"media_type":"a","size_bytes":1}x'


@pytest.mark.parametrize("vector", VECTORS["refused"], ids=lambda v: v["hex"][:24] or "empty")
def test_a_hostile_message_is_refused_with_its_code(vector: dict[str, str]) -> None:
    message = bytes.fromhex(vector["hex"])
    size = int(vector.get("size_bytes", len(message)))
    message += bytes.fromhex(vector.get("then", "")) * (size - len(message))
    with pytest.raises(type(error_from_code(vector["error"], ""))) as caught:
        decode_frame(message)
    assert caught.value.code == vector["error"]
    assert len(VECTORS["refused"]) == 32


@pytest.mark.parametrize(
    "frame",
    [
        Data(id=1, offset=0, data=b""),
        Data(id=1, offset=0, data=bytes(limits.MAX_DATA_BYTES + 1)),
        Result(id=1, media_type="", size_bytes=2**20, data=bytes(limits.MAX_DATA_BYTES + 1)),
        Reject(id=1, code="wire", detail="x" * limits.MAX_CONTROL_BYTES, status=400),
    ],
    ids=["empty", "data", "result", "json"],
)
def test_a_frame_too_large_is_not_written(frame: frames.Frame) -> None:
    with pytest.raises(LimitExceeded):
        encode_frame(frame)


def test_the_largest_frames_fit_into_one_message() -> None:
    data = encode_frame(Data(id=1, offset=0, data=bytes(limits.MAX_DATA_BYTES)))
    assert len(data) <= limits.MAX_FRAME_BYTES
    assert 7 + limits.MAX_CONTROL_BYTES + limits.MAX_DATA_BYTES <= limits.MAX_FRAME_BYTES


def test_a_device_ignores_what_a_later_broker_adds_and_a_broker_does_not() -> None:
    assert decode_frame(b'\x0a\x00\x00\x00\x00{"draining":true,"mood":"good"}') == Hint(
        draining=True
    )
    with pytest.raises(WireError, match="mood"):
        decode_frame(
            b'\x03\x00\x00\x00\x01{"model":"m","media_type":"a","size_bytes":1,"mood":"good"}'
        )


@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity"])
def test_numbers_that_are_none_are_refused(number: str) -> None:
    head = f'{{"media_type":"a","size_bytes":0,"recv_ms":{number}}}'.encode()
    with pytest.raises(WireError):
        decode_frame(b"\x09\x00\x00\x00\x01" + len(head).to_bytes(2, "big") + head)


def test_an_error_of_the_session_has_the_id_0_and_one_of_a_request_its_own() -> None:
    for number in (0, 1):
        frame = Error(id=number, code="wire", detail="", status=400)
        assert decode_frame(encode_frame(frame)) == frame


def test_defaults_need_not_be_written() -> None:
    asked = Request(id=1, model="m", media_type="a", size_bytes=1)
    assert b"deadline" not in encode_frame(asked)
    assert asked.deadline_ms == limits.DEFAULT_DEADLINE_MS
