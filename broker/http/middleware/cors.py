"""Cross-origin requests from web pages (Fetch standard): off unless origins are named."""

from __future__ import annotations

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from broker.http.context import SERVICES
from broker.oip.message import HEADER_LENGTH
from edge_runtime.contract.wire import (
    DEADLINE_HEADER,
    IDEMPOTENCY_HEADER,
    PICTURE_HEADERS,
    PRIORITY_HEADER,
    QUEUE_DELAY_HEADER,
    REQUEST_ID_HEADER,
    SERVER_TIMING_HEADER,
)

__all__ = ["cross_origin", "origin_headers"]

_ALLOWED_HEADERS = (
    f"Authorization, Content-Encoding, Content-Type, {DEADLINE_HEADER}, {HEADER_LENGTH}, "
    f"{IDEMPOTENCY_HEADER}, Last-Event-ID, {PRIORITY_HEADER}, {REQUEST_ID_HEADER}"
)
_EXPOSED_HEADERS = ", ".join(
    (
        *(HEADER_LENGTH, QUEUE_DELAY_HEADER, REQUEST_ID_HEADER, SERVER_TIMING_HEADER),
        *("Location", "Retry-After", *PICTURE_HEADERS),
    )
)
_PREFLIGHT_MAX_AGE_S = "600"


@web.middleware
async def cross_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer preflights of allowed origins, and mark answers as readable by them."""
    own = origin_headers(request)
    if not own:
        return await handler(request)
    is_preflight = (
        request.method == hdrs.METH_OPTIONS
        and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
    )
    response: web.StreamResponse
    if is_preflight:
        response = web.Response(status=204)
        del own[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS]
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = "DELETE, GET, POST"
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = _ALLOWED_HEADERS
        response.headers[hdrs.ACCESS_CONTROL_MAX_AGE] = _PREFLIGHT_MAX_AGE_S
    else:
        response = await handler(request)
    response.headers.update(own)
    response.headers.add(hdrs.VARY, hdrs.ORIGIN)
    return response


def origin_headers(request: web.Request) -> dict[str, str]:
    """What lets a page of the request's origin read the answer; empty: none may.

    For answers whose head leaves before their handler returns.
    """
    allowed = request.app[SERVICES].cors_origins
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is None or ("*" not in allowed and origin not in allowed):
        return {}  # without our headers the browser keeps it from the page
    return {
        hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: "*" if "*" in allowed else origin,
        hdrs.ACCESS_CONTROL_EXPOSE_HEADERS: _EXPOSED_HEADERS,
    }
