"""Outermost: an id and a clock for each request, one log line and metrics for each answer."""

from __future__ import annotations

import asyncio
import math
import secrets

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from broker.http.context import SERVICES, TRACE, Services, Trace
from broker.http.errors import error_response
from broker.http.protocol import BrokerProtocol
from broker.log import log_event
from edge_runtime.contract import limits
from edge_runtime.contract.errors import WireError
from edge_runtime.contract.wire import QUEUE_DELAY_HEADER, REQUEST_ID_HEADER, parse_request_id

__all__ = ["observe"]

_CLIENT_LEFT = 499
"""nginx's status for a client that closed the connection: for log and metrics only."""
_MAX_LOGGED_PATH_CHARS = 256


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
    services.in_flight += 1
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
        _record(request, services, trace, _CLIENT_LEFT, loop.time())
        raise
    finally:
        services.in_flight -= 1
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
    return Trace(request_id or secrets.token_hex(8), now_s, route), error


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
    if response.status == 503:
        wait_s = math.ceil(min(delay_ms, limits.MAX_DEADLINE_MS) / 1e3)
        response.headers["Retry-After"] = str(max(1, wait_s))


def _record(
    request: web.Request, services: Services, trace: Trace, status: int, now_s: float
) -> None:
    services.telemetry.request_answered(trace.route, status, now_s - trace.arrived_s)
    if trace.code is not None:
        services.telemetry.error_answered(trace.code)
    if trace.model is not None:  # only requests to run a model carry one
        services.telemetry.inference_ended(
            trace.model,
            status=status,
            code=trace.code,
            total_ms=(now_s - trace.arrived_s) * 1e3,
            queue_ms=trace.queue_ms,
            inference_ms=trace.inference_ms,
        )
    fields: dict[str, object] = {
        "request_id": trace.request_id,
        "method": request.method,
        "path": request.rel_url.raw_path[:_MAX_LOGGED_PATH_CHARS],
        "route": trace.route,
        "status": status,
        "ms": _rounded((now_s - trace.arrived_s) * 1e3),
    }
    if trace.code is not None:
        fields["code"] = trace.code
    if trace.model is not None:
        fields |= {
            "model": trace.model.name,
            "upload_bytes": trace.upload_bytes,
            "recv_ms": _rounded(trace.recv_ms),
            "queue_ms": _rounded(trace.queue_ms),
            "inference_ms": _rounded(trace.inference_ms),
        }
    if trace.principal is not None:
        fields |= {"tenant": trace.principal.tenant, "key": trace.principal.key_id}
    log_event("request", fields)


def _rounded(value_ms: float | None) -> float | None:
    return None if value_ms is None else round(value_ms, 3)
