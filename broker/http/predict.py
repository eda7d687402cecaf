"""``POST /v1/models/{name}:predict``: an image or a seed in, the task's answer out."""

from __future__ import annotations

from aiohttp import hdrs, web

from broker.http.accept import answer_types, negotiate
from broker.http.answering import Ask, answer_once
from broker.http.body import arrived_body, request_pieces
from broker.http.choosing import asked_version, choose_version
from broker.http.context import SERVICES, TRACE
from broker.http.headers import (
    body_kind,
    parse_priority,
    parse_query,
    send_continue,
    single_header,
    upload_bound_bytes,
    upload_media_type,
)
from broker.http.protocol import upload_rate_of
from broker.http.reply import Reply
from edge_runtime.contract.wire import (
    DEADLINE_HEADER,
    IDEMPOTENCY_HEADER,
    JSON_MEDIA_TYPE,
    SERVER_TIMING_HEADER,
    format_picture_headers,
    format_server_timing,
    parse_deadline_ms,
    parse_idempotency_key,
)

__all__ = ["predict"]


async def predict(request: web.Request) -> web.Response:
    """Refuse on the headers, or read the body, queue it and answer by the deadline."""
    services, trace = request.app[SERVICES], request[TRACE]
    key = parse_idempotency_key(single_header(request, IDEMPOTENCY_HEADER))
    name, version = request.match_info["name"], asked_version(request)
    servable = choose_version(services, trace, name, version, address=request.remote, key=key)
    kind = body_kind(servable.task)
    media_type = upload_media_type(request, kind)
    bound_bytes = upload_bound_bytes(request, kind)
    query = parse_query(request, servable.task)
    wanted = negotiate(single_header(request, hdrs.ACCEPT), answer_types(servable.task))
    deadline_ms = parse_deadline_ms(single_header(request, DEADLINE_HEADER))
    ask = Ask(
        servable=servable,
        version=version,
        kind=kind,
        media_type=media_type,
        size_bytes=request.content_length,
        bound_bytes=bound_bytes,
        query=query,
        wanted=wanted,
        deadline_s=trace.arrived_s + deadline_ms / 1e3,
        key=key,
        priority=parse_priority(request),
    )
    upload = _Upload(request)
    return _respond(await answer_once(services, trace, ask, upload_rate_of(request), upload))


class _Upload:
    """The body of an HTTP request."""

    withdrawn = False
    """Nobody can say so but by closing the connection, which may as well be an accident."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._read_piece = request_pieces(request)

    async def begin(self) -> None:
        """``100 Continue``, where the client waits for it."""
        await send_continue(self._request)

    async def skip(self) -> None:
        """The answer comes at once; what of the body is under way is read and dropped."""

    def arrived(self, max_bytes: int) -> bytes | None:
        """The whole body where it came with its headers."""
        return arrived_body(self._request, max_bytes)

    async def read_piece(self) -> bytes:
        """The next bytes. Raises ``WireError`` for broken chunks."""
        return await self._read_piece()


def _respond(reply: Reply) -> web.Response:
    headers = {SERVER_TIMING_HEADER: format_server_timing(reply.timing)}
    if reply.media_type != JSON_MEDIA_TYPE:
        headers |= format_picture_headers(reply.model, reply.region)
    return web.Response(body=reply.body, content_type=reply.media_type, headers=headers)
