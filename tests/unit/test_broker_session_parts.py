"""The parts of a broker's session: what it writes when, and what it acknowledges."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker.http.sessions.outbox import Outbox, SlowReader
from broker.http.sessions.registry import is_news
from broker.http.sessions.upload import SessionUpload
from broker.telemetry import Telemetry
from edge_runtime.contract import limits
from edge_runtime.contract.errors import LimitExceeded, WireError
from edge_runtime.contract.frames import (
    Admit,
    Cancel,
    Data,
    Frame,
    Progress,
    Request,
    Result,
    decode_frame,
)


class Wire:
    """Takes what an outbox writes."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    async def send_bytes(self, message: bytes) -> None:
        self.frames.append(decode_frame(message))


def outbox() -> Outbox:
    return Outbox(Telemetry())


async def written(full: Outbox) -> list[Frame]:
    wire: Any = Wire()
    writing = asyncio.create_task(full.run(wire))
    while not full.empty:  # noqa: ASYNC110
        await asyncio.sleep(0)
    writing.cancel()
    return list(wire.frames)


def head(number: int, body: bytes) -> Result:
    return Result(id=number, media_type="a", size_bytes=len(body))


async def test_small_frames_overtake_answers_and_a_newer_progress_replaces_an_older_one() -> None:
    full = outbox()
    full.add_answer(head(1, b"xy"), b"xy", 3)
    full.add_progress(Progress(id=2, received_bytes=1, t_us=1))
    full.add_progress(Progress(id=2, received_bytes=9, t_us=2))
    full.add(Cancel(id=3))
    assert await written(full) == [
        Cancel(id=3),
        Progress(id=2, received_bytes=9, t_us=2),
        Result(id=1, media_type="a", size_bytes=2, data=b"xy"),
    ]


async def test_answers_of_one_priority_take_turns_and_come_whole() -> None:
    full, bodies = outbox(), {1: b"a" * 40_000, 2: b"b" * 40_000}
    for number, body in bodies.items():
        full.add_answer(head(number, body), body, 3)
    frames = await written(full)
    assert [frame.id for frame in frames if isinstance(frame, Result | Data)] == [1, 2] * 3
    for number, body in bodies.items():
        pieces = [f.data for f in frames if isinstance(f, Result | Data) and f.id == number]
        assert b"".join(pieces) == body


async def test_an_urgent_answer_goes_first_and_an_empty_one_goes_at_all() -> None:
    full = outbox()
    full.add_answer(head(1, b"x" * 50_000), b"x" * 50_000, 3)
    full.add_answer(head(2, b""), b"", 0)
    frames = await written(full)
    assert isinstance(frames[0], Result)
    assert (frames[0].id, frames[0].size_bytes) == (2, 0)


async def test_what_nobody_wants_is_not_written() -> None:
    full = outbox()
    full.add_answer(head(1, b"x" * 50_000), b"x" * 50_000, 3)
    full.add_progress(Progress(id=1, received_bytes=1, t_us=1))
    full.drop(1)
    assert await written(full) == []


async def test_a_device_that_reads_too_little_is_found_out() -> None:
    full = outbox()
    body = bytes(limits.MAX_ANSWER_BYTES)
    for number in range(1, limits.MAX_SESSION_ANSWER_BYTES // len(body) + 1):
        full.add_answer(head(number, body), body, 3)
    with pytest.raises(SlowReader):
        full.add_answer(head(9, body), body, 3)
    full = outbox()

    def add_many() -> None:
        for number in range(1, 10_000):
            full.add(Cancel(id=number))

    with pytest.raises(SlowReader):
        add_many()


class Upload:
    """A body of so many bytes, and what was said about it."""

    def __init__(self, size_bytes: int) -> None:
        self.said: list[Frame] = []
        asked = Request(id=1, model="m", media_type="a", size_bytes=size_bytes)
        self.body = SessionUpload(asked, 100.0, self.said.append, self.said.append)

    def feed(self, offset: int, size: int, at_s: float) -> None:
        self.body.feed(Data(id=1, offset=offset, data=bytes(size)), at_s)


async def test_progress_waits_for_the_admission_then_names_what_came_and_when() -> None:
    upload = Upload(30_000)
    upload.feed(0, 10_000, 100.02)
    assert upload.said == []
    await upload.body.begin()
    assert upload.said == [Admit(id=1), Progress(id=1, received_bytes=10_000, t_us=20_000)]
    upload.feed(10_000, 8191, 100.03)
    assert len(upload.said) == 2
    upload.feed(18_191, 1, 100.04)
    assert upload.said[2:] == [Progress(id=1, received_bytes=18_192, t_us=40_000)]
    upload.feed(18_192, 11_808, 100.05)
    assert upload.said[3:] == [Progress(id=1, received_bytes=30_000, t_us=50_000)]
    assert upload.body.complete


async def test_few_bytes_are_named_a_little_later_with_the_time_at_which_they_came() -> None:
    upload = Upload(30_000)
    await upload.body.begin()
    upload.feed(0, 100, 100.5)
    await asyncio.sleep(3 * limits.PROGRESS_EVERY_MS / 1e3)
    assert upload.said[1:] == [Progress(id=1, received_bytes=100, t_us=500_000)]
    upload.feed(100, 100, 100.6)
    upload.body.close()
    await asyncio.sleep(3 * limits.PROGRESS_EVERY_MS / 1e3)
    assert len(upload.said) == 2


async def test_what_came_is_read_in_order_and_then_the_end() -> None:
    upload = Upload(3)
    for offset in range(3):
        upload.feed(offset, 1, 100.0)
    assert [await upload.body.read_piece() for _ in range(4)] == [b"\0", b"\0", b"\0", b""]


@pytest.mark.parametrize(
    ("offset", "size", "error"), [(1, 1, WireError), (0, 4, LimitExceeded)], ids=["gap", "beyond"]
)
async def test_what_does_not_fit_is_an_error_after_what_did(
    offset: int, size: int, error: type[Exception]
) -> None:
    upload = Upload(3)
    upload.feed(offset, size, 100.0)
    with pytest.raises(error):
        await upload.body.read_piece()


@pytest.mark.parametrize(
    ("told_ms", "now_ms", "news"),
    [(0, 20, False), (0, 21, True), (400, 500, False), (400, 501, True), (400, 290, True)],
)
def test_a_queue_delay_is_news_when_it_differs_by_a_quarter_and_20_ms(
    told_ms: int, now_ms: int, news: bool
) -> None:
    assert is_news(told_ms, now_ms) is news
