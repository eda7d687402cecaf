"""The load: one process, plain asyncio connections, one record a request.

    python -m benchmarks.serving.load < plan.json > records.json

It knows no server: a plan brings whole request heads, so that every peer is asked in its own
form and pays for nothing of the client's. Open loop: Poisson arrivals at a rate that changes by
phases, whatever becomes of earlier requests. Closed loop: so many callers, each asks again when
it is answered.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from typing import Annotated

import msgspec

__all__ = ["ERROR", "GAVE_UP", "Kind", "Phase", "Plan", "Record"]

GAVE_UP = 0
"""Status of a request that the client left."""
ERROR = -1
"""Status of a request whose connection broke, or was answered with no HTTP."""


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """One sort of request."""

    name: str
    head: str
    """Request line and headers, with the last line break."""
    body_path: str
    share: float = 1.0
    """Of the arrivals."""
    expect: bool = False
    """The body is sent when 100 Continue has come, and not before."""
    body_after_ms: float = 0.0
    """The body is sent so long after the headers, unless the answer is there."""


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of an open loop."""

    seconds: float
    per_s: float


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to send. ``phases`` makes an open loop, ``callers`` a closed one."""

    port: int
    kinds: tuple[Kind, ...]
    give_up_ms: float
    phases: tuple[Phase, ...] = ()
    callers: Annotated[int, msgspec.Meta(ge=0)] = 0
    seconds: float = 0.0
    """Of a closed loop."""
    seed: int = 1


class Record(msgspec.Struct, frozen=True, array_like=True):
    """One request."""

    at_s: float
    """Since the start of the load."""
    kind: int
    status: int
    ms: float
    """From the first byte sent to the last byte of the answer."""
    body_sent: bool


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._answer: asyncio.Future[int] | None = None
        self._body: bytes | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.reusable = True
        self.body_sent = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        self._settle(ERROR)

    def ask(self, head: bytes, body: bytes, kind: Kind) -> asyncio.Future[int]:
        assert self.transport is not None
        loop = asyncio.get_running_loop()
        self._answer = loop.create_future()
        self._buffer.clear()
        self._body = body
        self.body_sent = False
        if kind.expect or kind.body_after_ms:
            self.transport.write(head)
            if not kind.expect:
                self._timer = loop.call_later(kind.body_after_ms / 1e3, self._send_body)
        else:
            self._body, self.body_sent = None, True
            self.transport.writelines((head, body))
        return self._answer

    def leave(self) -> None:
        self.reusable = False
        self._stop_timer()
        if self.transport is not None:
            self.transport.abort()

    def _send_body(self) -> None:
        self._timer = None
        if self._body is not None and self.transport is not None:
            self.transport.write(self._body)
            self._body, self.body_sent = None, True

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end]).lower()
            status = int(head[9:12]) if head.startswith(b"http/1.1 ") else ERROR
            if status == 100:
                del self._buffer[: end + 4]
                self._send_body()
                continue
            if not _is_whole(head, self._buffer, end + 4):
                return
            if b"\r\nconnection: close" in head or not self.body_sent:
                self.reusable = False
            self._settle(status)
            return

    def _settle(self, status: int) -> None:
        self._stop_timer()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(status)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _is_whole(head: bytes, buffer: bytearray, start: int) -> bool:
    if b"\r\ntransfer-encoding: chunked" in head:
        return buffer.endswith(b"0\r\n\r\n")
    length = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
    return len(buffer) >= start + int(length or 0)


class Load:
    """Runs one plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._bodies = [_read(kind.body_path) for kind in plan.kinds]
        self._heads = [kind.head.encode() for kind in plan.kinds]
        self._shares = [kind.share for kind in plan.kinds]
        self._random = random.Random(plan.seed)  # noqa: S311  # arrivals, no secrets
        self._free: list[_Connection] = []
        self._records: list[Record] = []
        self._started_s = 0.0

    async def run(self) -> list[Record]:
        self._free = [await self._connect() for _ in range(self._plan.callers or 64)]
        self._started_s = time.perf_counter()
        if self._plan.callers:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._plan.callers):
                    group.create_task(self._caller())
        else:
            await self._arrivals()
        for connection in self._free:
            connection.leave()
        return self._records

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, "127.0.0.1", self._plan.port)
        return connection

    async def _caller(self) -> None:
        while time.perf_counter() - self._started_s < self._plan.seconds:
            await self._one(self._pick())

    async def _arrivals(self) -> None:
        due_s = 0.0
        async with asyncio.TaskGroup() as group:
            for phase in self._plan.phases:
                end_s = due_s + phase.seconds
                while True:
                    due_s += self._random.expovariate(phase.per_s)
                    if due_s >= end_s:
                        due_s = end_s
                        break
                    wait_s = due_s - (time.perf_counter() - self._started_s)
                    if wait_s > 0:
                        await asyncio.sleep(wait_s)
                    group.create_task(self._one(self._pick()))

    def _pick(self) -> int:
        if len(self._shares) == 1:
            return 0
        return self._random.choices(range(len(self._shares)), self._shares)[0]

    async def _one(self, which: int) -> None:
        kind = self._plan.kinds[which]
        connection = None
        while self._free and connection is None:
            candidate = self._free.pop()
            if candidate.reusable:
                connection = candidate
        started_s = time.perf_counter()
        status = ERROR
        body_sent = False
        try:
            if connection is None:
                connection = await self._connect()
                started_s = time.perf_counter()
            answer = connection.ask(self._heads[which], self._bodies[which], kind)
            async with asyncio.timeout(self._plan.give_up_ms / 1e3):
                status = await answer
        except TimeoutError:
            status = GAVE_UP
        except OSError:
            pass
        ended_s = time.perf_counter()
        if connection is not None:
            body_sent = connection.body_sent
            if status > 0 and connection.reusable:
                self._free.append(connection)
            else:
                connection.leave()
        self._records.append(
            Record(
                at_s=started_s - self._started_s,
                kind=which,
                status=status,
                ms=(ended_s - started_s) * 1e3,
                body_sent=body_sent,
            )
        )


def _read(path: str) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123  # read once, before the load begins
        return file.read()


def main() -> None:
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    records = asyncio.run(Load(plan).run())
    sys.stdout.buffer.write(msgspec.json.encode(records))


if __name__ == "__main__":
    main()
