"""A TCP proxy that lets a real broker fail for real, in a chosen phase of a request.

It understands just enough of HTTP/1.1 and WebSocket to know the phase. All proxies of one
``ProxyHost`` share one event loop in one thread.

    phase         what is about to pass when the fault strikes
    connect       the connection itself
    tls           the TLS handshake (the proxy ends TLS; the broker behind it speaks plainly)
    health        GET /v2/health/ready
    discovery     GET /v1/models
    upgrade       GET /v1/session
    hello         the session's first frame
    upload_head   the head of POST, or the REQUEST frame
    mid_upload    the second half of a body, or of its first DATA frame
    waiting       the first byte of the answer to an image
    mid_answer    the second half of that answer

Faults: ``FAULTS_BY_PHASE``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from edge_runtime.contract.frames import Error, Reject, encode_frame

FAULTS_BY_PHASE: dict[str, tuple[str, ...]] = {
    "connect": ("refuse", "reset", "close", "black_hole"),
    "tls": ("reset", "close", "black_hole", "garbage", "slow", "wrong_certificate"),
    "dns": ("gone", "hang"),
    "health": (
        "reset", "close", "black_hole", "drip", "garbage", "flip", "slow",
        "status_429", "status_500", "status_503",
    ),
    "discovery": (
        "reset", "close", "black_hole", "drip", "garbage", "flip", "slow",
        "status_429", "status_500", "status_503",
    ),
    "upgrade": (
        "reset", "close", "black_hole", "drip", "garbage", "flip", "slow",
        "status_429", "status_500", "status_503",
    ),
    "hello": ("reset", "close", "black_hole", "drip", "garbage", "flip", "slow", "status_503"),
    "upload_head": (
        "reset", "close", "black_hole", "garbage", "slow", "kill",
        "status_429", "status_500", "status_503",
    ),
    "mid_upload": (
        "reset", "close", "black_hole", "drip", "garbage", "slow", "kill",
        "status_429", "status_500", "status_503",
    ),
    "waiting": (
        "reset", "close", "black_hole", "drip", "garbage", "flip", "slow", "kill",
        "status_429", "status_500", "status_503",
    ),
    "mid_answer": ("reset", "close", "black_hole", "drip", "garbage", "flip", "slow", "kill"),
    "any": ("flap",),
}  # fmt: skip
"""``kill``: the broker's host is gone from then on; ``flap``: gone and back all the time."""

_SLOW_S = 1.5
_DRIP_S = 0.01
_FLAP_S = (0.02, 0.12)
_BACKLOG = 6
_CODES = {429: "overloaded", 500: "broker_fault", 503: "overloaded"}
_HELLO, _REQUEST, _DATA, _RESULT = 0x01, 0x03, 0x06, 0x09


class _Struck(Exception):
    """The connection is over."""


class ProxyHost:
    """``with ProxyHost("127.0.0.1", port) as host: proxy = host.open(); ... proxy.close()``."""

    def __init__(self, target_host: str, target_port: int) -> None:
        self.target = (target_host, target_port)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="fault-proxy")

    def __enter__(self) -> ProxyHost:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def open(
        self,
        seed: int = 0,
        tls: ssl.SSLContext | None = None,
        wrong_tls: ssl.SSLContext | None = None,
    ) -> FaultProxy:
        proxy = FaultProxy(self, seed, tls, wrong_tls)
        self.call(proxy.listen())
        return proxy


class FaultProxy:
    """One listening port in front of the broker; sound until ``arm``."""

    def __init__(
        self,
        host: ProxyHost,
        seed: int,
        tls: ssl.SSLContext | None,
        wrong_tls: ssl.SSLContext | None,
    ) -> None:
        self.host = host
        self.draw = random.Random(seed)
        self.tls, self.wrong_tls = tls, wrong_tls
        self.fault = self.phase = ""
        self.strikes = 0
        """How often the fault struck."""
        self.port = 0
        self._server: asyncio.Server | None = None
        self._full: list[socket.socket] = []
        self._flapping: asyncio.Task[None] | None = None
        self._connections: dict[asyncio.Task[None], _Connection] = {}

    def arm(self, fault: str, phase: str) -> None:
        """From now on; connections that are open notice it when they come to the phase."""
        self.host.call(self._arm(fault, phase))

    def cut(self) -> None:
        """Reset every open connection."""
        self.host.call(self._cut())

    def close(self) -> None:
        self.host.call(self._close())

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _arm(self, fault: str, phase: str) -> None:
        self.fault, self.phase = fault, phase
        if (fault, phase) == ("refuse", "connect"):
            await self._vanish()
            self.strikes += 1
        elif (fault, phase) == ("black_hole", "connect"):
            await self._vanish()
            self._fill_backlog()
            self.strikes += 1
        elif fault == "flap":
            self._flapping = asyncio.create_task(self._flap())

    def _fill_backlog(self) -> None:
        """Nobody accepts, and the kernel drops further SYNs."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(0)
        self._full = [listener]
        for _ in range(_BACKLOG):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", self.port))
            self._full.append(filler)

    async def _flap(self) -> None:
        while True:
            await asyncio.sleep(self.draw.uniform(*_FLAP_S))
            self.strikes += 1
            await self._vanish()
            await asyncio.sleep(self.draw.uniform(*_FLAP_S))
            await self.listen()

    async def _vanish(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
        await self._cut()

    async def _cut(self) -> None:
        tasks = [task for task in self._connections if task is not asyncio.current_task()]
        for task in tasks:
            self._connections[task].reset()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _close(self) -> None:
        if self._flapping is not None:
            self._flapping.cancel()
            await asyncio.gather(self._flapping, return_exceptions=True)
        await self._vanish()
        for one in self._full:
            one.close()
        await asyncio.sleep(0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection = _Connection(self, reader, writer)
        self._connections[task] = connection
        try:
            await connection.serve()
        except (_Struck, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            del self._connections[task]
            connection.end()


class _Connection:
    """One client's connection and the broker's behind it."""

    def __init__(
        self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._proxy = proxy
        self._reader, self._writer = reader, writer
        self._upstream: asyncio.StreamWriter | None = None
        self._opened: socket.socket = writer.get_extra_info("socket")
        self._frames = False
        """WebSocket by now."""
        self._image = False
        """What the broker says next answers an image."""
        self._request_id = 0
        self._dripping = False
        self._flipping = False
        self._dead = asyncio.Event()

    async def serve(self) -> None:
        await self._at("connect")
        if self._proxy.tls is not None:
            await self._at("tls")
            wrong = (self._proxy.fault, self._proxy.phase) == ("wrong_certificate", "tls")
            chosen = self._proxy.wrong_tls if wrong else self._proxy.tls
            assert chosen is not None
            await self._writer.start_tls(chosen)
        from_broker, self._upstream = await asyncio.open_connection(*self._proxy.host.target)
        back = asyncio.create_task(self._backward(from_broker))
        forth = asyncio.create_task(self._forward(self._upstream))
        try:
            await asyncio.wait((back, forth), return_when=asyncio.FIRST_COMPLETED)
        finally:
            back.cancel()
            forth.cancel()
            await asyncio.gather(back, forth, return_exceptions=True)

    def reset(self) -> None:
        """RST instead of FIN."""
        with contextlib.suppress(OSError):
            self._opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    def end(self) -> None:
        if self._upstream is not None:
            self._upstream.transport.abort()
        if self._proxy.tls is not None or self._dead.is_set():
            self._writer.transport.abort()
        else:
            self._writer.close()

    # To the broker --------------------------------------------------------------------

    async def _forward(self, upstream: asyncio.StreamWriter) -> None:
        while not self._frames:
            head = await self._reader.readuntil(b"\r\n\r\n")
            method, path = head.split(b" ", 2)[:2]
            length = 0
            for line in head.split(b"\r\n"):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            if path.startswith(b"/v2/health"):
                await self._at("health")
            elif path.startswith(b"/v1/models") and method == b"GET":
                await self._at("discovery")
            elif path.startswith(b"/v1/session"):
                await self._at("upgrade")
                self._frames = True
            else:
                await self._at("upload_head")
            self._image = method == b"POST"
            upstream.write(head)
            if length:
                half = length // 2
                upstream.write(await self._reader.readexactly(half))
                await self._at("mid_upload")
                await self._take(upstream, await self._reader.readexactly(length - half))
            await upstream.drain()
        while True:
            await self._forward_message(upstream)

    async def _forward_message(self, upstream: asyncio.StreamWriter) -> None:
        head, mask, payload = await _read_message(self._reader)
        start = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload[:5]))
        kind = start[0] if head[0] & 0x0F == 2 and len(start) == 5 else 0
        if kind == _HELLO:
            await self._at("hello")
        elif kind == _REQUEST:
            self._request_id = int.from_bytes(start[1:], "big")
            self._image = True
            await self._at("upload_head")
        upstream.write(head + mask)
        half = len(payload) // 2
        upstream.write(payload[:half])
        if kind == _DATA:
            await self._at("mid_upload")
        await self._take(upstream, payload[half:])
        await upstream.drain()

    async def _take(self, upstream: asyncio.StreamWriter, data: bytes) -> None:
        pieces = (
            (data,)
            if not self._dripping
            else (data[at : at + 64] for at in range(0, len(data), 64))
        )
        for piece in pieces:
            upstream.write(piece)
            if self._dripping:
                await asyncio.sleep(_DRIP_S)

    # To the device --------------------------------------------------------------------

    async def _backward(self, from_broker: asyncio.StreamReader) -> None:
        framed = False
        while True:
            if framed:
                head, mask, payload = await _read_message(from_broker)
                data = head + mask + payload
                answer = payload[:1] == bytes([_RESULT])
            else:
                data = await from_broker.read(65_536)
                answer = self._image
                if self._frames and b"\r\n\r\n" in data:
                    framed = data.startswith(b"HTTP/1.1 101")
                    answer = False
            if not data:
                return
            if answer:
                await self._at("waiting")
                half = len(data) // 2
                await self._give(data[:half])
                await self._at("mid_answer")
                data = data[half:]
            await self._give(data)

    async def _give(self, data: bytes) -> None:
        if self._flipping:
            flipped = bytearray(data)
            for _ in range(max(1, len(data) // 40)):
                flipped[self._proxy.draw.randrange(len(data))] ^= self._proxy.draw.randrange(256)
            data = bytes(flipped)
        if not self._dripping:
            self._writer.write(data)
            await self._writer.drain()
            return
        for byte in data:
            self._writer.write(bytes([byte]))
            await self._writer.drain()
            await asyncio.sleep(_DRIP_S)

    # Faults ---------------------------------------------------------------------------

    async def _at(self, phase: str) -> None:
        if self._dead.is_set():
            await asyncio.sleep(3600)
        if self._proxy.phase != phase or not self._proxy.fault:
            return
        self._proxy.strikes += 1
        fault = self._proxy.fault
        if fault.startswith("status_"):
            await self._refuse(phase, int(fault.removeprefix("status_")))
        strike: dict[str, Callable[[str], Coroutine[Any, Any, None]]] = {
            "reset": self._reset,
            "close": self._close,
            "black_hole": self._black_hole,
            "kill": self._kill,
            "garbage": self._garbage,
            "slow": self._slow,
            "drip": self._drip,
            "flip": self._flip,
            "wrong_certificate": self._nothing_yet,
        }
        await strike[fault](phase)

    async def _reset(self, _phase: str) -> NoReturn:
        self.reset()
        raise _Struck

    async def _close(self, _phase: str) -> NoReturn:
        raise _Struck

    async def _black_hole(self, _phase: str) -> None:
        self._dead.set()
        await asyncio.sleep(3600)

    async def _kill(self, _phase: str) -> NoReturn:
        # another task: this one is about to be cancelled with its connection
        self._proxy.host.loop.create_task(self._proxy._vanish())
        await asyncio.sleep(3600)
        raise _Struck

    async def _garbage(self, _phase: str) -> NoReturn:
        self._writer.write(self._proxy.draw.randbytes(self._proxy.draw.choice((3, 60, 5000))))
        await self._writer.drain()
        await asyncio.sleep(self._proxy.draw.choice((0.0, 0.05, 3600.0)))
        raise _Struck

    async def _slow(self, _phase: str) -> None:
        await asyncio.sleep(_SLOW_S)

    async def _drip(self, _phase: str) -> None:
        self._dripping = True

    async def _nothing_yet(self, _phase: str) -> None:
        """The handshake that follows has the other certificate."""

    async def _flip(self, _phase: str) -> None:
        self._flipping = True

    async def _refuse(self, phase: str, status: int) -> NoReturn:
        """What a broker, or a proxy before it, says instead of the answer."""
        framed = self._frames and phase != "upgrade"
        code, detail = _CODES[status], "scripted"
        if framed and phase == "hello":
            message = encode_frame(Error(id=0, code=code, detail=detail, status=status))
        elif framed:
            frame = self._proxy.draw.choice((Reject, Error))
            message = encode_frame(
                frame(id=self._request_id, code=code, detail=detail, status=status)
            )
        if framed:
            self._writer.write(bytes([0x82, len(message)]) + message)
        else:
            problem = {"title": "scripted", "status": status, "detail": detail, "code": code}
            body = json.dumps(problem | {"retryable": True}).encode()
            body = self._proxy.draw.choice((body, b"<html>no upstream</html>"))
            self._writer.write(
                f"HTTP/1.1 {status} Status\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            )
        await self._writer.drain()
        await asyncio.sleep(self._proxy.draw.choice((0.01, 0.5)))
        raise _Struck


async def _read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes, bytes]:
    """One WebSocket frame: its head with the length, its mask, its payload as it came."""
    head = await reader.readexactly(2)
    size = head[1] & 0x7F
    if size == 126:
        head += await reader.readexactly(2)
        size = int.from_bytes(head[2:], "big")
    elif size == 127:
        head += await reader.readexactly(8)
        size = int.from_bytes(head[2:], "big")
    mask = await reader.readexactly(4) if head[1] & 0x80 else b""
    return head, mask, await reader.readexactly(size)
