"""Bytes that no HTTP library would send: refused, cut off, and never a way past a bound."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from broker.server import RunningBroker
from edge_runtime.contract import limits
from tests.support import broker_images as images
from tests.support.broker import broker_here, predict, raw_exchange, until
from tests.support.servables import shared_servable

pytestmark = pytest.mark.asyncio(loop_scope="module")

START = b"POST /v1/models/tiny:predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker() -> AsyncIterator[RunningBroker]:
    async with broker_here(shared_servable()) as running:
        yield running


MALFORMED = {
    "length and chunks": START
    + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": START + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
    "the same length twice": START + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd",
    "xchunked": START + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked twice": START + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "plus sign": START + b"Content-Length: +5\r\n\r\nabcde",
    "negative length": START + b"Content-Length: -1\r\n\r\n",
    "bare line feeds": b"GET /v2/health/live HTTP/1.1\nHost: x\n\n",
    "folded header": b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n",
    "space before colon": b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
    "NUL in a header": b"GET / HTTP/1.1\r\nHost: x\r\nA: b\x00c\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 2000 + b"\r\n",
    "long header": b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 9000 + b"\r\n\r\n",
    "long path": b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xaa" * 64 + b"\r\n\r\n",
    "binary": bytes(range(256)) * 4 + b"\r\n\r\n",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
async def test_malformed_requests_are_400_and_the_connection_ends(
    broker: RunningBroker, data: bytes, caplog: pytest.LogCaptureFixture
):
    received = await raw_exchange(broker.url, data)
    assert received.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
    assert received.count(b"HTTP/1.") == 1
    assert b"problem+json" in received
    assert b"Traceback" not in received
    assert not any(record.exc_info for record in caplog.records)


async def test_a_flood_of_malformed_requests_does_not_flood_the_log(
    broker: RunningBroker, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", logger="nearfar.broker")
    await asyncio.sleep(1.0)  # the tests before this one used this second's lines
    started = time.monotonic()
    for _ in range(100):
        await raw_exchange(broker.url, MALFORMED["binary"])
    seconds = int(time.monotonic() - started) + 2
    lines = [r for r in caplog.records if r.getMessage() == "malformed_request"]
    assert 1 <= len(lines) <= 5 * seconds


@pytest.mark.parametrize("value", [b"", b" ", b"\xd9\xa3", b"1, 2", b"99999999999999999999"])
async def test_deadlines_no_library_would_send_are_refused(broker: RunningBroker, value: bytes):
    data = START + b"Content-Length: 4\r\nX-Deadline-Ms: " + value + b"\r\n\r\nabcd"
    assert b" 400 " in (await raw_exchange(broker.url, data, answers=1))[:20]


async def test_a_header_that_is_sent_twice_is_refused(broker: RunningBroker):
    data = START + b"X-Deadline-Ms: 9000\r\nX-Deadline-Ms: 1\r\nContent-Length: 4\r\n\r\nabcd"
    received = await raw_exchange(broker.url, data, answers=1)
    assert b" 400 " in received[:20]
    assert b"send it once" in received


async def test_a_refusal_comes_before_the_body(broker: RunningBroker):
    """The body never comes, and the answer is there all the same."""
    for refused, status in [
        (b"Content-Length: 100000000\r\n", b" 413 "),
        (b"Content-Length: 5000\r\nContent-Encoding: gzip\r\n", b" 415 "),
        (b"Content-Length: 5000\r\nX-Deadline-Ms: 0\r\n", b" 400 "),
    ]:
        received = await raw_exchange(broker.url, START + refused + b"\r\n", answers=1)
        assert status in received[:20]


async def test_expect_100_continue_is_answered_only_when_admitted(broker: RunningBroker):
    image = images.png()
    expecting = START + b"Expect: 100-continue\r\nContent-Length: %d\r\n" % len(image)
    refused = await raw_exchange(broker.url, expecting + b"X-Deadline-Ms: 0\r\n\r\n", answers=1)
    assert refused.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nConnection: close\r\n" in refused

    host, port = broker.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(expecting + b"X-Deadline-Ms: 5000\r\n\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(image)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_another_expectation_fails(broker: RunningBroker):
    data = START + b"Expect: magic\r\nContent-Length: 4\r\n\r\nabcd"
    assert (await raw_exchange(broker.url, data, answers=1)).startswith(b"HTTP/1.1 417 ")


async def test_after_a_refusal_the_connection_serves_the_next_request(broker: RunningBroker):
    image = images.png()
    first = START + b"X-Deadline-Ms: 0\r\nContent-Length: %d\r\n\r\n" % len(image)
    second = START + b"X-Deadline-Ms: 5000\r\nContent-Length: %d\r\n\r\n" % len(image)
    received = await raw_exchange(broker.url, first + image + second + image, answers=2)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert b"HTTP/1.1 200 " in received


async def test_a_body_that_stalls_is_cut(broker: RunningBroker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "MAX_BODY_IDLE_MS", 200)
    data = START + b"X-Deadline-Ms: 60000\r\nContent-Length: 5000\r\n\r\n\x89PNG"
    started = time.monotonic()
    received = await raw_exchange(broker.url, data, answers=1)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"upload_stalled" in received
    assert time.monotonic() - started >= 0.2
    assert broker.services.scheduler.queued(broker.services.repository.keys[0]) == 0


async def test_a_dripping_body_is_cut_at_its_total_time(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(limits, "MAX_BODY_MS", 400)
    host, port = broker.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(START + b"X-Deadline-Ms: 60000\r\nContent-Length: 5000\r\n\r\n")

    async def drip() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    async with asyncio.timeout(5):
        head = await reader.readuntil(b"\r\n\r\n")
    dripping.cancel()
    writer.close()
    assert head.startswith(b"HTTP/1.1 408 ")


async def test_a_body_is_not_waited_for_beyond_its_deadline(broker: RunningBroker):
    data = START + b"X-Deadline-Ms: 300\r\nContent-Length: 5000\r\n\r\n\x89PNG"
    received = await raw_exchange(broker.url, data, answers=1)
    assert received.startswith(b"HTTP/1.1 504 ")


async def test_chunks_without_end_are_cut_at_the_byte_limit(broker: RunningBroker):
    head = START + b"X-Deadline-Ms: 20000\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    received = await raw_exchange(broker.url, head + chunk * 9, answers=1)
    assert received.startswith(b"HTTP/1.1 413 ")


async def test_broken_chunks_are_the_callers_mistake(broker: RunningBroker):
    head = START + b"X-Deadline-Ms: 20000\r\nTransfer-Encoding: chunked\r\n\r\n"
    received = await raw_exchange(broker.url, head + b"4\r\nabcd\r\nzz\r\n", answers=1)
    assert received.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))


async def test_a_client_that_leaves_during_its_upload_frees_its_place(broker: RunningBroker):
    scheduler = broker.services.scheduler
    model = broker.services.repository.keys[0]
    host, port = broker.url.removeprefix("http://").split(":")
    writers = []
    for _ in range(10):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(START + b"X-Deadline-Ms: 60000\r\nContent-Length: 5000\r\n\r\nabc")
        writers.append(writer)
    await until(lambda: scheduler.queued(model) == 10)
    for writer in writers:
        writer.transport.abort()
    await until(lambda: scheduler.queued(model) == 0)
    await until(lambda: broker.services.in_flight == 0)


@pytest.mark.slow
async def test_headers_that_take_too_long_end_the_connection(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(limits, "MAX_HEADER_BLOCK_MS", 200)
    async with broker_here(shared_servable()) as broker:
        for partial in (b"", b"GET /v2 HT", b"GET /v2 HTTP/1.1\r\nHost: x\r\nA:"):
            started = time.monotonic()
            assert await raw_exchange(broker.url, partial, limit_s=5.0) == b""
            assert 0.15 < time.monotonic() - started < 3.0
        # A kept connection may rest between requests for longer than that.
        host, port = broker.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        for _ in range(2):
            writer.write(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(len(b'{"live":true}'))
            await asyncio.sleep(0.3)
        writer.close()


async def test_one_connection_too_many_is_told_so():
    async with broker_here(shared_servable(), max_connections=3) as broker:
        host, port = broker.url.removeprefix("http://").split(":")
        held = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
        await until(lambda: b"nearfar_connections 3.0" in broker.services.telemetry.exposition())
        received = await raw_exchange(broker.url, b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert received.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: 1\r\n" in received
        for _, writer in held:
            writer.close()
        await until(lambda: b"nearfar_connections 0.0" in broker.services.telemetry.exposition())
        assert (await predict(broker.url, images.png())).status == 200


async def test_pipelined_requests_are_answered_in_order(broker: RunningBroker):
    get = b"GET /v2/models/%s HTTP/1.1\r\nHost: x\r\n\r\n"
    received = await raw_exchange(
        broker.url, get % b"tiny" + get % b"huge" + get % b"tiny", answers=3
    )
    statuses = [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"404", b"200"]
