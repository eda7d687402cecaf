"""Frames between front and worker: what goes in comes out, and junk is a typed error."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.executors import frames
from broker.executors.base import BatchItem
from broker.models.servable import ModelKey
from edge_runtime.contract.errors import (
    ImageUnreadable,
    NearfarError,
    WireError,
    error_from_code,
)
from edge_runtime.contract.tasks import Box, Prediction
from edge_runtime.contract.wire import EncodedAnswer, Picture

text = st.text(max_size=40)
predictions = st.builds(Prediction, index=st.integers(0, 10**6), label=text, score=st.floats(0, 1))
numbers = st.floats(-1e6, 1e6)
boxes = st.builds(
    Box,
    index=st.integers(0, 10**6),
    label=text,
    score=st.floats(0, 1),
    x_min=numbers,
    y_min=numbers,
    x_max=numbers,
    y_max=numbers,
)
pictures = st.builds(
    Picture,
    media_type=st.sampled_from(["image/png", "image/jpeg"]),
    width=st.integers(1, 9999),
    height=st.integers(1, 9999),
    region=st.none() | st.tuples(numbers, numbers, numbers, numbers),
    data=st.binary(max_size=99),
)
answers = st.one_of(
    st.builds(EncodedAnswer, predictions=st.lists(predictions, min_size=1, max_size=3).map(tuple)),
    st.builds(EncodedAnswer, boxes=st.lists(boxes, max_size=3).map(tuple)),
    st.builds(EncodedAnswer, mask=pictures),
    st.builds(EncodedAnswer, image=pictures),
)
to_worker = st.one_of(
    st.builds(
        frames.Load,
        servables=st.lists(st.builds(frames.ServableRef, text, text), max_size=3).map(tuple),
        device=st.sampled_from(["auto", "cpu", "cuda"]),
        threads=st.integers(1, 64),
    ),
    st.builds(
        frames.RunBatch,
        model=st.builds(ModelKey, text, text),
        items=st.lists(
            st.builds(
                BatchItem,
                st.binary(max_size=99),
                st.none() | st.integers(1, 9),
                st.sampled_from(["image/png", "image/jpeg"]),
                st.booleans(),
                st.booleans(),
                st.none() | st.lists(st.integers(0, 63), max_size=3).map(tuple),
                st.integers(0, 2**40),
                st.booleans(),
            ),
            max_size=4,
        ).map(tuple),
    ),
)
from_worker = st.one_of(
    st.builds(frames.Ready, device=text),
    st.builds(frames.Failed, code=text, detail=text),
    st.just(frames.Progress()),
    st.builds(
        frames.BatchDone,
        results=st.lists(
            st.one_of(
                st.builds(frames.Answered, answer=answers),
                st.builds(
                    frames.Tensors,
                    tensors=st.lists(st.binary(max_size=99), max_size=3).map(tuple),
                    answer=st.none() | answers,
                ),
                st.builds(frames.Failure, code=text, detail=text),
            ),
            max_size=4,
        ).map(tuple),
    ),
)


def payload_of(frame: bytes) -> bytes:
    assert frames.frame_length(frame[: frames.HEADER_BYTES]) == len(frame) - frames.HEADER_BYTES
    return frame[frames.HEADER_BYTES :]


@given(to_worker)
def test_frames_to_the_worker_come_out_as_they_went_in(message: frames.ToWorker):
    assert frames.decode_to_worker(payload_of(frames.encode_frame(message))) == message


@given(from_worker)
def test_frames_from_the_worker_come_out_as_they_went_in(message: frames.FromWorker):
    assert frames.decode_from_worker(payload_of(frames.encode_frame(message))) == message


@given(st.binary(max_size=200))
def test_junk_is_a_wire_error_or_a_frame_and_nothing_else(payload: bytes):
    for decode in (frames.decode_to_worker, frames.decode_from_worker):
        with contextlib.suppress(WireError):
            decode(payload)


@pytest.mark.parametrize("header", [b"", b"\0\0\0", b"\xff\xff\xff\xff"])
def test_a_header_out_of_bounds_is_refused(header: bytes):
    with pytest.raises(WireError):
        frames.frame_length(header)


def test_an_error_crosses_the_border_as_its_own_class():
    original = ImageUnreadable("broken")
    back = frames.result_of(frames.to_result(original))
    assert type(back) is ImageUnreadable
    assert back.detail == "broken"


@given(text, text)
def test_an_unknown_code_is_the_root_class_and_no_exception(code: str, detail: str):
    assert isinstance(error_from_code(code, detail), NearfarError)
