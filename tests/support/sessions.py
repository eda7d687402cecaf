"""A device that speaks frames by hand, and a broker whose model waits for a sign."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar

import aiohttp
import numpy as np
from PIL import Image

from broker.server import RunningBroker
from edge_runtime.contract import limits
from edge_runtime.contract.frames import (
    SESSION_PATH,
    SUBPROTOCOL,
    Data,
    Frame,
    Hello,
    Request,
    Result,
    Welcome,
    decode_frame,
    encode_frame,
)
from edge_runtime.simulation.links import steady
from edge_runtime.simulation.relay import Relay

_F = TypeVar("_F")
_LIMIT_S = 10.0


class Device:
    """One session, frame by frame. ``close_code`` is set once it has ended."""

    def __init__(self, connection: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = connection
        self.seen: list[Frame] = []
        self._last_id = 0

    @property
    def close_code(self) -> int | None:
        return self.socket.close_code

    async def write(self, *frames: Frame) -> None:
        for frame in frames:
            await self.socket.send_bytes(encode_frame(frame))

    async def read(self) -> Frame | None:
        """The next frame; None: the connection is closed."""
        message = await self.socket.receive(_LIMIT_S)
        if message.type is not aiohttp.WSMsgType.BINARY:
            return None
        frame = decode_frame(message.data)
        self.seen.append(frame)
        return frame

    async def read_until(self, kind: type[_F], request_id: int | None = None) -> _F:
        """The next frame of a kind; others are kept in ``seen``."""
        while True:
            frame = await self.read()
            assert frame is not None, (self.close_code, self.seen)
            if isinstance(frame, kind) and request_id in (None, getattr(frame, "id", None)):
                return frame

    async def ask(self, body: bytes, *, upload: bool = True, **fields: Any) -> int:
        """Announce one image, and send it at once."""
        self._last_id += 1
        given = {
            "model": "tiny",
            "media_type": "image/png",
            "deadline_ms": 10_000,
            "size_bytes": len(body),
        } | fields
        await self.write(Request(id=self._last_id, **given))
        if upload:
            await self.send(self._last_id, body)
        return self._last_id

    async def send(self, request_id: int, body: bytes, start: int = 0) -> None:
        for at in range(0, len(body), limits.MAX_DATA_BYTES):
            piece = body[at : at + limits.MAX_DATA_BYTES]
            await self.write(Data(id=request_id, offset=start + at, data=piece))

    async def answer(self, request_id: int) -> tuple[Result, bytes]:
        """A whole answer."""
        head = await self.read_until(Result, request_id)
        body = head.data
        while len(body) < head.size_bytes:
            piece = await self.read_until(Data, request_id)
            assert piece.offset == len(body)
            body += piece.data
        return head, body

    async def closed(self) -> int | None:
        """Read to the end, and give the close code."""
        while await self.read() is not None:
            pass
        return self.close_code


@contextlib.asynccontextmanager
async def device(
    url: str,
    hello: Hello | None = None,
    *,
    greet: bool = True,
    receive_buffer_bytes: int | None = None,
    **options: Any,
) -> AsyncIterator[Device]:
    """A session with its greeting done."""

    def opened_socket(address: Any) -> socket.socket:
        made = socket.socket(*address[:3])
        if receive_buffer_bytes is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        return made

    settings = {"protocols": (SUBPROTOCOL,), "max_msg_size": limits.MAX_FRAME_BYTES} | options
    async with (
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(socket_factory=opened_socket)
        ) as client,
        client.ws_connect(url + SESSION_PATH, **settings) as connection,
    ):
        opened = Device(connection)
        if greet:
            await opened.write(hello or Hello())
            await opened.read_until(Welcome)
        yield opened


@contextlib.contextmanager
def held(broker: RunningBroker) -> Iterator[asyncio.Event]:
    """No batch ends before the event is set, or the block is left."""
    executor: Any = broker.services.executor
    run, gate = executor.run, asyncio.Event()

    async def run_later(*arguments: Any) -> Any:
        await gate.wait()
        return await run(*arguments)

    executor.run = run_later
    try:
        yield gate
    finally:
        gate.set()
        del executor.run


def metric(broker: RunningBroker, name: str, **labels: str) -> float:
    """One sample of the broker's metrics; 0 when it was never counted."""
    return broker.services.telemetry.registry.get_sample_value(name, labels) or 0.0


def noise(size_bytes: int) -> bytes:
    """A PNG of about this size."""
    side = int((size_bytes / 3) ** 0.5)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@contextlib.asynccontextmanager
async def linked(broker: RunningBroker, mbps: float, rtt_ms: float) -> AsyncIterator[Relay]:
    """A link of these figures before a broker; its requests go to the relay's ``url``."""
    port = int(broker.url.rpartition(":")[2])
    link = steady(uplink_mbps=mbps, downlink_mbps=mbps, rtt_ms=rtt_ms)
    async with Relay("127.0.0.1", port, link) as relay:
        yield relay
