"""The HTTP connection: aiohttp's, with bounds that aiohttp leaves to a proxy.

Added are a limit on open connections, a limit on the time that a header block may take,
and one log line (not a traceback) for what is no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

from aiohttp import web

from broker.http.errors import INTERNAL_DETAIL, problem_response
from broker.log import log_event
from broker.scheduling.admission import UploadRate
from broker.telemetry import Telemetry
from edge_runtime.contract import limits
from edge_runtime.contract.errors import BrokerFault, Overloaded, WireError

__all__ = ["BrokerProtocol", "ConnectionGate", "upload_rate_of"]

_LOGGED_PER_S = 5


class ConnectionGate:
    """Counts open connections, and log lines about malformed requests."""

    def __init__(self, max_connections: int, telemetry: Telemetry) -> None:
        self._max_connections = max_connections
        self._telemetry = telemetry
        self._open = 0
        self._second = 0
        self._logged = 0

    def enter(self) -> bool:
        """Take a place; False when there is none."""
        if self._open >= self._max_connections:
            return False
        self._open += 1
        self._telemetry.connections_changed(self._open)
        return True

    def leave(self) -> None:
        """Give it back."""
        self._open -= 1
        self._telemetry.connections_changed(self._open)

    def malformed(self, reason: str) -> None:
        """Count it, and log the first few of each second: clients must not fill the disk."""
        self._telemetry.malformed_request()
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._logged = second, 0
        self._logged += 1
        if self._logged <= _LOGGED_PER_S:
            log_event("malformed_request", {"reason": reason[:200]})


class BrokerProtocol(web.RequestHandler):
    """One connection."""

    __slots__ = (
        "_admitted",
        "_awaiting_headers",
        "_gate",
        "_header_timer",
        "_headers_due_s",
        "upload_rate",
    )

    def __init__(
        self,
        server: web.Server,
        gate: ConnectionGate,
        *,
        loop: asyncio.AbstractEventLoop,
        **options: Any,
    ) -> None:
        super().__init__(server, loop=loop, **options)
        self.upload_rate = UploadRate()
        self._gate = gate
        self._admitted = False
        self._awaiting_headers = True
        self._headers_due_s: float | None = None
        """When the header block that is under way must be whole; None: none is."""
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Serve it, or say 503 and close when too many are open."""
        self._admitted = self._gate.enter()
        if not self._admitted:
            _refuse(cast("asyncio.Transport", transport))
            return
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Clean up."""
        if self._admitted:
            self._gate.leave()
            self._headers_due_s = None
            if self._header_timer is not None:
                self._header_timer.cancel()
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; the first byte of a further request starts its header clock."""
        if not self._admitted:
            return
        if self._awaiting_headers and self._headers_due_s is None:
            self._expect_headers()
        super().data_received(data)

    def headers_complete(self) -> None:
        """A header block was parsed, and its request is being answered."""
        self._awaiting_headers = False
        self._headers_due_s = None

    def answered(self, *, body_read: bool) -> None:
        """Its answer is made. Rest of a body may still come, which is no header block."""
        self._awaiting_headers = body_read

    def _expect_headers(self) -> None:
        """Start the clock. The timer of an earlier block serves this one too, if it still runs."""
        loop = asyncio.get_running_loop()
        self._headers_due_s = loop.time() + limits.MAX_HEADER_BLOCK_MS / 1e3
        if self._header_timer is None:
            self._header_timer = loop.call_at(self._headers_due_s, self._look_at_the_clock)

    def _look_at_the_clock(self) -> None:
        self._header_timer = None
        if self._headers_due_s is None or self.transport is None:
            return
        loop = asyncio.get_running_loop()
        if loop.time() < self._headers_due_s:
            self._header_timer = loop.call_at(self._headers_due_s, self._look_at_the_clock)
        else:
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what aiohttp could not parse, and close the connection."""
        self._headers_due_s = None
        if isinstance(exc, ConnectionError):
            raise exc  # nobody is there to be answered
        if status >= 500:  # not reached by way of our middleware, which answers everything
            self.logger.error("unhandled error", exc_info=exc)
            code, detail = BrokerFault.code, INTERNAL_DETAIL
        else:
            self._gate.malformed(type(exc).__name__ if exc is not None else "unknown")
            code, detail = WireError.code, "the request is malformed HTTP: send it anew"
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        response = problem_response(
            path="", status=status, code=code, detail=detail, retryable=False, request_id=""
        )
        response.force_close()
        return response


def upload_rate_of(request: web.Request) -> UploadRate:
    """What earlier uploads on the connection of a request showed."""
    protocol = request.protocol
    return protocol.upload_rate if isinstance(protocol, BrokerProtocol) else UploadRate()


def _refuse(transport: asyncio.Transport) -> None:
    body = problem_response(
        path="",
        status=503,
        code=Overloaded.code,
        detail="too many connections are open: ask again later",
        retryable=True,
        request_id="",
    ).body
    assert isinstance(body, bytes)  # noqa: S101
    transport.write(
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\n"
        b"Retry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    transport.close()
