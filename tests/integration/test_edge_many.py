"""Many images and video frames through a real runtime."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from edge_runtime import Bundle, ConfigError, EdgeRuntime, ImageError, NearfarError, Result
from edge_runtime.testing import HttpRequest, HttpResponse, ScriptedTransport
from edge_runtime.video import answer_video, answer_video_async
from tests.support.bundles import LABELS, photo, tiny_bundle

pytestmark = pytest.mark.slow
BUNDLE = Bundle.open(tiny_bundle())


def named(transport_delay_ms: float = 0.0) -> tuple[ScriptedTransport, list[bytes]]:
    """A cloud that answers the n-th different photo with the n-th label."""
    photos = [photo(seed, width=64, height=48) for seed in range(len(LABELS))]
    sizes = {len(one): label for one, label in zip(photos, LABELS, strict=True)}
    assert len(sizes) == len(LABELS)
    transport = ScriptedTransport.for_bundle(
        BUNDLE, lambda body: sizes[len(body)], delay_ms=transport_delay_ms
    )
    return transport, photos


def cloud(transport: ScriptedTransport) -> EdgeRuntime:
    made = EdgeRuntime(BUNDLE, policy="ONLY_IN_CLOUD", transport=transport, deadline_ms=5000)
    made.prewarm(wait_ms=2000)
    return made


def labels(answers: list[Result | NearfarError]) -> list[str | None]:
    return [answer.label if isinstance(answer, Result) else answer.code for answer in answers]


def test_answers_come_in_order_and_an_image_that_fails_is_a_value() -> None:
    transport, photos = named()
    images = [*photos[:4], b"no image", *photos[4:]]
    with cloud(transport) as edge:
        found = labels(list(edge.run_many(images, concurrency=3)))
        assert found == [*LABELS[:4], "image_unreadable", *LABELS[4:]]
        assert list(edge.run_many([])) == []
        assert edge.status().counts.in_cloud == 10


def test_no_more_are_under_way_than_asked_for_and_nothing_is_read_ahead() -> None:
    transport, photos = named(transport_delay_ms=40)
    read: list[int] = []

    def counted() -> Iterator[bytes]:
        for number, one in enumerate(photos):
            read.append(number)
            yield one

    with cloud(transport) as edge:
        answers = edge.run_many(counted(), concurrency=3)
        assert read == []
        for given in range(len(photos)):
            next(answers)
            assert len(read) <= given + 3
        assert list(answers) == []
        started = time.monotonic()
        list(edge.run_many(photos[:6], concurrency=6))
        assert time.monotonic() - started < 6 * 0.04, "they overlap"


def test_deadlines_hold_while_nobody_asks_for_the_next_answer() -> None:
    transport, photos = named(transport_delay_ms=5000)
    with EdgeRuntime(
        BUNDLE, transport=transport, policy="PREFER_IN_CLOUD", variant="tflite-fp32"
    ) as edge:
        edge.prewarm(wait_ms=2000)
        answers = edge.run_many(photos[:3], deadline_ms=150, concurrency=3)
        first = next(answers)
        time.sleep(0.5)
        rest = list(answers)
        for answer in (first, *rest):
            assert isinstance(answer, Result)
            assert answer.deadline_met
            assert answer.timings.total_ms <= 150


def test_an_iterator_that_is_left_ends_what_is_under_way() -> None:
    quick, photos = named()

    async def handle(request: HttpRequest) -> HttpResponse:
        if request.body not in (b"", photos[0]):
            await asyncio.sleep(60)
        return await quick.send(request)

    with cloud(ScriptedTransport(handle)) as edge:
        answers = edge.run_many(photos, deadline_ms=60_000, concurrency=3)
        assert labels([next(answers)]) == [LABELS[0]]
        started = time.monotonic()
        answers.close()
        assert time.monotonic() - started < 5
        assert not [t for t in threading.enumerate() if t.name.startswith("nearfar-many")]
        assert 1 <= edge.status().counts.requests <= 3, "no fourth one was begun"


@pytest.mark.parametrize("concurrency", [0, 65, -1])
def test_senseless_arguments_are_refused_before_the_first_image(concurrency: int) -> None:
    with EdgeRuntime(BUNDLE, variant="tflite-fp32") as edge:
        with pytest.raises(ConfigError, match="concurrency"):
            edge.run_many([], concurrency=concurrency)
        with pytest.raises(ConfigError, match="deadline_ms"):
            edge.run_many([], deadline_ms=0)
        with pytest.raises(ConfigError, match="concurrency"):
            edge.arun_many([], concurrency=concurrency)


async def test_the_same_for_event_loops() -> None:
    transport, photos = named(transport_delay_ms=20)

    async def feed() -> AsyncIterator[bytes]:
        for one in photos:
            await asyncio.sleep(0)
            yield one

    async with await asyncio.to_thread(cloud, transport) as edge:
        one = [answer async for answer in edge.arun_many(feed(), concurrency=3)]
        two = [answer async for answer in edge.arun_many([*photos, b"x"], concurrency=3)]
        assert labels(one) == [*LABELS]
        assert labels(two) == [*LABELS, "image_unreadable"]
        early = edge.arun_many(photos, concurrency=4)
        assert isinstance(await anext(early), Result)
        await early.aclose()
        before = edge.status().counts.requests
        await asyncio.sleep(0.1)
        assert edge.status().counts.requests == before


# Video ----------------------------------------------------------------------------------


def camera(count: int, interval_s: float) -> Iterator[tuple[float, bytes]]:
    images = [photo(seed) for seed in range(4)]
    for number in range(count):
        time.sleep(interval_s)
        yield time.monotonic(), images[number % 4]


def test_a_camera_faster_than_the_model_loses_frames_and_gains_no_lag() -> None:
    """The fp32 file takes tens of milliseconds, a frame comes every 5."""
    slow = Bundle.open(tiny_bundle(slow_fp32_layers=3))
    with EdgeRuntime(slow, variant="tflite-fp32") as edge:
        video = answer_video(edge, camera(60, 0.005), deadline_ms=2000)
        answers = list(video)
    counts = video.counts
    assert counts.offered == 60
    assert counts.replaced > 0
    assert counts.taken == len(answers)
    assert counts.offered == counts.taken + counts.replaced + counts.too_late
    numbers = [answer.number for answer in answers]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 59, "the newest frame is answered"
    for answer in answers:
        assert answer.error is None
        assert answer.result is not None
        assert answer.latency_ms <= 2000
        assert answer.result.deadline_met


def test_a_dead_broker_delays_no_frame_past_its_deadline() -> None:
    transport = ScriptedTransport.for_bundle(BUNDLE, lambda _: "cat", delay_ms=60_000)
    with EdgeRuntime(
        BUNDLE, transport=transport, policy="PREFER_IN_CLOUD", variant="tflite-fp32"
    ) as edge:
        edge.prewarm(wait_ms=2000)
        with answer_video(edge, camera(12, 0.04), deadline_ms=200) as video:
            answers = [answer for answer in video if answer.result is not None]
    assert len(answers) >= 2
    assert max(answer.latency_ms for answer in answers) <= 200 + 50, "scheduling aside"


def test_what_the_camera_raises_comes_after_the_frames_before_it() -> None:
    def broken() -> Iterator[tuple[float, bytes]]:
        yield time.monotonic(), photo(0)
        yield time.monotonic(), b"no image"
        time.sleep(0.3)
        raise RuntimeError("the lens cap")

    with EdgeRuntime(BUNDLE, variant="tflite-fp32") as edge:
        video = answer_video(edge, broken(), deadline_ms=5000)
        answers = []
        with pytest.raises(RuntimeError, match="the lens cap"):
            answers.extend(video)
        assert isinstance(answers[-1].error, ImageError)
        assert next(video, None) is None


def test_a_video_that_is_closed_reads_no_further_frame() -> None:
    seen: list[float] = []

    def endless() -> Iterator[tuple[float, bytes]]:
        while True:
            seen.append(time.monotonic())
            yield seen[-1], photo(0)
            time.sleep(0.01)

    with EdgeRuntime(BUNDLE, variant="tflite-fp32") as edge:
        with answer_video(edge, endless(), deadline_ms=1000) as video:
            assert next(video).result is not None
        time.sleep(0.1)
        before = len(seen)
        time.sleep(0.1)
        assert len(seen) == before
        assert not [t for t in threading.enumerate() if t.name == "nearfar-frames"]


async def test_a_video_in_an_event_loop() -> None:
    async def frames() -> AsyncIterator[tuple[float, bytes]]:
        for number in range(30):
            await asyncio.sleep(0.005)
            yield time.monotonic(), photo(number % 4)

    async with await asyncio.to_thread(EdgeRuntime, BUNDLE, variant="tflite-fp32") as edge:
        video = answer_video_async(edge, frames(), deadline_ms=1000)
        answers = [answer async for answer in video]
        assert answers[-1].number == 29
        assert video.counts.taken == len(answers)

        async with answer_video_async(edge, frames(), deadline_ms=1000) as video:
            assert (await anext(video)).result is not None
        with pytest.raises(StopAsyncIteration):
            await anext(video)


async def test_what_an_asynchronous_camera_raises_comes_after_the_frames_before_it() -> None:
    async def broken() -> AsyncIterator[tuple[float, bytes]]:
        yield time.monotonic(), photo(0)
        await asyncio.sleep(0.3)
        raise RuntimeError("the lens cap")

    async with await asyncio.to_thread(EdgeRuntime, BUNDLE, variant="tflite-fp32") as edge:
        video = answer_video_async(edge, broken(), deadline_ms=5000)
        assert (await anext(video)).number == 0
        with pytest.raises(RuntimeError, match="the lens cap"):
            await anext(video)
