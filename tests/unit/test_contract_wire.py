"""Headers and bodies: what is understood, what is refused, what is only a hint."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.contract import limits
from edge_runtime.contract.errors import LimitExceeded, WireError
from edge_runtime.contract.tasks import Prediction
from edge_runtime.contract.wire import (
    ModelRef,
    PredictAnswer,
    Problem,
    ServerTiming,
    decode_answer,
    decode_problem,
    format_server_timing,
    parse_deadline_ms,
    parse_queue_delay_ms,
    parse_request_id,
    parse_server_timing,
)

ANSWER = PredictAnswer(
    model=ModelRef(name="m", version="1", sha256="0" * 64, labels_sha256=None),
    predictions=(Prediction(index=0, label="cat", score=0.5),),
)


def test_absent_deadline_is_the_default() -> None:
    assert parse_deadline_ms(None) == limits.DEFAULT_DEADLINE_MS


@pytest.mark.parametrize("value", ["0", "00", "-1", "1.0", "1e3", "", " 1", "1 ", "٣", "1_0", "x"])
def test_deadline_that_is_no_positive_integer_is_refused(value: str) -> None:
    with pytest.raises(WireError):
        parse_deadline_ms(value)


def test_deadline_is_bounded() -> None:
    assert parse_deadline_ms(str(limits.MAX_DEADLINE_MS)) == limits.MAX_DEADLINE_MS
    with pytest.raises(LimitExceeded):
        parse_deadline_ms(str(limits.MAX_DEADLINE_MS + 1))


@pytest.mark.parametrize("value", ["", "a b", "a\nb", "x" * 129, "ä"])
def test_request_id_cannot_carry_anything_into_logs(value: str) -> None:
    with pytest.raises(WireError):
        parse_request_id(value)


NUMBER = st.one_of(st.none(), st.floats(0, 1e6, allow_nan=False).map(lambda v: round(v, 3)))


@given(NUMBER, NUMBER, NUMBER)
def test_server_timing_round_trips(
    recv: float | None, queue: float | None, inference: float | None
) -> None:
    timing = ServerTiming(recv_ms=recv, queue_ms=queue, inference_ms=inference)
    assert parse_server_timing(format_server_timing(timing)) == timing


@given(st.text(max_size=200))
def test_hints_never_raise(value: str) -> None:
    timing = parse_server_timing(value)
    for number in (timing.recv_ms, timing.queue_ms, timing.inference_ms):
        assert number is None or number >= 0
    delay = parse_queue_delay_ms(value)
    assert delay is None or delay >= 0


def test_answer_round_trips_and_unknown_keys_are_refused() -> None:
    data = msgspec.json.encode(ANSWER)
    assert decode_answer(data) == ANSWER
    with pytest.raises(WireError):
        decode_answer(data[:-1] + b',"more":1}')


@pytest.mark.parametrize("data", [b"", b"null", b"{}", b"<html>", b"\xff", b'{"model":{}}'])
def test_answer_that_makes_no_sense_is_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError):
        decode_answer(data)


def test_answer_is_bounded() -> None:
    with pytest.raises(WireError, match="bytes"):
        decode_answer(b" " * (limits.MAX_ANSWER_BYTES + 1))


def test_problem_of_a_proxy_is_none_and_ours_is_read() -> None:
    assert decode_problem(b"<h1>502 Bad Gateway</h1>") is None
    ours = Problem(title="t", status=503, detail="d", code="overloaded", retryable=True)
    assert decode_problem(msgspec.json.encode(ours)) == ours
