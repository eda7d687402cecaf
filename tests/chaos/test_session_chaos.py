"""Sessions under random frames, cuts and cancels: typed ends, and nothing is left behind."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio

from broker.server import RunningBroker
from edge_runtime.contract.errors import DeadlineExceeded, NetworkUnreachable
from edge_runtime.contract.frames import (
    SESSION_PATH,
    SUBPROTOCOL,
    Cancel,
    Data,
    Hello,
    Request,
    encode_frame,
)
from edge_runtime.offload.client import AiohttpTransport
from edge_runtime.offload.messages import models_request, predict_request
from edge_runtime.offload.session_transport import SessionTransport
from edge_runtime.simulation.links import steady
from edge_runtime.simulation.relay import Relay
from mobile_samples.conformance.frames import EXAMPLES
from tests.support import broker_images as images
from tests.support.broker import broker_here, predict, until
from tests.support.servables import shared_servable

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker() -> AsyncIterator[RunningBroker]:
    async with broker_here(shared_servable()) as running:
        yield running


async def nothing_is_left(broker: RunningBroker) -> None:
    services = broker.services
    await until(lambda: len(services.sessions) == 0)
    await until(lambda: services.in_flight == 0)
    await until(lambda: services.scheduler.upload_bytes == 0)
    assert [services.scheduler.queued(key) for key in services.repository.keys] == [0]
    assert (await predict(broker.url, images.png())).status == 200


def senseless(draw: random.Random) -> bytes:
    kind = draw.random()
    number = draw.randrange(1, 6)
    if kind < 0.3:
        asked = Request(
            id=number,
            model="tiny",
            media_type="image/png",
            size_bytes=draw.choice([1, 100, 5000]),
            deadline_ms=draw.choice([1, 50, 1000]),
            key=draw.choice([None, "a", "b"]),
        )
        return encode_frame(asked)
    if kind < 0.5:
        data = bytes(draw.choice([1, 100, 5000]))
        return encode_frame(Data(id=number, offset=draw.choice([0, 0, 100]), data=data))
    if kind < 0.6:
        return encode_frame(Cancel(id=number))
    if kind < 0.8:
        damaged = bytearray(encode_frame(draw.choice(EXAMPLES)))
        damaged[draw.randrange(len(damaged))] ^= draw.randrange(256)
        return bytes(damaged)
    return draw.randbytes(draw.randrange(40))


async def babble(url: str, draw: random.Random) -> None:
    async with (
        aiohttp.ClientSession() as client,
        client.ws_connect(url + SESSION_PATH, protocols=(SUBPROTOCOL,)) as connection,
    ):
        try:
            if draw.random() < 0.9:
                await connection.send_bytes(encode_frame(Hello()))
            for _ in range(draw.randrange(12)):
                await connection.send_bytes(senseless(draw))
                if draw.random() < 0.2:
                    await asyncio.sleep(0.002)
        except aiohttp.ClientConnectionResetError:
            return
        if draw.random() < 0.3:
            connection._conn.transport.abort()


async def test_any_frames_leave_a_broker_that_serves(
    broker: RunningBroker, caplog: pytest.LogCaptureFixture
):
    draw = random.Random(7)
    with caplog.at_level(logging.ERROR):
        for _ in range(200):
            await babble(broker.url, draw)
        await nothing_is_left(broker)
    assert caplog.records == []


async def test_cuts_and_cancels_end_typed_and_leave_nothing(
    broker: RunningBroker, caplog: pytest.LogCaptureFixture
):
    draw = random.Random(8)
    ends: Counter[object] = Counter()
    bodies = [images.png(), images.png(1, 400, 300), b"junk" * 10]
    places = asyncio.Semaphore(12)
    port = int(broker.url.rpartition(":")[2])
    link = steady(uplink_mbps=30.0, downlink_mbps=30.0, rtt_ms=10.0)

    async with Relay("127.0.0.1", port, link) as relay:
        transport = SessionTransport(AiohttpTransport(relay.url), api_key=None)
        await transport.send(models_request(None))

        async def cut() -> None:
            while True:
                await asyncio.sleep(draw.uniform(0.3, 1.0))
                for connection in tuple(relay._open):
                    connection.abort()

        async def ask() -> None:
            async with places:
                request = predict_request(
                    "tiny", draw.choice(bodies), "image/png", draw.choice([300, 3000]), None
                )
                task = asyncio.create_task(transport.send(request))
                if draw.random() < 0.3:
                    await asyncio.sleep(draw.uniform(0, 0.1))
                    task.cancel()
                (end,) = await asyncio.gather(task, return_exceptions=True)
                ends[type(end) if isinstance(end, BaseException) else end.status] += 1

        with caplog.at_level(logging.ERROR):
            cutting = asyncio.create_task(cut())
            await asyncio.gather(*(ask() for _ in range(150)))
            cutting.cancel()
            session = transport._session
            if session is not None:
                await until(lambda: session.ended.is_set() or not session._multiplexer._leaving)
                if not session.ended.is_set():
                    assert session._multiplexer.open == {}
                    assert session._multiplexer.window.in_flight_bytes == 0
            await transport.aclose()
            await nothing_is_left(broker)
    assert caplog.records == []
    assert ends[200] > 0
    for end in ends:
        known = end in (200, 408, 422, 503, 504) or end is asyncio.CancelledError
        assert known or issubclass(end, NetworkUnreachable | DeadlineExceeded), ends
