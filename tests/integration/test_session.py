"""Requests of ``GET /v1/session``, frame by frame over a real socket of a real broker."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from broker.server import RunningBroker
from edge_runtime.contract import limits
from edge_runtime.contract.frames import (
    Admit,
    Cancel,
    Data,
    Error,
    Frame,
    Ping,
    Pong,
    Progress,
    Reject,
    Result,
)
from edge_runtime.contract.wire import parse_picture_headers
from tests.support import broker_images as images
from tests.support.broker import broker_here, predict, until
from tests.support.servables import shared_servable
from tests.support.sessions import device, held, metric
from tests.support.tasks import task_servable

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

LARGE = images.png(1, 400, 300)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningBroker]:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(shared_servable(), folder / "tiny")
    shutil.copytree(task_servable("image_to_image"), folder / "styler")
    shutil.copytree(task_servable("generation"), folder / "generator")
    async with broker_here(folder) as running:
        yield running


# Answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"top_k": 1}])
async def test_an_answer_is_the_one_that_post_gives(broker: RunningBroker, fields: dict[str, int]):
    async with device(broker.url) as opened:
        number = await opened.ask(LARGE, request_id="dev-1.a", **fields)
        head, body = await opened.answer(number)
    query = "".join(f"?{name}={value}" for name, value in fields.items())
    posted = await predict(broker.url, LARGE, query=query)
    assert json.loads(body) == posted.json
    assert head.media_type == "application/json"
    assert head.request_id == "dev-1.a"
    assert head.queue_delay_ms is not None
    for spent_ms in (head.recv_ms, head.queue_ms, head.inference_ms):
        assert spent_ms is not None
        assert spent_ms >= 0


async def test_a_picture_comes_in_pieces_and_is_the_one_that_post_gives(broker: RunningBroker):
    model = "large-image-to-image"
    async with device(broker.url) as opened:
        number = await opened.ask(LARGE, model=model, accept="image/png")
        head, body = await opened.answer(number)
    posted = await predict(broker.url, LARGE, model=model, headers={"Accept": "image/png"})
    assert body == posted.body
    lower = {name.lower(): value for name, value in posted.headers.items()}
    assert (head.model, head.region) == parse_picture_headers(lower)
    assert head.media_type == "image/png"


async def test_a_seed_is_answered(broker: RunningBroker):
    async with device(broker.url) as opened:
        fields = {"model": "large-generation", "media_type": "application/json"}
        number = await opened.ask(b'{"seed": 7}', accept="image/png", **fields)
        _, body = await opened.answer(number)
    posted = await predict(
        broker.url,
        b'{"seed": 7}',
        model="large-generation",
        content_type="application/json",
        headers={"Accept": "image/png"},
    )
    assert body == posted.body


async def test_requests_share_a_connection_and_run_together(broker: RunningBroker):
    pictures = {seed: images.png(seed) for seed in range(1, 9)}
    before = broker.services.executor.stats()
    async with device(broker.url) as opened:
        with held(broker) as gate:
            numbers = {await opened.ask(body): seed for seed, body in pictures.items()}
            for number in numbers:
                await opened.read_until(Admit, number)
            gate.set()
            answers = {}
            while len(answers) < len(numbers):
                head = await opened.read_until(Result)
                answers[numbers[head.id]] = json.loads(head.data)
    after = broker.services.executor.stats()
    assert after.images - before.images == 8
    assert after.batches - before.batches <= 3
    for seed, body in pictures.items():
        posted = (await predict(broker.url, body)).json
        assert answers[seed]["predictions"][0]["index"] == posted["predictions"][0]["index"]


async def test_the_first_admission_comes_before_the_upload_and_progress_ends_at_its_size(
    broker: RunningBroker,
):
    async with device(broker.url) as opened:
        number = await opened.ask(LARGE, upload=False)
        assert await opened.read() == Admit(id=number)
        await opened.send(number, LARGE)
        await opened.answer(number)
        seen = [frame for frame in opened.seen if isinstance(frame, Progress)]
    assert seen[-1].received_bytes == len(LARGE)
    assert [p.received_bytes for p in seen] == sorted({p.received_bytes for p in seen})
    assert [p.t_us for p in seen] == sorted(p.t_us for p in seen)
    steps = [b.received_bytes - a.received_bytes for a, b in itertools.pairwise(seen)]
    assert all(step <= limits.MAX_DATA_BYTES + limits.PROGRESS_EVERY_BYTES for step in steps)


async def test_a_few_bytes_are_acknowledged_though_no_more_come(broker: RunningBroker):
    async with device(broker.url) as opened:
        number = await opened.ask(LARGE, upload=False)
        await opened.write(Data(id=number, offset=0, data=LARGE[:10]))
        progress = await opened.read_until(Progress)
        assert progress.received_bytes == 10
        await opened.write(Cancel(id=number))
        await opened.read_until(Cancel, number)


async def test_a_ping_comes_back(broker: RunningBroker):
    async with device(broker.url) as opened:
        await opened.write(Ping(id=77))
        assert await opened.read() == Pong(id=77, ready=True)


# Refusals before the upload -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"model": "huge"}, 404, "model_not_found"),
        ({"media_type": "text/plain"}, 415, "media_type_unsupported"),
        ({"size_bytes": 0}, 422, "image_unreadable"),
        ({"size_bytes": limits.MAX_IMAGE_BYTES + 1}, 413, "image_too_large"),
        ({"deadline_ms": 0}, 400, "wire"),
        ({"deadline_ms": 600_001}, 400, "limit_exceeded"),
        ({"deadline_ms": 1}, 504, "deadline_exceeded"),
        ({"top_k": 0}, 400, "wire"),
        ({"top_k": 1001}, 400, "limit_exceeded"),
        ({"palette": True}, 400, "wire"),
        ({"accept": "image/png"}, 400, "wire"),
        ({"accept": "x"}, 400, "wire"),
        ({"model": "large-generation"}, 415, "media_type_unsupported"),
    ],
    ids=str,
)
async def test_what_the_request_frame_can_tell_is_refused_before_the_upload(
    broker: RunningBroker, fields: dict[str, Any], status: int, code: str
):
    before = metric(broker, "nearfar_upload_bytes_total")
    async with device(broker.url) as opened:
        with held(broker):  # a busy model makes one millisecond surely too short
            if fields.get("deadline_ms") == 1:
                other = await opened.ask(LARGE)
                await opened.read_until(Admit, other)
            number = await opened.ask(LARGE, upload=False, **fields)
            refused = await opened.read_until(Reject, number)
    assert (refused.status, refused.code) == (status, code)
    assert refused.detail
    if "deadline_ms" not in fields:
        assert metric(broker, "nearfar_upload_bytes_total") == before


async def test_a_refusal_that_time_mends_says_when_to_ask_again(broker: RunningBroker):
    async with device(broker.url) as opened:
        with held(broker):
            numbers = [await opened.ask(images.png()) for _ in range(limits.MAX_SESSION_REQUESTS)]
            for number in numbers:
                await opened.read_until(Admit, number)
            crowded = await opened.ask(LARGE, upload=False)
            refused = await opened.read_until(Reject, crowded)
        assert (refused.status, refused.code, refused.retryable) == (503, "overloaded", True)
        assert refused.retry_after_ms is not None
        assert refused.retry_after_ms >= 1000
        for _ in numbers:
            await opened.read_until(Result)
        head, _ = await opened.answer(await opened.ask(LARGE))
        assert head.size_bytes > 0


async def test_a_session_announces_so_many_bytes_at_one_time(broker: RunningBroker):
    async with device(broker.url) as opened:
        numbers = []
        for _ in range(limits.MAX_SESSION_UPLOAD_BYTES // limits.MAX_IMAGE_BYTES):
            numbers.append(await opened.ask(b"", upload=False, size_bytes=limits.MAX_IMAGE_BYTES))
            await opened.read_until(Admit)
        number = await opened.ask(b"", upload=False, size_bytes=1)
        assert (await opened.read_until(Reject, number)).code == "overloaded"
        await opened.write(*(Cancel(id=number) for number in numbers))
        await opened.answer(await opened.ask(LARGE))


async def test_bytes_of_a_refused_request_are_dropped_and_the_session_lives(broker: RunningBroker):
    async with device(broker.url) as opened:
        refused = await opened.ask(LARGE, model="huge")
        await opened.read_until(Reject, refused)
        await opened.write(Cancel(id=refused))
        await opened.read_until(Cancel, refused)
        await opened.answer(await opened.ask(LARGE))


# Failures after the admission ------------------------------------------------------------------


async def test_an_image_that_is_none_fails_after_its_upload(broker: RunningBroker):
    async with device(broker.url) as opened:
        number = await opened.ask(b"junk" * 100)
        failed = await opened.read_until(Error, number)
        assert (failed.status, failed.code) == (422, "image_unreadable")
        await opened.answer(await opened.ask(LARGE))


@pytest.mark.parametrize(
    ("pieces", "code"),
    [
        ([Data(id=1, offset=0, data=bytes(90)), Data(id=1, offset=90, data=bytes(20))],
         "limit_exceeded"),
        ([Data(id=1, offset=0, data=bytes(101))], "limit_exceeded"),
        ([Data(id=1, offset=5, data=bytes(5))], "wire"),
        ([Data(id=1, offset=0, data=bytes(50)), Data(id=1, offset=0, data=bytes(50))], "wire"),
    ],
    ids=["beyond", "all beyond", "gap", "again"],
)  # fmt: skip
async def test_data_that_do_not_fit_fail_their_request_alone(
    broker: RunningBroker, pieces: list[Frame], code: str
):
    async with device(broker.url) as opened:
        number = await opened.ask(b"", upload=False, size_bytes=100)
        await opened.write(*pieces)
        failed = await opened.read_until(Error, number)
        assert (failed.status, failed.code) == (400, code)
        await opened.answer(await opened.ask(LARGE))


async def test_an_upload_ends_at_its_deadline(broker: RunningBroker):
    async with device(broker.url) as opened:
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        number = await opened.ask(LARGE, upload=False, deadline_ms=300)
        await opened.send(number, LARGE[:1000])
        failed = await opened.read_until(Error, number)
        assert (failed.status, failed.code) == (504, "deadline_exceeded")
        assert 0.25 < loop.time() - start_s < 2.0
        assert broker.services.scheduler.queued(broker.services.repository.keys[0]) == 0


async def test_an_upload_that_drips_is_ended(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(limits, "MAX_BODY_IDLE_MS", 150)
    async with device(broker.url) as opened:
        number = await opened.ask(LARGE, upload=False)
        await opened.send(number, LARGE[:1000])
        failed = await opened.read_until(Error, number)
        assert (failed.status, failed.code, failed.retryable) == (408, "upload_stalled", True)


# Cancelling ----------------------------------------------------------------------------------


async def test_a_cancel_ends_an_upload_and_the_session_goes_on(broker: RunningBroker):
    before = metric(broker, "nearfar_session_cancels_total", phase="uploading")
    async with device(broker.url) as opened:
        number = await opened.ask(LARGE, upload=False)
        await opened.read_until(Admit, number)
        await opened.send(number, LARGE[:5000])
        await opened.write(Cancel(id=number))
        await opened.read_until(Cancel, number)
        await until(lambda: broker.services.in_flight == 0)
        await opened.answer(await opened.ask(LARGE))
    assert metric(broker, "nearfar_session_cancels_total", phase="uploading") == before + 1


async def test_a_cancel_of_queued_work_leaves_the_queue_at_once(broker: RunningBroker):
    scheduler = broker.services.scheduler
    before = broker.services.executor.stats().images
    async with device(broker.url) as opened:
        with held(broker) as gate:
            first = await opened.ask(images.png(1))
            await until(lambda: scheduler._runs.running is not None)
            waiting = [await opened.ask(images.png(seed), key=f"cancel-{seed}") for seed in (2, 3)]
            key = scheduler._runs.running.model
            await until(lambda: scheduler.queued(key) == 2)
            await opened.write(*(Cancel(id=number) for number in waiting))
            await until(lambda: scheduler.queued(key) == 0)
            gate.set()
            await opened.answer(first)
        await opened.write(Ping(id=1))
        await opened.read_until(Pong)
        assert not [f for f in opened.seen if isinstance(f, Result) and f.id in waiting]
    assert broker.services.executor.stats().images == before + 1


async def test_a_cancel_after_the_end_is_harmless(broker: RunningBroker):
    async with device(broker.url) as opened:
        number = await opened.ask(LARGE)
        await opened.answer(number)
        for _ in range(2):
            await opened.write(Cancel(id=number))
            await opened.read_until(Cancel, number)
        await opened.answer(await opened.ask(LARGE))


async def test_a_lost_connection_ends_what_it_carried(broker: RunningBroker):
    scheduler = broker.services.scheduler
    with held(broker):
        async with device(broker.url) as opened:
            await opened.ask(images.png(1))
            await until(lambda: scheduler._runs.running is not None)
            await opened.ask(images.png(2))
            await opened.ask(LARGE, upload=False)
            key = scheduler._runs.running.model
            await until(lambda: scheduler.queued(key) == 2)
        await until(lambda: scheduler.queued(key) == 0)
    await until(lambda: broker.services.in_flight == 0)
    await until(lambda: len(broker.services.sessions) == 0)


# Idempotency keys -------------------------------------------------------------------------------


async def test_a_retry_gets_the_same_answer_and_nothing_runs_twice(broker: RunningBroker):
    async with device(broker.url) as opened:
        _, first = await opened.answer(await opened.ask(LARGE, key="again"))
        ran = broker.services.executor.stats().images
        number = await opened.ask(LARGE, upload=False, key="again")
        assert (await opened.read_until(Admit, number)).received_bytes == len(LARGE)
        _, second = await opened.answer(number)
    reply = await predict(broker.url, LARGE, headers={"Idempotency-Key": "again"})
    assert second == first == reply.body
    assert broker.services.executor.stats().images == ran


async def test_a_retry_after_a_lost_connection_joins_the_run_that_goes_on(broker: RunningBroker):
    scheduler = broker.services.scheduler
    ran = broker.services.executor.stats().images
    with held(broker) as gate:
        async with device(broker.url) as lost:
            await lost.ask(LARGE, key="joined")
            await until(lambda: scheduler._runs.running is not None)
        async with device(broker.url) as opened:
            number = await opened.ask(LARGE, upload=False, key="joined")
            assert (await opened.read_until(Admit, number)).received_bytes == len(LARGE)
            gate.set()
            _, body = await opened.answer(number)
    assert json.loads(body) == (await predict(broker.url, LARGE)).json
    assert broker.services.executor.stats().images == ran + 2  # one of them is the POST's


async def test_a_post_that_was_cut_off_is_joined_by_its_retry(broker: RunningBroker):
    scheduler = broker.services.scheduler
    ran = broker.services.executor.stats().images
    headers = {"Idempotency-Key": "posted"}
    with held(broker) as gate:
        cut = asyncio.create_task(predict(broker.url, LARGE, headers=headers))
        await until(lambda: scheduler._runs.running is not None)
        cut.cancel()
        await asyncio.gather(cut, return_exceptions=True)
        await until(lambda: broker.services.in_flight == 0)
        retry = asyncio.create_task(predict(broker.url, LARGE, headers=headers))
        await until(lambda: broker.services.in_flight == 1)
        gate.set()
        assert (await retry).status == 200
    assert broker.services.executor.stats().images == ran + 1


async def test_an_upload_that_never_came_whole_is_sent_again(broker: RunningBroker):
    async with device(broker.url) as lost:
        number = await lost.ask(LARGE, upload=False, key="half")
        await lost.send(number, LARGE[:5000])
        await lost.read_until(Progress)
    async with device(broker.url) as opened:
        number = await opened.ask(LARGE, upload=False, key="half")
        assert (await opened.read_until(Admit, number)).received_bytes == 0
        await opened.send(number, LARGE)
        await opened.answer(number)


async def test_one_key_for_two_requests_is_refused(broker: RunningBroker):
    async with device(broker.url) as opened:
        await opened.answer(await opened.ask(LARGE, key="mixed"))
        number = await opened.ask(images.png(5), upload=False, key="mixed")
        assert (await opened.read_until(Reject, number)).code == "wire"
    reply = await predict(broker.url, images.png(5), headers={"Idempotency-Key": "mixed"})
    assert (reply.status, reply.code) == (400, "wire")


@pytest.mark.parametrize("key", ["", "two words", "x" * 129])
async def test_a_senseless_key_is_refused(broker: RunningBroker, key: str):
    reply = await predict(broker.url, LARGE, headers={"Idempotency-Key": key})
    assert (reply.status, reply.code) == (400, "wire")
