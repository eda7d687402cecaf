"""How a session begins, what ends it, who may have one: a real broker, a real socket."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from broker.accounts.keys import KeyFile
from broker.server import RunningBroker
from edge_runtime.contract import limits
from edge_runtime.contract.frames import (
    SESSION_PATH,
    Admit,
    Cancel,
    Data,
    Error,
    Hello,
    Hint,
    Ping,
    Pong,
    Progress,
    Reject,
    Request,
    Welcome,
    encode_frame,
)
from tests.support import broker_images as images
from tests.support.broker import broker_here, predict, request, until
from tests.support.servables import shared_servable
from tests.support.sessions import device, held, metric

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

PAGE = "https://app.example"
LARGE = images.png(1, 400, 300)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningBroker]:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(shared_servable(), folder / "tiny")
    async with broker_here(folder, cors_origins=(PAGE,)) as running:
        yield running


# The upgrade -----------------------------------------------------------------------------------


async def test_without_an_upgrade_the_answer_says_so(broker: RunningBroker):
    reply = await request("GET", broker.url + SESSION_PATH)
    assert (reply.status, reply.code) == (426, "request_rejected")
    assert reply.headers["Upgrade"] == "websocket"


@pytest.mark.parametrize("protocols", [(), ("nearfar.v2",), ("graphql-ws", "chat")])
async def test_another_subprotocol_is_refused(broker: RunningBroker, protocols: tuple[str, ...]):
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        async with device(broker.url, protocols=protocols):
            pass
    assert caught.value.status == 400


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://app.example"])
async def test_a_page_of_another_origin_is_refused(broker: RunningBroker, origin: str):
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        async with device(broker.url, origin=origin):
            pass
    assert caught.value.status == 403


async def test_a_page_of_an_allowed_origin_is_let_in(broker: RunningBroker):
    async with device(broker.url, origin=PAGE) as opened:
        await opened.answer(await opened.ask(LARGE))


async def test_compression_is_not_agreed_to(broker: RunningBroker):
    async with device(broker.url, compress=15) as opened:
        assert opened.socket.compress == 0
        await opened.answer(await opened.ask(LARGE))


# Frames that end a session ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xff\x00\x00\x00\x00",
        encode_frame(Data(id=9, offset=0, data=b"x")),
        encode_frame(Cancel(id=9)),
        encode_frame(Hello()),
        encode_frame(Welcome()),
        encode_frame(Progress(id=1, received_bytes=1, t_us=1)),
        b'\x03\x00\x00\x00\x01{"model":"tiny"}',
    ],
    ids=["empty", "type", "data", "cancel", "hello", "welcome", "progress", "request"],
)
async def test_a_frame_that_makes_no_sense_ends_the_session_with_the_reason(
    broker: RunningBroker, message: bytes
):
    async with device(broker.url) as opened:
        await opened.socket.send_bytes(message)
        told = await opened.read_until(Error)
        assert (told.id, told.status, told.code) == (0, 400, "wire")
        assert await opened.closed() == 4400
    reply = await predict(broker.url, LARGE)
    assert reply.status == 200


async def test_an_id_is_used_once(broker: RunningBroker):
    async with device(broker.url) as opened:
        number = await opened.ask(LARGE)
        await opened.answer(number)
        asked = Request(id=number, model="tiny", media_type="image/png", size_bytes=1)
        await opened.write(asked)
        assert (await opened.read_until(Error)).code == "wire"
        assert await opened.closed() == 4400


async def test_text_is_no_frame(broker: RunningBroker):
    async with device(broker.url) as opened:
        await opened.socket.send_str("hello")
        assert (await opened.read_until(Error)).code == "wire"
        assert await opened.closed() == 4400


async def test_an_oversized_frame_closes_the_connection_before_it_is_read(broker: RunningBroker):
    async with device(broker.url) as opened:
        await opened.socket.send_bytes(bytes(limits.MAX_FRAME_BYTES + 1))
        assert await opened.closed() == 1009


async def test_the_first_frame_is_hello(broker: RunningBroker):
    async with device(broker.url, greet=False) as opened:
        await opened.write(Ping(id=1))
        assert (await opened.read_until(Error)).detail == "the first frame must be HELLO"
        assert await opened.closed() == 4400


async def test_a_session_without_hello_is_closed(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(limits, "MAX_HELLO_MS", 100)
    async with device(broker.url, greet=False) as opened:
        assert (await opened.read_until(Error)).code == "upload_stalled"
        assert await opened.closed() == 4408


async def test_an_idle_session_is_closed(broker: RunningBroker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(broker.services.sessions, "idle_ms", 100)
    async with device(broker.url) as opened:
        assert await opened.closed() == 1001
    assert metric(broker, "nearfar_sessions_closed_total", reason="idle") >= 1


async def test_a_device_that_reads_nothing_is_cut_off(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(limits, "MAX_SESSION_WRITE_MS", 300)
    before = metric(broker, "nearfar_sessions_closed_total", reason="slow_reader")
    async with device(broker.url, receive_buffer_bytes=4096) as opened:
        opened.socket._conn.transport.pause_reading()

        async def ask_and_ask() -> None:
            for _ in range(100_000):
                await opened.ask(LARGE, upload=False, model="x" * 100)
                await asyncio.sleep(0)

        with pytest.raises(aiohttp.ClientConnectionResetError):
            await ask_and_ask()
        await until(
            lambda: metric(broker, "nearfar_sessions_closed_total", reason="slow_reader") > before
        )
    await until(lambda: len(broker.services.sessions) == 0)


# Keys, bounds, the end ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[KeyFile, str, str]:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    return file, file.add("acme")[1], file.add("beta")[1]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guarded(keys: tuple[KeyFile, str, str]) -> AsyncIterator[RunningBroker]:
    async with broker_here(shared_servable(), keys=str(keys[0].path)) as running:
        yield running


@pytest.mark.parametrize("key", [None, "", "nf_x", "nf_aaaaaaaaaaaa." + "A" * 43])
async def test_without_a_valid_key_a_session_ends_at_its_greeting(
    guarded: RunningBroker, key: str | None
):
    async with device(guarded.url, greet=False) as opened:
        await opened.write(Hello(api_key=key))
        told = await opened.read_until(Error)
        assert (told.id, told.status, told.code) == (0, 401, "unauthorized")
        assert await opened.closed() == 4401
        assert not any(isinstance(frame, Welcome) for frame in opened.seen)


async def test_a_key_comes_with_hello_or_with_the_upgrade(
    guarded: RunningBroker, keys: tuple[KeyFile, str, str]
):
    _, acme, _ = keys
    async with device(guarded.url, Hello(api_key=acme)) as opened:
        await opened.answer(await opened.ask(LARGE))
    headers = {"Authorization": f"Bearer {acme}"}
    async with device(guarded.url, headers=headers) as opened:
        await opened.answer(await opened.ask(LARGE))
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        async with device(guarded.url, headers={"Authorization": "Bearer nf_x"}):
            pass
    assert caught.value.status == 401


async def test_a_revoked_key_is_refused_on_an_open_session(guarded: RunningBroker):
    file = guarded.services.key_ring._file
    key, text = file.add("gone")

    async def greeted() -> bool:  # the file is followed within a second
        async with device(guarded.url, greet=False) as opened:
            await opened.write(Hello(api_key=text))
            return isinstance(await opened.read(), Welcome)

    async with asyncio.timeout(5):
        while not await greeted():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    async with device(guarded.url, Hello(api_key=text)) as opened:
        await opened.answer(await opened.ask(LARGE))
        file.revoke(key.id)
        await asyncio.sleep(0.6)
        number = await opened.ask(LARGE, upload=False)
        assert (await opened.read_until(Reject, number)).code == "unauthorized"


async def test_a_tenant_has_so_many_sessions_and_all_have_so_many(
    guarded: RunningBroker, keys: tuple[KeyFile, str, str], monkeypatch: pytest.MonkeyPatch
):
    _, acme, beta = keys
    await until(lambda: len(guarded.services.sessions) == 0)
    monkeypatch.setattr(guarded.services.sessions, "max_per_tenant", 1)
    monkeypatch.setattr(guarded.services.sessions, "max_sessions", 2)
    async with device(guarded.url, Hello(api_key=acme)):
        async with device(guarded.url, greet=False) as second:
            await second.write(Hello(api_key=acme))
            assert (await second.read_until(Error)).code == "overloaded"
            assert await second.closed() == 4503
        await until(lambda: len(guarded.services.sessions) == 1)
        async with device(guarded.url, Hello(api_key=beta)):
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                async with device(guarded.url, Hello(api_key=beta)):
                    pass
    assert caught.value.status == 503


async def test_a_key_of_one_tenant_tells_another_nothing(
    guarded: RunningBroker, keys: tuple[KeyFile, str, str]
):
    _, acme, beta = keys
    async with device(guarded.url, Hello(api_key=acme)) as first:
        await first.answer(await first.ask(LARGE, key="mine"))
    async with device(guarded.url, Hello(api_key=beta)) as second:
        number = await second.ask(LARGE, upload=False, key="mine")
        assert (await second.read_until(Admit, number)).received_bytes == 0
        await second.write(Cancel(id=number))
        await second.read_until(Cancel)


async def test_news_of_the_queue_comes_unasked(broker: RunningBroker):
    async with device(broker.url) as opened:
        await opened.answer(await opened.ask(LARGE))
        lane = next(
            lane for key, lane in broker.services.scheduler._lanes.items() if key.name == "tiny"
        )
        for size in 20 * list(range(1, lane.max_batch + 1)):  # whatever was learned before
            lane.latency.observe(size, 400.0, asyncio.get_running_loop().time())
        with held(broker):
            async with device(broker.url) as other:
                for _ in range(20):
                    await other.ask(images.png())
                hint = await opened.read_until(Hint)
    assert hint.model == "tiny"
    assert hint.queue_delay_ms is not None
    assert hint.queue_delay_ms > 20


async def test_a_broker_that_stops_says_so_answers_what_it_has_and_closes():
    async with StoppableBroker() as (broker, stop), device(broker.url) as opened:
        with held(broker) as gate:
            number = await opened.ask(LARGE)
            await opened.read_until(Admit, number)
            stopping = asyncio.create_task(stop())
            assert (await opened.read_until(Hint)).draining
            late = await opened.ask(LARGE, upload=False)
            refused = await opened.read_until(Reject, late)
            assert (refused.status, refused.code) == (503, "overloaded")
            await opened.write(Ping(id=3))
            assert await opened.read_until(Pong) == Pong(id=3, ready=False, draining=True)
            gate.set()
            await opened.answer(number)
        assert await opened.closed() == 1001
        await stopping


class StoppableBroker:
    """A broker that a test stops while it looks on."""

    async def __aenter__(self) -> tuple[RunningBroker, Any]:
        self._context = broker_here(shared_servable(), drain_timeout_s=5.0)
        running = await self._context.__aenter__()
        self._stopped = False
        return running, self._stop

    async def _stop(self) -> None:
        self._stopped = True
        await self._context.__aexit__(None, None, None)

    async def __aexit__(self, *_: object) -> None:
        if not self._stopped:
            await self._stop()
