"""One broker process: from settings to the last answer after a signal."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from broker.app import build_application, running_services
from broker.executors.base import EventSink
from broker.http.context import Services
from broker.http.protocol import BrokerProtocol, ConnectionGate
from broker.log import log_event
from broker.models.export import export_spec
from broker.models.repository import Repository
from broker.settings import Settings, is_loopback
from edge_runtime.contract.errors import ConfigError

__all__ = ["RunningBroker", "run_broker", "serving"]

_BACKLOG = 1024
_SPARE_FILES = 64
_YOUNG_OBJECTS = 10_000
_DRAIN_POLL_S = 0.01
_HTTP_OPTIONS: Final[dict[str, Any]] = {
    "keepalive_timeout": 75.0,
    "lingering_time": 5.0,  # how long the rest of a refused body is read and thrown away
    "max_line_size": 8190,
    "max_field_size": 8190,
    "max_headers": 100,
    "auto_decompress": False,
    "access_log": None,
}


@dataclass(frozen=True, slots=True)
class RunningBroker:
    """A broker that answers requests."""

    url: str
    services: Services

    @property
    def models(self) -> tuple[str, ...]:
        """Names of what it serves, sorted."""
        return self.services.repository.names


async def run_broker(settings: Settings, announce: Callable[[RunningBroker], None]) -> int:
    """Serve until SIGTERM or SIGINT; answer what is in flight; return the exit status.

    A second signal ends the process at once. Raises what ``serving`` raises.
    """
    stop = asyncio.Event()
    started = asyncio.Event()

    async def serve() -> int:
        async with serving(settings, log_event) as broker:
            started.set()
            _spare_collections()
            announce(broker)
            return await _until_stopped(stop, broker.services)

    with _signals_set(stop):
        work = asyncio.create_task(serve(), name="broker")
        stopped = asyncio.create_task(stop.wait(), name="signal")
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not started.is_set() and not work.done():
            work.cancel()  # still loading: nobody waits for an answer
            with contextlib.suppress(asyncio.CancelledError):
                await work
            return 0
        return await work


def _spare_collections() -> None:
    """Keep the garbage collector from what lives as long as the process.

    A full collection walks every module that was loaded and stops all requests meanwhile. Young
    objects are looked at less often too: nearly all of them are freed by their reference counts.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])


async def _until_stopped(stop: asyncio.Event, services: Services) -> int:
    """0 after a signal; 1 when the scheduler died, which only a bug of ours can do."""
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait({waiting, services.feeding}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not services.feeding.done():
        return 0
    log_event("scheduler_died", {"error": repr(services.feeding.exception())})
    return 1


@contextlib.asynccontextmanager
async def serving(settings: Settings, events: EventSink) -> AsyncIterator[RunningBroker]:
    """A broker that listens, for the length of the block; then it drains.

    Draining: no new connection, no new request admitted, what is in flight is answered
    within ``drain_timeout_s``, the rest gets a 503. Raises ``ConfigError`` (also when the
    port is taken) and whatever is wrong with the models.
    """
    _allow_open_files(settings.max_connections + _SPARE_FILES)
    with _bound_socket(settings) as listener, _scratch(settings) as scratch:
        folders = [*settings.folders]
        for number, spec in enumerate(settings.specs):
            folders.append(scratch / f"spec-{number}")
            await export_spec(spec, folders[-1], events)
        repository = await asyncio.to_thread(Repository.open, folders)
        async with running_services(settings, repository, events) as services:
            runner = web.AppRunner(
                build_application(services),
                handler_cancellation=True,
                shutdown_timeout=1.0,
                **_HTTP_OPTIONS,
            )
            await runner.setup()
            server = await _listen(listener, runner, settings, services)
            try:
                yield RunningBroker(url=_url(listener), services=services)
            finally:
                server.close()
                await _drain(services, settings.drain_timeout_s, events)
                await runner.cleanup()


async def _listen(
    listener: socket.socket, runner: web.AppRunner, settings: Settings, services: Services
) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    gate = ConnectionGate(settings.max_connections, services.telemetry)
    handler = runner.server
    assert handler is not None  # noqa: S101  # setup() made it

    def connection() -> BrokerProtocol:
        return BrokerProtocol(handler, gate, loop=loop, **_HTTP_OPTIONS)

    return await loop.create_server(connection, sock=listener, backlog=_BACKLOG)


async def _drain(services: Services, timeout_s: float, events: EventSink) -> None:
    loop = asyncio.get_running_loop()
    end_s = loop.time() + timeout_s
    services.draining = True
    services.scheduler.drain()
    services.jobs.drain()
    services.sessions.drain()
    events("draining", {"in_flight": services.in_flight})
    while services.in_flight and loop.time() < end_s:  # noqa: ASYNC110  # once in a lifetime
        await asyncio.sleep(_DRAIN_POLL_S)
    await services.scheduler.close()
    await services.sessions.close()
    events("drained", {"abandoned": services.in_flight})


@contextlib.contextmanager
def _bound_socket(settings: Settings) -> Iterator[socket.socket]:
    """Bound before the models load, so that a taken port is known at once; not listening."""
    try:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot use host {settings.host!r}: {error.strerror}") from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise ConfigError(
                f"cannot bind {settings.host} port {settings.port} ({error.strerror}): "
                "pass another --port, or 0 for a free one"
            ) from None
        bound = str(listener.getsockname()[0])
        if settings.keys is None and not is_loopback(bound):
            raise ConfigError(f"{settings.host!r} is now {bound}, which others can reach")
        yield listener


@contextlib.contextmanager
def _scratch(settings: Settings) -> Iterator[Path]:
    """A folder for exported specs; the worker reads it again when it restarts."""
    if not settings.specs:
        yield Path(os.devnull)
        return
    with tempfile.TemporaryDirectory(prefix="nearfar-serve-") as folder:
        yield Path(folder)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _allow_open_files(needed: int) -> None:
    """Raise the soft limit on open files, up to the hard one. ``ConfigError`` beyond."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ConfigError(
                f"this process may open {hard} files, {needed} are needed: raise the limit "
                "(ulimit -Hn) or pass a lower --max-connections"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextlib.contextmanager
def _signals_set(stop: asyncio.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set ``stop``; the second one ends the process at once."""
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)  # workers end with their input
        log_event("signal", {"name": signal.Signals(number).name})
        stop.set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
