"""One connection through the relay: two sockets and the link between them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Final

from edge_runtime.simulation.emulated_link import EmulatedLink, Lane

__all__ = ["BUFFER_BYTES", "Connection", "bounded_socket"]

BUFFER_BYTES: Final = 32 * 1024
"""Of one connection and direction, waiting before the link."""
_TCP_CLOSE: Final = 7
"""The state of a socket whose peer sent a reset (Linux, ``net/tcp_states.h``)."""
_TARGET_CONNECT_S: Final = 5.0


def bounded_socket() -> socket.socket:
    """A TCP socket whose kernel reads ahead little, so that a full link stops the sender."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    return opened


class _End(asyncio.Protocol):
    """One socket of a connection: a bounded queue of what came in, and a way to write out."""

    def __init__(self, connection: Connection, lane: Lane) -> None:
        self._connection = connection
        self.lane = lane
        """The lane that bytes read here must cross."""
        self.transport: asyncio.Transport | None = None
        self.waiting: deque[tuple[float, bytes]] = deque()
        self.waiting_bytes = 0
        self.at_eof = False
        self.arrived = asyncio.Event()
        self.writable = asyncio.Event()
        self.writable.set()
        self.lost = asyncio.Event()
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101
        self.transport = transport
        opened = transport.get_extra_info("socket")
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection.made(self)

    def data_received(self, data: bytes) -> None:
        self.waiting.append((asyncio.get_running_loop().time(), data))
        self.waiting_bytes += len(data)
        self.arrived.set()
        if self.waiting_bytes >= BUFFER_BYTES and not self._paused and self.transport:
            self._paused = True
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        self.at_eof = True
        self.arrived.set()
        return True  # the other direction stays open

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set()
        self.writable.set()
        self.arrived.set()
        if error is not None:
            self._connection.abort()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def was_reset(self) -> bool:
        """Whether the peer reset the connection, also while reading is paused."""
        if self.transport is None or self.lost.is_set() or not hasattr(socket, "TCP_INFO"):
            return False
        opened = self.transport.get_extra_info("socket")
        state = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return bool(state[0] == _TCP_CLOSE)

    def take(self, size_bytes: int) -> tuple[float, bytes]:
        """Up to ``size_bytes`` from the front, and when the last of them came in."""
        taken = bytearray()
        arrived_s = 0.0
        while self.waiting and len(taken) < size_bytes:
            arrived_s, data = self.waiting.popleft()
            room = size_bytes - len(taken)
            taken += data[:room]
            if len(data) > room:
                self.waiting.appendleft((arrived_s, data[room:]))
        self.waiting_bytes -= len(taken)
        if self._paused and self.waiting_bytes < BUFFER_BYTES and self.transport:
            self._paused = False
            self.transport.resume_reading()
        return arrived_s, bytes(taken)


class Connection:
    """A client's connection and its counterpart to the target."""

    def __init__(
        self, link: EmulatedLink, target: tuple[str, int], forget: Callable[[Connection], None]
    ) -> None:
        self._link = link
        self._forget = forget
        self._target_address = target
        self.client = _End(self, link.uplink)
        self.target = _End(self, link.downlink)
        self._tasks: list[asyncio.Task[None]] = []
        self._aborted = False

    def made(self, end: _End) -> None:
        """A socket is connected; the client's comes first."""
        if end is self.client:
            self._tasks.append(asyncio.get_running_loop().create_task(self._run()))

    def abort(self) -> None:
        """Reset both sockets; what has not crossed the link is dropped."""
        if self._aborted:
            return
        self._aborted = True
        for end in (self.client, self.target):
            self._link.discarded_bytes += end.waiting_bytes
            end.waiting.clear()
            end.waiting_bytes = 0
            if end.transport is not None and not end.lost.is_set():
                _reset(end.transport)
        for task in self._tasks:
            task.cancel()

    async def ended(self) -> None:
        """Wait until no task and no socket is left."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for end in (self.client, self.target):
            if end.transport is not None:
                await end.lost.wait()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            # SYN and SYN-ACK: they wait out an outage, and take a round trip.
            up_s = self._link.reserve(self._link.uplink, loop.time(), 0)
            await _sleep_until(up_s + 2 * self._link.one_way_s(up_s))
            async with asyncio.timeout(_TARGET_CONNECT_S):
                await self._connect(loop)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(self.client, self.target))
                group.create_task(self._pump(self.target, self.client))
        except (OSError, TimeoutError, ExceptionGroup):
            self.abort()
        finally:
            for end in (self.client, self.target):
                if end.transport is not None:
                    end.transport.close()
            self._forget(self)

    async def _connect(self, loop: asyncio.AbstractEventLoop) -> None:
        opened = bounded_socket()
        try:
            opened.setblocking(False)
            await loop.sock_connect(opened, self._target_address)
            await loop.create_connection(lambda: self.target, sock=opened)
        except BaseException:
            opened.close()
            raise

    async def _pump(self, source: _End, sink: _End) -> None:
        """Carry bytes over the link, one slice after the other, then the end of them."""
        loop = asyncio.get_running_loop()
        in_order_s = connected_s = loop.time()
        while True:
            if not source.waiting:
                if source.at_eof or source.lost.is_set():
                    break
                source.arrived.clear()
                await source.arrived.wait()
                continue
            if source.was_reset():
                self.abort()
                return
            size = self._link.slice_bytes(source.lane, loop.time())
            arrived_s, data = source.take(size)
            crossed_s = self._link.reserve(source.lane, max(arrived_s, connected_s), len(data))
            await _sleep_until(crossed_s)
            source.lane.crossed_bytes += len(data)
            await sink.writable.wait()
            in_order_s = max(crossed_s + self._link.one_way_s(crossed_s), in_order_s + 1e-6)
            loop.call_at(in_order_s, self._deliver, sink, data)
        await _sleep_until(max(loop.time() + self._link.one_way_s(loop.time()), in_order_s + 1e-6))
        if sink.transport is not None and not sink.lost.is_set() and sink.transport.can_write_eof():
            sink.transport.write_eof()

    def _deliver(self, sink: _End, data: bytes) -> None:
        if sink.transport is not None and not sink.transport.is_closing():
            sink.transport.write(data)


def _reset(transport: asyncio.Transport) -> None:
    """Close with a reset, so that the other side knows at once."""
    opened = transport.get_extra_info("socket")
    with contextlib.suppress(OSError):
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def _sleep_until(time_s: float) -> None:
    delay_s = time_s - asyncio.get_running_loop().time()
    if delay_s > 0:
        await asyncio.sleep(delay_s)
