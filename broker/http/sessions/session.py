"""One session: reads frames, runs each request as a task, and ends them with itself.

    HELLO ─▶ WELCOME ─▶ { REQUEST ─▶ ADMIT ─▶ DATA/PROGRESS ... ─▶ RESULT | ERROR
                                  └▶ REJECT        CANCEL ─▶ CANCEL } ...

A frame that makes no sense ends the session with ERROR (id 0); a request that makes no
sense ends that request only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from dataclasses import dataclass
from typing import Final

import msgspec
from aiohttp import WSMsgType, web

from broker.accounts.keys import Principal
from broker.http.answering import answer_once
from broker.http.context import Services, Trace
from broker.http.errors import INTERNAL_DETAIL, status_of
from broker.http.record import CLIENT_LEFT, record_request, retry_after_s
from broker.http.reply import Reply
from broker.http.sessions.asks import read_ask
from broker.http.sessions.outbox import Outbox, SlowReader
from broker.http.sessions.upload import SessionUpload
from broker.log import log_event
from broker.models.servable import ModelKey
from broker.scheduling.admission import UploadRate
from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    BrokerFault,
    NearfarError,
    Overloaded,
    UploadStalled,
    WireError,
)
from edge_runtime.contract.frames import (
    SESSION_PATH,
    Admit,
    Cancel,
    Data,
    Error,
    Frame,
    Hello,
    Hint,
    Ping,
    Pong,
    Reject,
    Request,
    Result,
    Welcome,
    decode_frame,
)
from edge_runtime.contract.wire import JSON_MEDIA_TYPE

__all__ = ["Session"]

_LOG = logging.getLogger(__name__)
_CLOSE_BASE: Final = 4000
"""Close codes of ours: this plus the HTTP status that says the same."""
_FLUSH_POLL_S: Final = 0.002
_MAX_DETAIL_CHARS: Final = 1000
_ROUTE: Final = "session_predict"


@dataclass(slots=True, eq=False)
class _Exchange:
    """One request in flight."""

    trace: Trace
    upload: SessionUpload
    status: int = CLIENT_LEFT
    task: asyncio.Task[None] | None = None


class Session:
    """One upgraded connection, until its end.

    ``principal``: whom a header of the upgrade named, if one did; HELLO may leave it so.
    ``address``: of the device.
    """

    def __init__(
        self,
        services: Services,
        connection: web.WebSocketResponse,
        principal: Principal | None = None,
        address: str | None = None,
    ) -> None:
        self._services = services
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox(services.telemetry)
        self._principal = principal
        self._address = address
        self._upload_rate = UploadRate()
        self._exchanges: dict[int, _Exchange] = {}
        self._last_id = 0
        self._last_frame_s = self._opened_s = self._loop.time()
        self._requests = 0
        self._reason = "left"
        self._shutting: asyncio.Task[object] | None = None
        self._ended = asyncio.Event()
        self.told_delay_ms: dict[ModelKey, int] = {}

    # What the registry asks -----------------------------------------------------------

    def tell(self, hint: Hint) -> None:
        """Queue a hint."""
        with contextlib.suppress(SlowReader):  # its own next frame ends it
            self._outbox.add(hint)

    def idle_since_s(self) -> float | None:
        """When its last frame came; None while something is under way."""
        return None if self._exchanges or not self._outbox.empty else self._last_frame_s

    def shut(self, code: int, reason: str) -> None:
        """Close it in the background."""
        if self._shutting is None:
            self._reason = reason
            self._shutting = asyncio.create_task(self._connection.close(code=code))

    async def ended(self) -> None:
        """Wait for its end."""
        await self._ended.wait()

    # Its life -------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until either side closes."""
        self._services.sessions.enter(self)
        writer = asyncio.create_task(self._write())
        try:
            await self._greet()
            while (frame := await self._read()) is not None:
                self._handle(frame)
        except SlowReader:
            self._cut_off()
        except NearfarError as error:
            await self._refuse(error)
        finally:
            writer.cancel()
            self._abandon()
            self._services.sessions.leave(self)
            self._log_end()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await writer
            if self._shutting is not None and not self._shutting.done():
                with contextlib.suppress(Exception):
                    await self._shutting
            self._ended.set()

    async def _greet(self) -> None:
        try:
            async with asyncio.timeout(limits.MAX_HELLO_MS / 1e3):
                frame = await self._read()
        except TimeoutError:
            raise UploadStalled("no HELLO came: send it as the first frame") from None
        if frame is None:
            return
        if not isinstance(frame, Hello):
            raise WireError("the first frame must be HELLO")
        key_ring = self._services.key_ring
        if key_ring is not None and (self._principal is None or frame.api_key is not None):
            said = None if frame.api_key is None else f"Bearer {frame.api_key}"
            self._principal = key_ring.authenticate(said)
        tenant = "" if self._principal is None else self._principal.tenant
        self._outbox.add(Welcome(idle_ms=self._services.sessions.idle_ms))
        self._services.sessions.identify(self, tenant)

    async def _read(self) -> Frame | None:
        """The next frame; None when the connection has ended."""
        message = await self._connection.receive()
        if message.type is WSMsgType.BINARY:
            self._last_frame_s = self._loop.time()
            frame = decode_frame(message.data)
            self._services.telemetry.session_frame("in", type(frame).__name__.lower())
            return frame
        if message.type is WSMsgType.TEXT:
            raise WireError("a session speaks in binary messages: see docs/session.md")
        if message.type is WSMsgType.ERROR:  # aiohttp has closed it, with the code for why
            self._reason = "malformed"
        return None

    async def _write(self) -> None:
        try:
            await self._outbox.run(self._connection)
        except TimeoutError:
            self._cut_off()
        except (ConnectionError, RuntimeError):
            return  # closed meanwhile: the reader knows

    def _cut_off(self) -> None:
        """Break the connection: the other side does not listen anyway."""
        self._reason = "slow_reader"
        writer = self._connection._writer  # there is no public way to abort
        if writer is not None and writer.transport is not None:
            writer.transport.abort()

    async def _refuse(self, error: NearfarError) -> None:
        """Say why the session ends, past what waits to be written, and close it."""
        self._reason = error.code
        self._services.telemetry.error_answered(error.code)
        status = status_of(error)
        frame = Error(
            id=0,
            code=error.code,
            detail=error.detail[:_MAX_DETAIL_CHARS],
            status=status,
            retryable=error.retryable,
        )
        with contextlib.suppress(Exception):
            async with asyncio.timeout(1.0):
                self._outbox.add(frame)
                while not self._outbox.empty:  # noqa: ASYNC110  # once in a lifetime
                    await asyncio.sleep(_FLUSH_POLL_S)
                await self._connection.close(code=_CLOSE_BASE + status)
                return
        self._cut_off()

    def _abandon(self) -> None:
        """The connection is gone: requests end, but those that a retry may ask for again."""
        for exchange in self._exchanges.values():
            if exchange.task is not None:
                exchange.task.cancel()

    def _log_end(self) -> None:
        self._services.telemetry.session_closed(self._reason)
        fields: dict[str, object] = {
            "reason": self._reason,
            "code": self._connection.close_code,
            "seconds": round(self._loop.time() - self._opened_s, 3),
            "requests": self._requests,
        }
        if self._principal is not None:
            fields |= {"tenant": self._principal.tenant, "key": self._principal.key_id}
        log_event("session_closed", fields)

    # Frames ---------------------------------------------------------------------------

    def _handle(self, frame: Frame) -> None:
        if isinstance(frame, Data):
            self._take(frame)
        elif isinstance(frame, Request):
            self._open(frame)
        elif isinstance(frame, Cancel):
            self._withdraw(frame)
        elif isinstance(frame, Ping):
            draining = self._services.draining
            ready = self._services.executor.stats().ready and not draining
            self._outbox.add(Pong(id=frame.id, ready=ready, draining=draining))
        else:
            name = type(frame).__name__.upper()
            raise WireError(f"{name} is not for a broker, or not now")

    def _take(self, frame: Data) -> None:
        if frame.id > self._last_id:
            raise WireError(f"DATA for request {frame.id}, which was never made")
        exchange = self._exchanges.get(frame.id)
        if exchange is not None:  # else it was refused while its first bytes were under way
            exchange.upload.feed(frame, self._loop.time())

    def _open(self, frame: Request) -> None:
        if frame.id <= self._last_id:
            raise WireError(f"the id {frame.id} is not larger than {self._last_id}, the last one")
        self._last_id = frame.id
        self._requests += 1
        now_s = self._loop.time()
        trace = Trace(frame.request_id or secrets.token_hex(8), now_s, _ROUTE, self._principal)
        upload = SessionUpload(
            frame, now_s, lambda admit: self._admit(trace, admit), self._outbox.add_progress
        )
        exchange = _Exchange(trace, upload)
        crowded = self._crowded(frame)
        self._exchanges[frame.id] = exchange
        self._services.in_flight += 1
        exchange.task = asyncio.create_task(self._serve(exchange, frame, crowded))
        # Not in a finally of the task: one that is canceled before its first step has none.
        exchange.task.add_done_callback(lambda _: self._close(exchange))

    def _crowded(self, frame: Request) -> Overloaded | None:
        """Why this session can carry no further request now."""
        if len(self._exchanges) >= limits.MAX_SESSION_REQUESTS:
            return Overloaded(
                f"{limits.MAX_SESSION_REQUESTS} requests are in flight on this session: "
                "wait for one of them"
            )
        announced = sum(other.upload.size_bytes for other in self._exchanges.values())
        if announced + frame.size_bytes > limits.MAX_SESSION_UPLOAD_BYTES and self._exchanges:
            return Overloaded("too many bytes are in flight on this session: wait for an answer")
        return None

    def _admit(self, trace: Trace, admit: Admit) -> None:
        assert trace.model is not None  # noqa: S101  # admission knows it
        delay_ms = self._told(trace.model)
        self._outbox.add(msgspec.structs.replace(admit, queue_delay_ms=delay_ms))

    def _told(self, model: ModelKey) -> int:
        """The queue delay of ``model``, which the device will now know."""
        delay_ms = self._services.scheduler.queue_delay_ms(model)
        self.told_delay_ms[model] = delay_ms
        return delay_ms

    def _withdraw(self, frame: Cancel) -> None:
        if frame.id > self._last_id:
            raise WireError(f"CANCEL of request {frame.id}, which was never made")
        exchange = self._exchanges.pop(frame.id, None)  # its place is free at once
        phase = "ended"
        if exchange is not None and exchange.task is not None:
            phase = "waiting" if exchange.upload.complete else "uploading"
            exchange.upload.withdrawn = True
            exchange.task.cancel()
        self._services.telemetry.session_cancel(phase)
        self._outbox.drop(frame.id)
        self._outbox.add(Cancel(id=frame.id))

    # One request ----------------------------------------------------------------------

    async def _serve(self, exchange: _Exchange, frame: Request, crowded: Overloaded | None) -> None:
        services, trace = self._services, exchange.trace
        try:
            if crowded is not None:
                raise crowded
            if services.key_ring is not None and self._principal is not None:
                services.key_ring.require_valid(self._principal)
            ask = read_ask(services, trace, frame, self._address)
            reply = await answer_once(services, trace, ask, self._upload_rate, exchange.upload)
            self._answer(frame, trace, reply)
            exchange.status = 200
        except NearfarError as error:
            exchange.status, trace.code = status_of(error), error.code
            self._fail(frame.id, trace, error, exchange.status)
        except Exception:
            _LOG.exception("request %s failed in a way nobody foresaw", trace.request_id)
            exchange.status, trace.code = 500, BrokerFault.code
            self._fail(frame.id, trace, BrokerFault(INTERNAL_DETAIL), exchange.status)

    def _close(self, exchange: _Exchange) -> None:
        """It has ended, one way or another."""
        self._services.in_flight -= 1
        exchange.upload.close()
        self._exchanges.pop(exchange.upload.id, None)
        record_request(
            self._services,
            exchange.trace,
            method="REQUEST",
            path=SESSION_PATH,
            status=exchange.status,
            now_s=self._loop.time(),
        )

    def _answer(self, frame: Request, trace: Trace, reply: Reply) -> None:
        assert trace.model is not None  # noqa: S101  # it answered
        picture = reply.media_type != JSON_MEDIA_TYPE
        head = Result(
            id=frame.id,
            media_type=reply.media_type,
            size_bytes=len(reply.body),
            model=reply.model if picture else None,
            region=reply.region,
            recv_ms=reply.timing.recv_ms,
            queue_ms=reply.timing.queue_ms,
            inference_ms=reply.timing.inference_ms,
            queue_delay_ms=self._told(trace.model),
            request_id=trace.request_id,
        )
        try:
            self._outbox.add_answer(head, reply.body, frame.priority)
        except SlowReader:
            self._cut_off()

    def _fail(self, request_id: int, trace: Trace, error: NearfarError, status: int) -> None:
        """REJECT before the upload was asked for, ERROR afterwards."""
        delay_ms = None if trace.model is None else self._told(trace.model)
        kind = Error if trace.admitted else Reject
        frame = kind(
            id=request_id,
            code=error.code,
            detail=error.detail[:_MAX_DETAIL_CHARS],
            status=status,
            retryable=error.retryable,
            retry_after_ms=(
                retry_after_s(trace, delay_ms or 0) * 1000 if status in (429, 503) else None
            ),
            queue_delay_ms=delay_ms,
            request_id=trace.request_id,
        )
        self._outbox.drop(request_id)
        try:
            self._outbox.add(frame)
        except SlowReader:
            self._cut_off()
