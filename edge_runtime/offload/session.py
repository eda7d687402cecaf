"""One session with a broker: a WebSocket, the multiplexer, and two tasks that wait.

A task reads frames, another writes them; both sleep while nothing happens. The socket's own
backlog is kept small (``backlog.py``), so that a cancelled upload is over when it says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final

import aiohttp

from edge_runtime.contract import limits
from edge_runtime.contract.errors import ContractError, NetworkUnreachable
from edge_runtime.contract.frames import (
    Data,
    Error,
    Hello,
    Pong,
    Progress,
    Reject,
    Request,
    Welcome,
    decode_frame,
    encode_frame,
)
from edge_runtime.offload.backlog import LOW_WATER_BYTES, limit_backlog, unsent_bytes
from edge_runtime.offload.multiplexer import (
    Answered,
    Event,
    Hinted,
    Multiplexer,
    Ponged,
    Refused,
    Sending,
)
from edge_runtime.offload.places import Places
from edge_runtime.offload.rate_meter import RateMeter
from edge_runtime.offload.session_messages import from_error, from_result
from edge_runtime.offload.transport import HttpResponse, PathListener, UploadReceipt

__all__ = ["Session", "SessionLost"]

_BACKLOG_PAUSE_S: Final = 0.005
_AHEAD_S: Final = 2 * _BACKLOG_PAUSE_S
"""What the link takes until we look again must be there already."""
_CLOSE_S: Final = 1.0
_SILENT_S: Final = 1.0
"""A request that ends without a frame for so long makes us ask whether the broker is there."""
_CHECK_S: Final = 2.0


class SessionLost(NetworkUnreachable):
    """The connection ended while a request was in flight: it may be asked again."""


class Session:
    """Of one upgraded connection. Everything runs in one event loop."""

    def __init__(
        self,
        connection: aiohttp.ClientWebSocketResponse,
        *,
        api_key: str | None,
        listener: PathListener | None,
    ) -> None:
        self._connection = connection
        self._listener = listener
        self._multiplexer = Multiplexer()
        self._meter = RateMeter()
        self.places = Places(limits.MAX_SESSION_REQUESTS, limits.MAX_SESSION_UPLOAD_BYTES)
        self._waiting: dict[int, asyncio.Future[HttpResponse]] = {}
        self._receipts: dict[int, tuple[UploadReceipt, Sending]] = {}
        self._pings: dict[int, asyncio.Future[Pong]] = {}
        self._wake = asyncio.Event()
        self._unheard_s: float | None = None
        """Since when a request waits and nothing came."""
        self._checking: asyncio.Task[None] | None = None
        self._socket = connection.get_extra_info("socket")
        self.heard = False
        """The broker said something: nothing on the way stops a session."""
        self.draining = False
        self.lost_requests = 0
        """In flight when it ended."""
        self.refusal: Error | None = None
        """Why the broker ended it, where it said so."""
        self.ended = asyncio.Event()
        if self._socket is not None:
            limit_backlog(self._socket)
        self._multiplexer.greet(Hello(api_key=api_key, client="nearfar-edge"))
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]

    @property
    def usable(self) -> bool:
        """Whether a new request may go this way: not while it is ending, or may be dead."""
        doubtful = self.draining or self._multiplexer.exhausted or self._checking is not None
        return not (self.ended.is_set() or doubtful)

    # Requests ---------------------------------------------------------------------------

    async def exchange(
        self, request: Request, body: bytes, receipt: UploadReceipt | None = None
    ) -> HttpResponse:
        """Ask for one answer. Cancelling it tells the broker, and keeps the connection.

        Raises ``SessionLost`` when the connection ends first.
        """
        if self.ended.is_set():
            raise SessionLost("the session with the broker has ended: try again")
        now = time.monotonic()
        sending = self._multiplexer.request(request, body, now)
        future: asyncio.Future[HttpResponse] = asyncio.get_running_loop().create_future()
        self._waiting[sending.request.id] = future
        if receipt is not None:
            self._receipts[sending.request.id] = (receipt, sending)
            self._note(sending.request.id)
        if self._unheard_s is None:
            self._unheard_s = now
        self._wake.set()
        try:
            return await future
        except asyncio.CancelledError:
            self._multiplexer.cancel(sending)
            self._wake.set()
            unheard_s = self._unheard_s
            if unheard_s is not None and time.monotonic() - unheard_s >= _SILENT_S:
                self.check()
            raise
        finally:
            self._waiting.pop(sending.request.id, None)
            self._note(sending.request.id)
            self._receipts.pop(sending.request.id, None)
            self._meter.forget(sending.request.id)

    async def ping(self) -> Pong:
        """Ask whether the broker is there and ready.

        Without an answer within 2 s the session ends. Raises ``SessionLost``.
        """
        if self.ended.is_set():
            raise SessionLost("the session with the broker has ended: try again")
        future: asyncio.Future[Pong] = asyncio.get_running_loop().create_future()
        number = self._multiplexer.ping()
        self._pings[number] = future
        self._wake.set()
        try:
            async with asyncio.timeout(_CHECK_S):
                return await future
        except TimeoutError:
            self._end("it fell silent")
            raise SessionLost("the session with the broker fell silent: try again") from None
        finally:
            self._pings.pop(number, None)

    async def aclose(self) -> None:
        """Close the connection; requests in flight end with ``SessionLost``."""
        self._end("it was closed")
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_CLOSE_S):
                await self._connection.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def check(self) -> None:
        """Find out whether the broker is still there; until it says so, ``usable`` is false."""
        if self._checking is None and not self.ended.is_set():
            self._checking = asyncio.create_task(self._check())
            self._tasks.append(self._checking)

    async def _check(self) -> None:
        try:
            with contextlib.suppress(SessionLost):
                await self.ping()
        finally:
            if self._checking is not None:
                self._tasks.remove(self._checking)
            self._checking = None

    # Frames -----------------------------------------------------------------------------

    async def _read(self) -> None:
        why = "the broker closed it"
        try:
            while True:
                message = await self._connection.receive()
                if message.type is not aiohttp.WSMsgType.BINARY:
                    break
                now, self.heard = time.monotonic(), True
                self._unheard_s = now if self._waiting else None
                frame = decode_frame(message.data)
                event = self._multiplexer.receive(frame, now)
                if isinstance(frame, Progress):
                    self._note(frame.id)
                elif isinstance(frame, Welcome):
                    self.places.requests = max(1, frame.max_requests)
                if event is not None:
                    self._on_event(event)
                self._measure()
                self._wake.set()
        except ContractError as error:
            why = f"the broker broke its rules: {error.detail}"
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            why = f"it broke ({type(error).__name__})"
        finally:
            self._end(why)

    async def _write(self) -> None:
        try:
            while not self.ended.is_set():
                now = time.monotonic()
                full = self._multiplexer.uploading and self._backlogged(now)
                frame = self._multiplexer.next_frame(now, data=not full)
                if frame is not None:
                    if isinstance(frame, Data):
                        self._note(frame.id)
                    await self._connection.send_bytes(encode_frame(frame))
                    await asyncio.sleep(0)  # acknowledgements and cancels get their turn
                    continue
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_BACKLOG_PAUSE_S if full else None):
                        await self._wake.wait()
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            self._end(f"it broke ({type(error).__name__})")

    def _backlogged(self, now_s: float) -> bool:
        """Whether enough bytes wait on this device, in the kernel or before it, for now."""
        waiting = unsent_bytes(self._socket)
        carrier = self._connection._conn  # there is no public way to the transport
        if carrier is not None and carrier.transport is not None:
            waiting += carrier.transport.get_write_buffer_size()
        ahead = int(self._multiplexer.window.rate(now_s) * _AHEAD_S)
        return waiting >= max(LOW_WATER_BYTES, ahead)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Answered):
            self._answer(event)
        elif isinstance(event, Refused):
            self._refuse(event.sending, event.why)
        elif isinstance(event, Ponged):
            if self._listener is not None:
                self._listener.round_trip(event.round_trip_s * 1e3)
            self.draining = self.draining or event.pong.draining
            future = self._pings.get(event.id)
            if future is not None and not future.done():
                future.set_result(event.pong)
        elif isinstance(event, Hinted):
            self.draining = self.draining or event.draining
            if self._listener is not None and event.queue_delay_ms is not None:
                self._listener.queue_delay(event.queue_delay_ms)
            if self._listener is not None and event.round_trip_s is not None:
                self._listener.round_trip(event.round_trip_s * 1e3)
        else:
            self.refusal = event.why
            for sending in tuple(self._multiplexer.open.values()):
                self._refuse(sending, event.why)

    def _answer(self, event: Answered) -> None:
        now, sending = time.monotonic(), event.sending
        first_s = sending.first_byte_s or now
        response = from_result(
            event.result,
            event.body,
            first_byte_ms=(first_s - sending.opened_s) * 1e3,
            body_ms=(now - first_s) * 1e3,
        )
        self._settle(sending, response)

    def _refuse(self, sending: Sending, why: Reject | Error) -> None:
        waited_ms = (time.monotonic() - sending.opened_s) * 1e3
        self._settle(sending, from_error(why, first_byte_ms=waited_ms))

    def _settle(self, sending: Sending, response: HttpResponse) -> None:
        future = self._waiting.get(sending.request.id)
        if future is not None and not future.done():
            future.set_result(response)

    def _note(self, request_id: int) -> None:
        """Tell whoever reads the receipt of an upload how far it came."""
        known = self._receipts.get(request_id)
        if known is not None:
            receipt, sending = known
            _fill(receipt, sending, rate_reported=self._meter.reported(request_id))

    def _measure(self) -> None:
        delivered_bytes = self._multiplexer.window.delivered_bytes
        rate = self._meter.observe(self._multiplexer.open.values(), delivered_bytes)
        if rate is not None and self._listener is not None:
            self._listener.rate(rate)

    def _end(self, why: str) -> None:
        if self.ended.is_set():
            return
        self.ended.set()
        self._wake.set()
        self.lost_requests = len(self._waiting)
        lost = f"the session with the broker ended: {why}"
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(SessionLost(lost))
        for pong in self._pings.values():
            if not pong.done():
                pong.set_exception(SessionLost(lost))
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()


def _fill(receipt: UploadReceipt, sending: Sending, *, rate_reported: bool) -> None:
    receipt.multiplexed = True
    receipt.sent_bytes = sending.sent_bytes
    receipt.received_bytes = sending.received_bytes
    receipt.elapsed_ms = sending.elapsed_ms
    receipt.rate_reported = rate_reported
