"""Headers and bodies: what is understood, what is refused, what is only a hint."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.contract import limits
from edge_runtime.contract.errors import LimitExceeded, WireError
from edge_runtime.contract.tasks import Box, Prediction
from edge_runtime.contract.wire import (
    MAX_SEED,
    MAX_SEED_BODY_BYTES,
    EncodedAnswer,
    ModelRef,
    Picture,
    PredictAnswer,
    Problem,
    ServerTiming,
    decode_answer,
    decode_problem,
    decode_seed,
    encode_seed,
    format_picture_headers,
    format_server_timing,
    parse_deadline_ms,
    parse_picture_headers,
    parse_queue_delay_ms,
    parse_request_id,
    parse_server_timing,
)

MODEL = ModelRef(name="m", version="1", sha256="0" * 64, labels_sha256=None)
ANSWER = PredictAnswer(
    model=MODEL,
    predictions=(Prediction(index=0, label="cat", score=0.5),),
)
MODEL_JSON = '{"name":"m","version":"1","sha256":"' + "0" * 64 + '","labels_sha256":null}'
PICTURE = Picture(
    media_type="image/png", width=4, height=3, region=(0.0, 1.5, 8.0, 6.0), data=b"\0"
)
BOX = Box(index=1, label="car", score=0.75, x_min=1.0, y_min=2.0, x_max=3.5, y_max=4.0)
BOX_JSON = '{"index":1,"label":"car","score":0.75,"x_min":1.0,"y_min":2.0,"x_max":3.5,"y_max":4.0}'
PICTURE_JSON = (
    '{"media_type":"image/png","width":4,"height":3,"region":[0.0,1.5,8.0,6.0],"data":"AA=="}'
)
GOLDEN = [
    (ANSWER, '"predictions":[{"index":0,"label":"cat","score":0.5}]'),
    (PredictAnswer(model=MODEL, boxes=(BOX,)), f'"boxes":[{BOX_JSON}]'),
    (PredictAnswer(model=MODEL, boxes=()), '"boxes":[]'),
    (PredictAnswer(model=MODEL, mask=PICTURE), f'"mask":{PICTURE_JSON}'),
    (
        PredictAnswer(model=MODEL, image=msgspec.structs.replace(PICTURE, region=None)),
        '"image":{"media_type":"image/png","width":4,"height":3,"region":null,"data":"AA=="}',
    ),
]


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


@pytest.mark.parametrize(("answer", "json"), GOLDEN)
def test_an_answer_of_every_task_is_written_as_published(answer: PredictAnswer, json: str) -> None:
    data = msgspec.json.encode(answer)
    assert data.decode() == f'{{"model":{MODEL_JSON},{json}}}'
    assert decode_answer(data) == answer
    assert PredictAnswer.of(MODEL, answer.answer) == answer


def test_an_answer_is_one_kind_of_answer() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        EncodedAnswer()
    with pytest.raises(ValueError, match="exactly one"):
        EncodedAnswer(boxes=(), image=PICTURE)
    for parts in (
        "",
        ',"boxes":[],"predictions":[{"index":0,"label":"a","score":1}]',
        ',"boxes":null',
    ):
        with pytest.raises(WireError, match="exactly one"):
            decode_answer(f'{{"model":{MODEL_JSON}{parts}}}'.encode())


@pytest.mark.parametrize(
    "change",
    [
        {"media_type": "image/gif"},
        {"width": 0},
        {"height": 40_000},
        {"data": "no base64!"},
        {"data": None},
        {"region": [1, 2, 3]},
        {"region": ["a", 2, 3, 4]},
        {"more": 1},
    ],
)
def test_a_picture_that_makes_no_sense_is_a_wire_error(change: dict[str, object]) -> None:
    document = msgspec.json.decode(msgspec.json.encode(PredictAnswer(model=MODEL, mask=PICTURE)))
    document["mask"] |= change
    with pytest.raises(WireError):
        decode_answer(msgspec.json.encode(document))


def test_lists_of_an_answer_are_bounded() -> None:
    for field, entry in (("predictions", ANSWER.predictions[0]), ("boxes", BOX)):  # type: ignore[index]
        entries = [msgspec.to_builtins(entry)] * (limits.MAX_TOP_K + 1)
        document = {"model": msgspec.to_builtins(MODEL), field: entries}
        with pytest.raises(WireError):
            decode_answer(msgspec.json.encode(document))


finite = st.floats(-1e9, 1e9)
token = st.text("abcdefghijklmnopqrstuvwxyz0123456789.-", min_size=1, max_size=64)


@given(
    st.builds(ModelRef, name=token, version=token, sha256=token, labels_sha256=st.none() | token),
    st.none() | st.tuples(finite, finite, finite, finite),
)
def test_what_json_says_of_a_picture_fits_into_headers(
    model: ModelRef, region: tuple[float, float, float, float] | None
) -> None:
    headers = format_picture_headers(model, region)
    lower = {name.lower(): value for name, value in headers.items()}
    assert parse_picture_headers(lower) == (model, region)
    assert all(value.isascii() and value.isprintable() for value in headers.values())


@pytest.mark.parametrize(
    "change",
    [
        {"x-model-name": None},
        {"x-model-sha256": None},
        {"x-model-version": "1" * 2000},
        {"x-region": "1,2,3"},
        {"x-region": "1,2,3,x"},
        {"x-region": "1,2,3,nan"},
        {"x-region": "1,2,3,inf"},
    ],
)
def test_picture_headers_that_make_no_sense_are_a_wire_error(
    change: dict[str, str | None],
) -> None:
    headers = {n.lower(): v for n, v in format_picture_headers(MODEL, (0, 0, 1, 1)).items()}
    changed = {name: value for name, value in (headers | change).items() if value is not None}
    with pytest.raises(WireError):
        parse_picture_headers(changed)


@pytest.mark.parametrize(
    "data",
    [b"", b"7", b"null", b'"7"', b"{}", b'{"seed":-1}', b'{"seed":1.5}', b'{"seed":"7"}',
     b'{"seed":true}', b'{"seed":7,"steps":3}', b'{"seed":9007199254740992}', b"\xff", b"[" * 200],
)  # fmt: skip
def test_a_seed_that_makes_no_sense_is_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError):
        decode_seed(data)


def test_a_seeds_body_is_bounded() -> None:
    with pytest.raises(LimitExceeded):
        decode_seed(b" " * (MAX_SEED_BODY_BYTES + 1))


@given(st.integers(0, MAX_SEED))
def test_a_seed_round_trips(seed: int) -> None:
    assert decode_seed(encode_seed(seed)) == seed
    assert encode_seed(7) == b'{"seed":7}'


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
