"""The upgrade: what an HTTP request must be to become a session."""

from __future__ import annotations

from typing import Final

from aiohttp import hdrs, web

from broker.http.context import SERVICES, TRACE
from broker.http.errors import problem_response
from broker.http.headers import single_header
from broker.http.sessions.session import Session
from edge_runtime.contract import limits
from edge_runtime.contract.errors import RequestRejected, WireError
from edge_runtime.contract.frames import SUBPROTOCOL

__all__ = ["session"]

_WRITE_AHEAD_BYTES: Final = 16 * 1024
_CLOSE_S: Final = 1.0
"""How long to wait for the other side's close frame."""


async def session(request: web.Request) -> web.StreamResponse:
    """Upgrade to WebSocket, or say why not: 400, 403 (origin), 426 (no upgrade), 503."""
    services, trace = request.app[SERVICES], request[TRACE]
    origin = single_header(request, hdrs.ORIGIN)
    allowed = services.cors_origins
    if origin is not None and "*" not in allowed and origin not in allowed:
        # CORS does not cover WebSockets: a browser would let any page read the answers.
        trace.code = RequestRejected.code
        return _problem(
            403,
            RequestRejected.code,
            f"pages of {origin[:128]} may not open a session: start the broker with "
            "--cors-origin for it",
            trace.request_id,
        )
    upgrade = request.headers.get(hdrs.UPGRADE, "").strip().lower()
    if upgrade != "websocket":
        trace.code = RequestRejected.code
        response = _problem(
            426,
            RequestRejected.code,
            "a session is a WebSocket: send the upgrade, or use POST /v1/models/NAME:predict",
            trace.request_id,
        )
        response.headers[hdrs.UPGRADE] = "websocket"
        return response
    offered = ",".join(request.headers.getall(hdrs.SEC_WEBSOCKET_PROTOCOL, []))
    if SUBPROTOCOL not in (name.strip() for name in offered.split(",")):
        raise WireError(f"a session speaks {SUBPROTOCOL}: offer it as Sec-WebSocket-Protocol")
    services.sessions.require_room()
    connection = web.WebSocketResponse(
        protocols=(SUBPROTOCOL,),
        compress=False,
        max_msg_size=limits.MAX_FRAME_BYTES,
        timeout=_CLOSE_S,
        writer_limit=_WRITE_AHEAD_BYTES,
    )
    if not connection.can_prepare(request):
        raise WireError("the WebSocket upgrade is incomplete: see RFC 6455 section 4.1")
    await connection.prepare(request)
    await Session(services, connection, trace.principal, request.remote).run()
    return connection


def _problem(status: int, code: str, detail: str, request_id: str) -> web.Response:
    return problem_response(
        path="", status=status, code=code, detail=detail, retryable=False, request_id=request_id
    )
