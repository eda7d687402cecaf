"""A broker on a real socket, in this event loop or in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from broker.server import RunningBroker, serving
from broker.settings import build_settings

_PRECISION = {"precision": "fp32"}
"""Not what the processor is best at: tests hold scores against PyTorch's in fp32."""


@dataclass
class Events:
    """Collects what a broker would log."""

    seen: list[tuple[str, dict[str, object]]] = field(default_factory=list)

    def __call__(self, name: str, fields: Any) -> None:
        self.seen.append((name, dict(fields)))

    def named(self, name: str) -> list[dict[str, object]]:
        return [fields for known, fields in self.seen if known == name]


@contextlib.asynccontextmanager
async def broker_here(models: Path, **settings: Any) -> AsyncIterator[RunningBroker]:
    """A broker in this event loop, models in a thread, on a free port."""
    values = {"executor": "inline", "device": "cpu", "threads": 1, "port": 0, **_PRECISION}
    values |= settings
    built = build_settings(models=(str(models),), **values)
    async with serving(built, Events()) as running:
        yield running


@dataclass
class BrokerProcess:
    """``nearfar serve`` as a user runs it."""

    process: subprocess.Popen[str]
    url: str
    log_path: Path

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self.log_path.read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def logged(self, name: str, count: int = 1) -> list[dict[str, Any]]:
        """The events of this name once ``count`` are there: a line is written after its answer."""
        end_s = time.monotonic() + 10.0
        while len(events := self.events(name)) < count and time.monotonic() < end_s:
            time.sleep(0.005)
        return events

    def worker_pid(self) -> int:
        return int(self.events("worker_ready")[-1]["pid"])


@contextlib.contextmanager
def broker_process(tmp_path: Path, *arguments: str) -> Iterator[BrokerProcess]:
    """Start it, wait until it is ready, and kill it at the end if it still runs."""
    log_path = tmp_path / "broker.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "edge_runtime", "serve", "--port", "0", "--json-ready"),
                *("--device", "cpu", "--threads", "1"),
                *("--precision", _PRECISION["precision"], *arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready, log_path.read_text()
        yield BrokerProcess(process, json.loads(ready)["url"], log_path)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children_of(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if parent_of(int(folder.name)) == pid:
                found.append(int(folder.name))
    return found


def wait_until_gone(pid: int, limit_s: float) -> bool:
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        if not is_running(pid):
            return True
        time.sleep(0.02)
    return not is_running(pid)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that does nothing for the length of the block: a hung worker."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@dataclass
class Reply:
    """An answer, read to its end."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json["code"])


async def request(
    method: str, url: str, session: aiohttp.ClientSession | None = None, **options: Any
) -> Reply:
    async with contextlib.AsyncExitStack() as stack:
        if session is None:
            session = await stack.enter_async_context(aiohttp.ClientSession())
        async with session.request(method, url, **options) as response:
            return Reply(response.status, response.headers, await response.read())


async def predict(
    url: str,
    image: bytes,
    *,
    model: str = "tiny",
    content_type: str | None = "image/png",
    deadline_ms: int | str | None = 10_000,
    query: str = "",
    headers: dict[str, str] | None = None,
    session: aiohttp.ClientSession | None = None,
) -> Reply:
    """POST an image as a device would."""
    sent = dict(headers or {})
    if content_type is not None:
        sent["Content-Type"] = content_type
    if deadline_ms is not None:
        sent["X-Deadline-Ms"] = str(deadline_ms)
    address = f"{url}/v1/models/{model}:predict{query}"
    return await request("POST", address, session, data=image, headers=sent)


def answers_in(received: bytes) -> int:
    """How many whole answers these bytes hold; an interim 100 is none."""
    count = 0
    while b"\r\n\r\n" in received:
        head, _, received = received.partition(b"\r\n\r\n")
        if head.split(b" ", 2)[1] == b"100":
            continue
        length = re.search(rb"(?i)content-length: (\d+)", head)
        size = int(length[1]) if length else 0
        if len(received) < size:
            break
        received = received[size:]
        count += 1
    return count


async def raw_exchange(
    url: str, data: bytes, *, answers: int | None = None, limit_s: float = 10.0
) -> bytes:
    """Send bytes as they are; read so many answers, or until the server closes."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    received = b""
    try:
        writer.write(data)
        await writer.drain()
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(limit_s):
                while piece := await reader.read(65_536):
                    received += piece
                    if answers is not None and answers_in(received) >= answers:
                        break
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return received


async def until(condition: Any, limit_s: float = 10.0) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
