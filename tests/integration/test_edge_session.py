"""The device's end of a session: real broker, real sockets, an emulated link between them."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from aiohttp import web

from broker.server import RunningBroker
from edge_runtime.contract import limits
from edge_runtime.contract.errors import NetworkUnreachable
from edge_runtime.contract.frames import SESSION_PATH, SUBPROTOCOL
from edge_runtime.contract.wire import decode_answer, decode_problem
from edge_runtime.offload.client import AiohttpTransport
from edge_runtime.offload.messages import health_request, models_request, predict_request
from edge_runtime.offload.session_transport import SessionTransport
from edge_runtime.offload.transport import HttpResponse, UploadReceipt
from edge_runtime.simulation.links import LinkSchedule, LinkSegment
from edge_runtime.simulation.relay import Relay
from tests.support import broker_images as images
from tests.support.broker import broker_here, until
from tests.support.certificates import certificate
from tests.support.servables import shared_servable
from tests.support.sessions import held, linked, metric, noise

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


BIG = noise(300_000)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker() -> AsyncIterator[RunningBroker]:
    async with broker_here(shared_servable()) as running:
        yield running


@contextlib.asynccontextmanager
async def session(url: str, **options: Any) -> AsyncIterator[SessionTransport]:
    """A transport with its session open."""
    transport = SessionTransport(AiohttpTransport(url), api_key=None, **options)
    try:
        await transport.send(models_request(None))
        await until(lambda: transport.session_open)
        yield transport
    finally:
        await transport.aclose()


async def upload(
    transport: Any, body: bytes, deadline_ms: int = 20_000, receipt: UploadReceipt | None = None
) -> HttpResponse:
    request = predict_request("tiny", body, "image/png", deadline_ms, None, receipt=receipt)
    response: HttpResponse = await transport.send(request)
    return response


async def seconds(work: Callable[[], Awaitable[HttpResponse]]) -> float:
    start_s = time.perf_counter()
    assert (await work()).status == 200
    return time.perf_counter() - start_s


# Answers ------------------------------------------------------------------------------------


async def test_an_answer_is_the_one_that_post_gives(broker: RunningBroker):
    http = AiohttpTransport(broker.url)
    posted = await upload(http, BIG)
    receipt = UploadReceipt()
    async with session(broker.url) as transport:
        answer = await upload(transport, BIG, receipt=receipt)
    await http.aclose()
    assert decode_answer(answer.body) == decode_answer(posted.body)
    assert set(answer.headers) >= {"content-type", "server-timing", "x-queue-delay-ms"}
    assert (receipt.multiplexed, receipt.sent_bytes) == (True, len(BIG))


async def test_a_refusal_is_the_one_that_post_gives_and_costs_no_upload(broker: RunningBroker):
    request = predict_request("huge", BIG, "image/png", 5000, None, receipt=UploadReceipt())
    http = AiohttpTransport(broker.url)
    posted = await http.send(request)
    await http.aclose()
    async with linked(broker, 2.0, 40.0) as relay, session(relay.url) as transport:
        before = relay.stats().uplink_bytes
        refused = await transport.send(request)
        await asyncio.sleep(0.3)
        crossed = relay.stats().uplink_bytes - before
    assert refused.status == posted.status == 404
    ours, theirs = decode_problem(refused.body), decode_problem(posted.body)
    assert ours is not None
    assert theirs is not None
    assert (ours.code, ours.detail) == (theirs.code, theirs.detail)
    assert crossed < limits.SESSION_WINDOW_BYTES + 1024


# What a cancel saves, and what the window costs ------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
async def test_a_cancel_saves_all_but_32_kb_of_what_had_not_crossed(
    broker: RunningBroker, share: float
):
    async with linked(broker, 2.0, 50.0) as relay, session(relay.url) as transport:
        await upload(transport, images.png())
        receipt, before = UploadReceipt(), relay.stats().uplink_bytes
        task = asyncio.create_task(upload(transport, BIG, receipt=receipt))
        await until(lambda: relay.stats().uplink_bytes - before > share * len(BIG))
        crossed = relay.stats().uplink_bytes - before
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert len(BIG) - receipt.sent_bytes >= len(BIG) - crossed - 32 * 1024
        connections = relay.stats().connections
        answer = await upload(transport, images.png(2))
        total = relay.stats().uplink_bytes - before - len(images.png(2))
        assert answer.status == 200
        assert relay.stats().connections == connections
    assert total - crossed <= 32 * 1024
    assert receipt.received_bytes <= crossed


async def test_the_window_costs_a_fast_far_link_little(broker: RunningBroker):
    """Against a plain POST over a warm connection: 50 Mbit/s, 80 ms."""
    best = 0.0
    async with linked(broker, 50.0, 80.0) as relay:
        http = AiohttpTransport(relay.url)
        async with session(relay.url) as transport:
            await upload(http, BIG)
            await upload(transport, BIG)
            for _ in range(4):  # a stalled machine disturbs either
                posted_s = await seconds(lambda: upload(http, BIG))
                session_s = await seconds(lambda: upload(transport, BIG))
                best = max(best, posted_s / session_s)
                if best >= 0.85:
                    break
        await http.aclose()
    assert best >= 0.85


async def test_two_uploads_share_a_link_fairly(broker: RunningBroker):
    async with linked(broker, 4.0, 40.0) as relay, session(relay.url) as transport:
        receipts = [UploadReceipt(), UploadReceipt()]
        tasks = [asyncio.create_task(upload(transport, BIG, receipt=r)) for r in receipts]
        await until(lambda: relay.stats().uplink_bytes > len(BIG))
        live = transport._session._multiplexer.open.values()
        received = sorted(sending.received_bytes for sending in live)
        assert len(received) == 2
        assert received[1] - received[0] <= 32 * 1024
        assert [(await task).status for task in tasks] == [200, 200]


async def test_a_small_image_does_not_wait_behind_a_large_one(broker: RunningBroker):
    small = images.png(3)
    async with linked(broker, 2.0, 40.0) as relay, session(relay.url) as transport:
        large = asyncio.create_task(upload(transport, BIG))
        await until(lambda: relay.stats().uplink_bytes > len(BIG) / 4)
        assert (await upload(transport, small)).status == 200
        assert not large.done()
        assert (await large).status == 200


# Measurements ------------------------------------------------------------------------------


class Heard:
    def __init__(self) -> None:
        self.rates: list[float] = []
        self.round_trips: list[float] = []
        self.delays: list[float] = []

    def round_trip(self, rtt_ms: float) -> None:
        self.round_trips.append(rtt_ms)

    def rate(self, bytes_per_s: float) -> None:
        self.rates.append(bytes_per_s)

    def queue_delay(self, delay_ms: float) -> None:
        self.delays.append(delay_ms)


async def test_rate_and_round_trip_are_those_of_the_link(broker: RunningBroker):
    heard = Heard()
    async with linked(broker, 2.0, 60.0) as relay, session(relay.url) as transport:
        transport._session._listener = heard
        receipt = UploadReceipt()
        await upload(transport, BIG, receipt=receipt)
        await transport.send(health_request(None))
    assert receipt.rate_reported
    assert len(heard.rates) >= 3
    assert np.median(heard.rates) == pytest.approx(250_000, rel=0.15)
    assert heard.round_trips == [pytest.approx(60, abs=40)] * 2  # ADMIT's and PONG's
    assert len(heard.delays) >= 1


async def test_an_idle_session_wakes_nobody(broker: RunningBroker):
    async with session(broker.url) as transport:
        await upload(transport, images.png())
        await asyncio.sleep(0.05)
        loop: Any = asyncio.get_running_loop()
        turns, run_once = 0, loop._run_once

        def counted() -> None:
            nonlocal turns
            turns += 1
            run_once()

        loop._run_once = counted
        try:
            await asyncio.sleep(0.6)
        finally:
            del loop._run_once
    assert turns <= 8  # the broker in this loop looks around four times a second


# Faults --------------------------------------------------------------------------------------


async def test_a_request_survives_a_network_change_and_runs_once(broker: RunningBroker):
    ran = broker.services.executor.stats().images
    async with linked(broker, 20.0, 20.0) as relay, session(relay.url) as transport:
        first = transport._session
        with held(broker) as gate:
            task = asyncio.create_task(upload(transport, images.png(5)))
            await until(lambda: broker.services.scheduler._runs.running is not None)
            for connection in tuple(relay._open):
                connection.abort()
            await until(lambda: transport._session is not first and transport.session_open)
            gate.set()
            answer = await task
        assert answer.status == 200
        assert transport.session_open
    assert broker.services.executor.stats().images == ran + 1


async def test_an_upload_that_was_cut_is_sent_again(broker: RunningBroker):
    async with linked(broker, 4.0, 20.0) as relay, session(relay.url) as transport:
        task = asyncio.create_task(upload(transport, BIG))
        await until(lambda: relay.stats().uplink_bytes > len(BIG) / 2)
        for connection in tuple(relay._open):
            connection.abort()
        assert (await task).status == 200


async def test_a_second_loss_is_an_error(broker: RunningBroker):
    async with linked(broker, 2.0, 20.0) as relay, session(relay.url) as transport:
        task = asyncio.create_task(upload(transport, BIG))
        for _ in range(2):
            sofar = relay.stats().uplink_bytes
            await until(lambda sofar=sofar: relay.stats().uplink_bytes > sofar + 50_000)
            for connection in tuple(relay._open):
                connection.abort()
        with pytest.raises(NetworkUnreachable):
            await task


async def test_a_broker_that_goes_away_is_a_typed_error():
    async with broker_here(shared_servable(), drain_timeout_s=0.2) as stopping:
        transport = SessionTransport(AiohttpTransport(stopping.url), api_key=None)
        await transport.send(models_request(None))
        await until(lambda: transport.session_open)
        with held(stopping):
            task = asyncio.create_task(upload(transport, images.png(), 3000))
            await until(lambda: stopping.services.scheduler._runs.running is not None)
            stopping.services.sessions.drain()
            await until(lambda: not transport.session_open)
            await stopping.services.scheduler.close()
            refused = await task
    problem = decode_problem(refused.body)
    assert problem is not None
    assert (refused.status, problem.code, problem.retryable) == (503, "overloaded", True)
    with pytest.raises(NetworkUnreachable):
        await upload(transport, images.png(), 1000)
    await transport.aclose()


async def test_a_wrong_key_is_told_and_the_session_is_not_tried_again_and_again(
    broker: RunningBroker,
):
    async with session(broker.url) as transport:
        live = transport._session
        await live._connection.send_bytes(b"\xff")  # the broker ends it and says why
        await live.ended.wait()
        assert live.refusal is not None
        await until(lambda: transport._session is None)
        assert (await upload(transport, images.png())).status == 200
        await asyncio.sleep(0.05)
        assert not transport.session_open


async def test_a_path_that_fell_silent_is_found_out_and_given_up(broker: RunningBroker):
    port = int(broker.url.rpartition(":")[2])
    good = LinkSegment(duration_s=1.0, uplink_mbps=20, downlink_mbps=20, rtt_ms=10)
    outage = LinkSegment(duration_s=600, uplink_mbps=0, downlink_mbps=0, rtt_ms=10)
    schedule = LinkSchedule((good, outage))
    async with Relay("127.0.0.1", port, schedule) as relay, session(relay.url) as transport:
        silent = transport._session
        await until(lambda: relay.stats().elapsed_s > 1.0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.2):
                await upload(transport, images.png())
        assert not transport.session_open  # doubted: other images go by POST
        await until(silent.ended.is_set)
        await until(lambda: transport._session is None)


async def test_a_ping_finds_a_dead_path(broker: RunningBroker):
    port = int(broker.url.rpartition(":")[2])
    good = LinkSegment(duration_s=1.0, uplink_mbps=20, downlink_mbps=20, rtt_ms=10)
    outage = LinkSegment(duration_s=600, uplink_mbps=0, downlink_mbps=0, rtt_ms=10)
    async with (
        Relay("127.0.0.1", port, LinkSchedule((good, outage))) as relay,
        session(relay.url) as transport,
    ):
        silent = transport._session
        await until(lambda: relay.stats().elapsed_s > 1.0)
        with pytest.raises(TimeoutError):  # by HTTP then, which is as dead
            async with asyncio.timeout(2.5):
                await transport.send(health_request(None))
        assert silent.ended.is_set()
        assert not transport.session_open


async def test_a_quick_cancel_raises_no_doubt(broker: RunningBroker):
    async with linked(broker, 2.0, 50.0) as relay, session(relay.url) as transport:
        await asyncio.sleep(1.2)
        task = asyncio.create_task(upload(transport, BIG))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert transport.session_open


async def test_another_network_makes_a_session_prove_itself(broker: RunningBroker):
    async with linked(broker, 2.0, 50.0) as relay, session(relay.url) as transport:
        await transport.path_changed()
        assert not transport.session_open
        await until(lambda: transport.session_open)
        assert relay.stats().connections == 1


@contextlib.asynccontextmanager
async def old_broker(status: int, broker: RunningBroker) -> AsyncIterator[tuple[str, list[str]]]:
    """A proxy before the broker that answers the upgrade itself."""
    import aiohttp

    paths: list[str] = []

    async def pass_on(request: web.Request) -> web.StreamResponse:
        paths.append(request.path)
        if request.path == SESSION_PATH:
            return web.Response(status=status, text="no")
        body = await request.read()
        headers = {k: v for k, v in request.headers.items() if k not in ("Host", "Content-Length")}
        async with (
            aiohttp.ClientSession() as client,
            client.request(
                request.method, broker.url + request.path, data=body or None, headers=headers
            ) as answer,
        ):
            return web.Response(
                status=answer.status, body=await answer.read(), content_type=answer.content_type
            )

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", pass_on)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", paths
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("status", [200, 400, 404, 405, 426, 501, 502])
async def test_where_the_upgrade_is_refused_post_serves(broker: RunningBroker, status: int):
    async with old_broker(status, broker) as (url, paths):
        transport = SessionTransport(AiohttpTransport(url), api_key=None)
        await transport.send(models_request(None))
        await until(lambda: SESSION_PATH in paths and transport._opening is None)
        for _ in range(3):
            assert (await upload(transport, images.png())).status == 200
        assert not transport.session_open
        await transport.aclose()
    assert paths.count(SESSION_PATH) == 1  # not asked again for a minute
    assert paths.count("/v1/models/tiny:predict") == 3


async def test_the_upgrade_takes_the_connection_that_is_open_already(broker: RunningBroker):
    async with linked(broker, 20.0, 20.0) as relay, session(relay.url) as transport:
        await upload(transport, images.png())
        assert relay.stats().connections == 1


async def test_the_deadline_withdraws_a_request(broker: RunningBroker):
    before = metric(broker, "nearfar_session_cancels_total", phase="uploading")
    async with linked(broker, 1.0, 20.0) as relay, session(relay.url) as transport:
        receipt = UploadReceipt()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.4):
                await upload(transport, BIG, receipt=receipt)
        assert receipt.sent_bytes < len(BIG) / 2
        assert (await upload(transport, images.png())).status == 200
    assert metric(broker, "nearfar_session_cancels_total", phase="uploading") == before + 1


@contextlib.asynccontextmanager
async def terminator(broker: RunningBroker, context: ssl.SSLContext) -> AsyncIterator[str]:
    """A proxy that speaks TLS to devices and plain TCP to the broker."""
    port = int(broker.url.rpartition(":")[2])

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(carry(reader, inner_writer), carry(inner_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_a_session_speaks_tls_and_verifies_the_certificate(
    broker: RunningBroker, tmp_path: Path
):
    cert, context = certificate(tmp_path, "IP:127.0.0.1")
    trusted = ssl.create_default_context(cafile=str(cert))
    async with terminator(broker, context) as url:
        transport = SessionTransport(AiohttpTransport(url, tls=trusted), api_key=None)
        await transport.send(models_request(None))
        await until(lambda: transport.session_open)
        assert (await upload(transport, BIG)).status == 200
        assert transport.secure
        await transport.aclose()
        stranger = AiohttpTransport(url)
        with pytest.raises(NetworkUnreachable, match="certificate"):
            await stranger.open_websocket(
                SESSION_PATH, protocol=SUBPROTOCOL, max_frame_bytes=limits.MAX_FRAME_BYTES
            )
        await stranger.aclose()
