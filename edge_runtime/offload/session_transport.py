"""A session where there can be one, POST where there cannot: one ``Transport``.

The first exchange is HTTP; after it, its idle connection is upgraded in the background, so
that one handshake serves both. From then on images go over the session, the rest as before.

    no session        send by POST, and open one for the next time
    one is opening    wait for it a little (a quarter of the time left), then POST
    it is lost        open another; what was in flight is asked once more, under the same
                      idempotency key, over the new one or by POST
    upgrade refused   POST for a minute, then longer, up to ten
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from typing import Final

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.errors import DeadlineExceeded, NearfarError
from edge_runtime.contract.frames import SESSION_PATH, SUBPROTOCOL, Request
from edge_runtime.offload.client import AiohttpTransport, UpgradeRefused
from edge_runtime.offload.session import Session, SessionLost
from edge_runtime.offload.session_messages import (
    HEALTH_PATH,
    as_frame,
    from_pong,
    with_time_left,
)
from edge_runtime.offload.transport import HttpRequest, HttpResponse, PathListener

__all__ = ["SessionTransport"]

_log = logging.getLogger(__name__)
_OPEN_S: Final = 3.0
_WAIT_SHARE: Final = 0.25
_FIRST_REFUSED_S: Final = 60.0
_MAX_REFUSED_S: Final = 600.0
_FIRST_BROKEN_S: Final = 0.5
_MAX_BROKEN_S: Final = 30.0


class SessionTransport:
    """Around an ``AiohttpTransport``, which it closes with itself."""

    def __init__(self, http: AiohttpTransport, *, api_key: str | None) -> None:
        self._http = http
        self._api_key = api_key
        self._listener: PathListener | None = None
        self._session: Session | None = None
        self._watched: dict[Session, asyncio.Task[None]] = {}
        """Also those that end while another one has taken over."""
        self._opening: asyncio.Task[None] | None = None
        self._not_before_s = float("-inf")
        self._pause_s = 0.0
        self._models_known = False
        self._closed = False
        self.secure = http.secure

    @property
    def open_connections(self) -> int:
        """Those of HTTP, and a session as the requests it can still carry."""
        session = self._session
        if session is None or not session.usable:
            return self._http.open_connections
        return self._http.open_connections - 1 + limits.MAX_SESSION_REQUESTS

    @property
    def session_open(self) -> bool:
        """Whether the next image goes over a session."""
        return self._session is not None and self._session.usable

    def report_to(self, listener: PathListener) -> None:
        """Tell what the session measures."""
        self._listener = listener

    async def path_changed(self) -> None:
        """Ask whether the broker still hears us; until it answers, images go by POST."""
        if self._session is not None:
            self._session.check()

    async def send(self, request: HttpRequest) -> HttpResponse:
        """One exchange, over the session if it can be. Raises ``RemoteError`` or ``WireError``."""
        started = time.monotonic()
        frame = as_frame(request)
        if frame is None:
            return await self._send_other(request)
        deadline_s = started + frame.deadline_ms / 1e3
        session = await self._ready(deadline_s)
        if session is None:
            return await self._post(request, deadline_s)
        try:
            return await _exchange(session, frame, request, deadline_s)
        except SessionLost:
            if time.monotonic() >= deadline_s:
                raise
        self._open_soon(at_once=True)
        session = await self._ready(deadline_s)
        if session is None:
            return await self._post(request, deadline_s)
        return await _exchange(session, frame, request, deadline_s)

    def stream(self, request: HttpRequest) -> AsyncGenerator[bytes, None]:
        """As the HTTP transport does."""
        return self._http.stream(request)

    async def aclose(self) -> None:
        """Close the session, then every connection."""
        self._closed = True
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        for session in tuple(self._watched):
            await session.aclose()
        await asyncio.gather(*self._watched.values(), return_exceptions=True)
        await self._http.aclose()

    # Ways ---------------------------------------------------------------------------------

    async def _send_other(self, request: HttpRequest) -> HttpResponse:
        session = self._session
        if request.path == HEALTH_PATH and session is not None and session.usable:
            started = time.monotonic()
            with contextlib.suppress(SessionLost):
                pong = await session.ping()
                return from_pong(pong, first_byte_ms=(time.monotonic() - started) * 1e3)
        response = await self._http.send(request)
        if request.path != HEALTH_PATH or self._models_known:
            self._models_known = True
            self._open_soon()
        return response

    async def _post(self, request: HttpRequest, deadline_s: float) -> HttpResponse:
        left_ms = int((deadline_s - time.monotonic()) * 1e3)
        if left_ms < 1:
            raise DeadlineExceeded("no time is left for the broker: allow more time")
        if request.receipt is not None:
            request.receipt.reset()
        response = await self._http.send(with_time_left(request, left_ms))
        self._open_soon()
        return response

    async def _ready(self, deadline_s: float) -> Session | None:
        """The session, or None: do without."""
        if not self.session_open and self._opening is not None:
            left_s = deadline_s - time.monotonic()
            await asyncio.wait((self._opening,), timeout=max(0.0, _WAIT_SHARE * left_s))
        return self._session if self.session_open else None

    # Opening ------------------------------------------------------------------------------

    def _open_soon(self, *, at_once: bool = False) -> None:
        """Open a session in the background, unless one is there or was refused lately."""
        now = time.monotonic()
        barred = now < self._not_before_s and not at_once
        if self._closed or self.session_open or self._opening is not None or barred:
            return
        self._opening = asyncio.create_task(self._open())

    async def _open(self) -> None:
        try:
            async with asyncio.timeout(_OPEN_S):
                connection = await self._http.open_websocket(
                    SESSION_PATH,
                    protocol=SUBPROTOCOL,
                    max_frame_bytes=limits.MAX_FRAME_BYTES,
                    api_key=self._api_key,
                )
        except UpgradeRefused as error:
            self._pause(_FIRST_REFUSED_S, _MAX_REFUSED_S)
            _log.info("%s", error.detail)
        except (NearfarError, TimeoutError):
            self._pause(_FIRST_BROKEN_S, _MAX_BROKEN_S)
        else:
            session = Session(connection, api_key=self._api_key, listener=self._listener)
            self._session = session
            self._watched[session] = asyncio.create_task(self._watch(session))
        finally:
            self._opening = None

    def _pause(self, first_s: float, longest_s: float) -> None:
        self._pause_s = min(max(first_s, 2 * self._pause_s), longest_s)
        self._not_before_s = time.monotonic() + self._pause_s

    async def _watch(self, session: Session) -> None:
        """When it ends, find out why, and have another one if it was in use."""
        await session.ended.wait()
        await session.aclose()
        del self._watched[session]
        if self._session is session:
            self._session = None
        if session.refusal is not None:
            self._pause(_FIRST_REFUSED_S, _MAX_REFUSED_S)
        elif not session.heard:
            self._pause(_FIRST_BROKEN_S, _MAX_BROKEN_S)
        else:
            self._pause_s = 0.0
            if session.lost_requests:
                self._open_soon()


async def _exchange(
    session: Session, frame: Request, request: HttpRequest, deadline_s: float
) -> HttpResponse:
    """One exchange, once the session has a place for it."""
    size_bytes = len(request.body)
    if request.receipt is not None:
        request.receipt.multiplexed = True
    await session.places.take(size_bytes)
    try:
        return await session.exchange(_at(frame, deadline_s), request.body, request.receipt)
    finally:
        session.places.give(size_bytes)


def _at(frame: Request, deadline_s: float) -> Request:
    """The frame with the milliseconds that are left now."""
    left_ms = int((deadline_s - time.monotonic()) * 1e3)
    if left_ms < 1:
        raise DeadlineExceeded("no time is left for the broker: allow more time")
    return msgspec.structs.replace(frame, deadline_ms=left_ms)
