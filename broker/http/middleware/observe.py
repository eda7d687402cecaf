"""Outermost: an id and a clock for each request, one log line and metrics for each answer."""

from __future__ import annotations

import asyncio
import random
from typing import Final

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from broker.http.context import SERVICES, TRACE, Services, Trace
from broker.http.errors import error_response
from broker.http.protocol import BrokerProtocol
from broker.http.record import CLIENT_LEFT, record_request, retry_after_s
from edge_runtime.contract.errors import WireError
from edge_runtime.contract.wire import QUEUE_DELAY_HEADER, REQUEST_ID_HEADER, parse_request_id

__all__ = ["observe"]

_SESSION_ROUTE = "session"
_ids: Final = random.Random()  # noqa: S311  # seeded by the system; ids tell apart and guard nothing


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever happens inside, one line and one count come out."""
    services = request.app[SERVICES]
    loop = asyncio.get_running_loop()
    trace, id_error = _begin(request, loop.time())
    request[TRACE] = trace
    protocol = request.protocol
    if isinstance(protocol, BrokerProtocol):
        protocol.headers_complete()
    counted = trace.route != _SESSION_ROUTE  # a session counts each of its requests instead
    services.in_flight += counted
    try:
        if id_error is not None:
            trace.code = id_error.code
            response: web.StreamResponse = error_response(id_error, request.path, trace.request_id)
        else:
            response = await handler(request)
        _add_headers(response, services, trace)
        if services.draining or _leaves_body_behind(request, response.status):
            response.force_close()
    except BaseException:  # canceled: the client closed the connection
        _record(request, services, trace, CLIENT_LEFT, loop.time())
        raise
    finally:
        services.in_flight -= counted
        if isinstance(protocol, BrokerProtocol):
            protocol.answered(body_read=request.content.is_eof())
    _record(request, services, trace, response.status, loop.time())
    return response


def _begin(request: web.Request, now_s: float) -> tuple[Trace, WireError | None]:
    """The caller's request id or a new one; a senseless one is an error under a new id."""
    route = request.match_info.route.name or "unmatched"
    try:
        request_id = parse_request_id(request.headers.get(REQUEST_ID_HEADER))
        error = None
    except WireError as refused:
        request_id, error = None, refused
    return Trace(request_id or f"{_ids.getrandbits(64):016x}", now_s, route), error


def _leaves_body_behind(request: web.Request, status: int) -> bool:
    """Whether this connection cannot carry another request.

    A client that was refused while it waited for 100 Continue need not send its body, and
    nobody could tell then where its next request begins. One that sends too slowly or too
    much is not waited for.
    """
    return not request.content.is_eof() and (hdrs.EXPECT in request.headers or status in (408, 413))


def _add_headers(response: web.StreamResponse, services: Services, trace: Trace) -> None:
    response.headers[hdrs.SERVER] = "nearfar"  # not which Python and aiohttp
    response.headers[REQUEST_ID_HEADER] = trace.request_id
    if trace.model is None:
        return
    delay_ms = services.scheduler.queue_delay_ms(trace.model)
    response.headers[QUEUE_DELAY_HEADER] = str(delay_ms)
    if response.status in (429, 503):
        response.headers["Retry-After"] = str(retry_after_s(trace, delay_ms))


def _record(
    request: web.Request, services: Services, trace: Trace, status: int, now_s: float
) -> None:
    record_request(
        services,
        trace,
        method=request.method,
        path=request.rel_url.raw_path,
        status=status,
        now_s=now_s,
    )
