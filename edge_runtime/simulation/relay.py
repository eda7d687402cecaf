"""A TCP relay on loopback that behaves like a mobile link.

    async with Relay("127.0.0.1", 8080, find_schedule("commuter", 1)) as relay:
        ...  # talk to relay.url instead

Every byte waits for its turn on the link (all connections share it, first come, first
served), then for half a round trip. The rate and the round-trip time follow a
``LinkSchedule``; in an outage nothing passes and nothing is lost. A new connection costs a
round trip before its first byte leaves. At most 32 KiB of a connection wait before the
link, then the relay stops reading, so back-pressure reaches the sender; a
reset discards what has not crossed.

What it leaves out: packet loss, slow start, and the promotion of an idle radio. The
connection's set-up shows as a wait for the first byte, since no relay can hold back the
handshake of its own kernel.

It also runs alone, controlled by lines on a second port::

    python -m edge_runtime.simulation.relay --target 127.0.0.1:8080 --schedule commuter
    {"url": "http://127.0.0.1:41207", "control_port": 38123, ...}

The control port takes ``stats`` and ``restart`` (the schedule from its start) and answers
each with the statistics as one JSON line. With ``--traces DIR --trace NAME`` it plays a
recorded uplink instead of a built-in schedule, from ``--offset-s`` on. ``--host`` is the
address to listen on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import sys
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from edge_runtime.contract.errors import ConfigError, NearfarError
from edge_runtime.simulation.connection import Connection, bounded_socket
from edge_runtime.simulation.emulated_link import EmulatedLink
from edge_runtime.simulation.links import SCHEDULE_NAMES, LinkSchedule, find_schedule
from edge_runtime.simulation.played import trace_schedule
from edge_runtime.simulation.traces import read_traces

__all__ = ["Relay", "RelayStats"]

_MAX_CONTROL_LINE: Final = 64


class RelayStats(msgspec.Struct, frozen=True, kw_only=True):
    """Since the relay was made, except for ``elapsed_s``."""

    elapsed_s: float
    """Since the schedule started or restarted."""
    uplink_bytes: int
    """That crossed the link from clients to the target."""
    downlink_bytes: int
    connections: int
    discarded_bytes: int
    """That were sent and dropped before they crossed, by a reset."""


class Relay:
    """One emulated link in front of one TCP server. An asynchronous context manager.

    Raises ``ConfigError`` on entering when the port cannot be bound.
    """

    def __init__(
        self,
        target_host: str,
        target_port: int,
        schedule: LinkSchedule,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self._target = (target_host, target_port)
        self._address = (host, port)
        self._schedule = schedule
        self._link: EmulatedLink | None = None
        self._server: asyncio.Server | None = None
        self._open: set[Connection] = set()
        self._connections = 0

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._link = EmulatedLink(self._schedule)
        listening = bounded_socket()
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(self._address)
            self._server = await loop.create_server(self._accept, sock=listening)
        except OSError as error:
            listening.close()
            raise ConfigError(
                f"cannot listen on {self._address[0]}:{self._address[1]}: {error.strerror}; "
                "choose another port, or 0 for a free one"
            ) from None
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None  # noqa: S101  # entered
        self._server.close()
        connections = list(self._open)
        for connection in connections:
            connection.abort()
        await asyncio.gather(*(connection.ended() for connection in connections))
        await self._server.wait_closed()

    @property
    def port(self) -> int:
        """The port that clients connect to."""
        assert self._server is not None  # noqa: S101  # entered
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        """``http://HOST:PORT`` of the relay."""
        return f"http://{self._address[0]}:{self.port}"

    def restart(self) -> None:
        """Start the schedule anew; counters and connections stay."""
        self._running().restart()

    def stats(self) -> RelayStats:
        """Counters now."""
        link = self._running()
        return RelayStats(
            elapsed_s=asyncio.get_running_loop().time() - link.started_s,
            uplink_bytes=link.uplink.crossed_bytes,
            downlink_bytes=link.downlink.crossed_bytes,
            connections=self._connections,
            discarded_bytes=link.discarded_bytes,
        )

    def _running(self) -> EmulatedLink:
        assert self._link is not None  # noqa: S101  # entered
        return self._link

    def _accept(self) -> asyncio.Protocol:
        self._connections += 1
        connection = Connection(self._running(), self._target, self._open.discard)
        self._open.add(connection)
        return connection.client


async def _serve_control(relay: Relay) -> asyncio.Server:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, asyncio.IncompleteReadError):
            while line := await reader.readline():
                if line.strip() == b"restart":
                    relay.restart()
                elif line.strip() != b"stats":
                    writer.write(b'{"error": "write stats or restart"}\n')
                    continue
                writer.write(msgspec.json.encode(relay.stats()) + b"\n")
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", 0, limit=_MAX_CONTROL_LINE)


def _schedule(arguments: argparse.Namespace) -> LinkSchedule:
    """The one that the command line asks for. Raises ``ConfigError``."""
    if arguments.traces is None:
        return find_schedule(arguments.schedule, arguments.seed)
    traces = {trace.name: trace for trace in read_traces(arguments.traces).traces}
    if arguments.trace not in traces:
        raise ConfigError(f"no trace {arguments.trace!r} in {arguments.traces}")
    return trace_schedule(
        traces[arguments.trace], offset_s=arguments.offset_s, seconds=arguments.seconds
    )


async def _run(arguments: argparse.Namespace) -> None:
    target = arguments.target
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--target {target!r}: write HOST:PORT")
    schedule = _schedule(arguments)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with Relay(host, int(port), schedule, host=arguments.host) as relay:
        control = await _serve_control(relay)
        ready = {
            "url": relay.url,
            "control_port": control.sockets[0].getsockname()[1],
            "schedule": arguments.trace or arguments.schedule,
            "seed": arguments.seed,
            "period_s": schedule.period_s,
        }
        print(json.dumps(ready), flush=True)  # noqa: T201  # whoever started it reads this
        await stop.wait()
        control.close()


def main() -> None:
    """Parse the command line and run until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m edge_runtime.simulation.relay",
        description="Relay TCP over an emulated mobile link. Prints one JSON line when ready.",
    )
    parser.add_argument("--target", required=True, metavar="HOST:PORT")
    parser.add_argument("--schedule", choices=SCHEDULE_NAMES, default="commuter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--traces", type=Path, metavar="DIR", help="recorded uplinks")
    parser.add_argument("--trace", metavar="NAME", help="which of them")
    parser.add_argument("--offset-s", type=float, default=0.0, help="where to enter it")
    parser.add_argument("--seconds", type=float, default=600.0, help="until it starts again")
    arguments = parser.parse_args()
    try:
        asyncio.run(_run(arguments))
    except NearfarError as error:
        print(f"error [{error.code}]: {error.detail}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


if __name__ == "__main__":
    main()
