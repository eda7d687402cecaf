"""Exchanges with one broker, beside its images: health, its models, its load, its jobs.

The coroutines run in the event loop of the network thread, which alone changes the state.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from edge_runtime.contract.errors import (
    BrokerFault,
    DeadlineExceeded,
    NearfarError,
    NetworkUnreachable,
    WireError,
)
from edge_runtime.offload.discovery import Expected, ServedModel, choose_model, decode_models
from edge_runtime.offload.health import Health
from edge_runtime.offload.measurements import Measurements, PathReports
from edge_runtime.offload.messages import (
    decode_load,
    health_request,
    load_request,
    models_request,
    refusal,
)
from edge_runtime.offload.transport import (
    HttpRequest,
    HttpResponse,
    ReportsPath,
    StreamsAnswers,
    Transport,
)

__all__ = ["Contact"]

_BACKGROUND_S = 3.0
"""A health or discovery request without an answer after this is a hard failure."""
_HOLD_S = 10.0
_LOAD_PAUSE_S = 2.0
_DRAINING_S = 5.0
_MAX_STREAMS = 2
"""Event streams that are open at a time, so that connections are left for images."""


class Contact:
    """Asks the broker behind ``transport``, and leaves it alone in time."""

    def __init__(
        self,
        transport: Transport,
        *,
        expected: Expected,
        cloud_model: str | None,
        api_key: str | None,
        measured: Measurements,
        random: Callable[[], float],
    ) -> None:
        self._transport = transport
        self.expected = expected
        self._wanted = cloud_model
        self.api_key = api_key
        self._health = Health(random)
        self._measured = measured
        if isinstance(transport, ReportsPath):
            transport.report_to(PathReports(measured))
        self._model: ServedModel | None = None
        self._busy = 0
        self._streams = 0
        self._warming: asyncio.Task[bool] | None = None
        self._finding: asyncio.Task[ServedModel] | None = None
        self._warmed_s = float("-inf")
        self._closing = False
        self._loads = True
        """Not known to have no ``GET /v1/load``."""
        self._load_s = float("-inf")
        self._draining_until_s = float("-inf")

    # Compared with others: see fleet.py ---------------------------------------------------

    @property
    def usable(self) -> bool:
        """Nothing is known that speaks against asking it."""
        closed = self._health.breaker.state == "CLOSED"
        draining = time.monotonic() < self._draining_until_s
        return closed and not draining and self._health.held_error() is None

    def expected_ms(self) -> float:
        """A round trip, and the queue as announced lately, else as it usually is."""
        cloud = self._measured.cloud_outlook(time.monotonic())
        return self._measured.path.rtt.srtt_ms + cloud.queue_ms + cloud.tail_ms

    async def refresh(self) -> None:
        """Ask how long its queue is, or whether a broken one is back; not too often."""
        now = time.monotonic()
        if self._health.breaker.state != "CLOSED":
            if self._health.breaker.probe_due(now):
                await self._warm()
            return
        if not self._loads or now - self._load_s < _LOAD_PAUSE_S:
            return
        self._load_s = now
        try:
            response = await self._background(load_request(self.api_key))
        except NearfarError:  # recorded where it happened
            return
        self._health.alive()
        self._loads = response.status != 404
        load = decode_load(response)
        if load is None:
            return
        PathReports(self._measured).queue_delay(load.queue_delay_ms)
        if load.draining:
            self._draining_until_s = now + _DRAINING_S

    def _connection_idle(self) -> bool:
        return self._transport.open_connections > self._busy

    def _setup_round_trips(self) -> int:
        """TCP's, and TLS 1.3's one more, unless a connection is open."""
        if self._connection_idle():
            return 0
        return 2 if self._transport.secure else 1

    # What jobs need -------------------------------------------------

    async def model_name(self) -> str:
        """The cloud model for this bundle. Raises what ``submit`` raises before its upload."""
        await self._require_open()
        return (await self._find()).name

    async def ask(self, request: HttpRequest, limit_s: float) -> HttpResponse:
        """One exchange that is no image with a deadline; any status is an answer.

        Raises ``CircuitOpen``, ``RemoteError`` or ``WireError``.
        """
        await self._require_open()
        try:
            async with asyncio.timeout(limit_s):
                response = await self._send(request)
        except TimeoutError:
            raise DeadlineExceeded(f"the broker did not answer within {limit_s:.0f} s") from None
        no = refusal(response)
        if no is not None and no.hard:
            self._health.failed(no.error, hold_s=no.hold_s)
        else:
            self._health.alive()
        return response

    async def stream(self, request: HttpRequest) -> AsyncGenerator[bytes, None]:
        """An answer as it comes; ends at once where the transport cannot do that."""
        if not isinstance(self._transport, StreamsAnswers) or self._streams >= _MAX_STREAMS:
            return
        self._streams += 1
        self._busy += 1
        try:
            async with aclosing(self._transport.stream(request)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self._streams -= 1
            self._busy -= 1

    async def _require_open(self) -> None:
        """Leave a broker alone that fails, or probe it when that is due."""
        self._health.require_not_held()
        if self._health.breaker.state != "CLOSED":
            await self._warm()
            self._health.require_closed()

    async def _send(self, request: HttpRequest) -> HttpResponse:
        """One exchange; no answer at all is a hard failure."""
        self._busy += 1
        try:
            return await self._transport.send(request)
        except DeadlineExceeded as error:
            self._health.missed(error)
            raise
        except NearfarError as error:
            self._health.failed(error)
            raise
        except Exception as error:  # a transport of the user's own
            fault = BrokerFault(f"the transport failed: {type(error).__name__}: {error}")
            self._health.failed(fault)
            raise fault from error
        finally:
            self._busy -= 1
            self._measured.used(time.monotonic())

    # In the event loop: finding the model, opening connections -----------------------

    async def _find(self) -> ServedModel:
        """The cloud model for this bundle; concurrent callers share one request."""
        if self._model is not None:
            return self._model
        if self._finding is None:
            self._finding = asyncio.create_task(self._fetch_model())
            self._finding.add_done_callback(self._end_finding)
        return await asyncio.shield(self._finding)

    def _end_finding(self, task: asyncio.Task[ServedModel]) -> None:
        self._finding = None
        if not task.cancelled():
            task.exception()  # retrieved: those who waited may be gone

    async def _fetch_model(self) -> ServedModel:
        response = await self._background(models_request(self.api_key))
        self._health.check_status(response)
        try:
            served = decode_models(response.body)
        except WireError as error:
            self._health.failed(error)
            raise
        try:
            self._model = choose_model(served, self._wanted, self.expected)
        except NearfarError as error:
            self._health.refused(error, hold_s=_HOLD_S)
            raise
        self._health.alive()
        return self._model

    async def _warm(self) -> bool:
        return await asyncio.shield(self._start_warming())

    def _start_warming(self) -> asyncio.Task[bool]:
        if self._warming is None:
            self._warming = asyncio.create_task(self._open_and_find())
            self._warming.add_done_callback(self._end_warming)
        return self._warming

    def _end_warming(self, _task: asyncio.Task[bool]) -> None:
        self._warming = None
        self._warmed_s = time.monotonic()
        self._health.breaker.abandon_probe()  # a probe without an outcome was cancelled

    async def _open_and_find(self) -> bool:
        """A health request, which probes a half-open breaker, then discovery."""
        if self._health.breaker.state != "CLOSED":
            now = time.monotonic()
            if not self._health.breaker.probe_due(now):
                return False
            self._health.breaker.begin_probe(now)
        window_bytes = self._measured.window_bytes(time.monotonic())
        try:
            response = await self._background(health_request(self.api_key))
            no = refusal(response)
            if no is not None and no.hard:
                self._health.failed(no.error)
                return False
            self._health.alive()  # 401 and 404 are signs of life too
            self._measured.learn(response, 0, window_bytes, time.monotonic())
            await self._find()
        except NearfarError:  # recorded where it happened
            return False
        return True

    async def _background(self, request: HttpRequest) -> HttpResponse:
        """An exchange that no caller's deadline bounds."""
        try:
            async with asyncio.timeout(_BACKGROUND_S):
                return await self._send(request)
        except TimeoutError:
            error = NetworkUnreachable(
                f"the broker did not answer within {_BACKGROUND_S:.0f} s: check the network"
            )
            self._health.failed(error)
            raise error from None
