"""``GET /v1/jobs/{id}/events``: server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec
from aiohttp import hdrs, web

from broker.http.context import SERVICES, TRACE
from broker.http.headers import single_header
from broker.http.jobs import find_job, tenant_of
from broker.http.middleware.cors import origin_headers
from edge_runtime.contract import limits
from edge_runtime.contract.errors import WireError
from edge_runtime.contract.jobs import EVENT_STREAM_MEDIA_TYPE, JobInfo
from edge_runtime.contract.wire import REQUEST_ID_HEADER

__all__ = ["job_events"]

_MAX_EVENT_ID_DIGITS: Final = 16
_RETRY_MS: Final = 1000


async def job_events(request: web.Request) -> web.StreamResponse:
    """Each change until the job has ended: those after ``Last-Event-ID``, or from the latest on.

    A comment is sent when nothing happens for a while, so that a dead connection is noticed
    by either side. The stream ends after the last event, and when the broker shuts down.
    """
    services = request.app[SERVICES]
    job, last = find_job(request), _last_event(single_header(request, "Last-Event-ID"))
    heartbeat_s = limits.JOB_HEARTBEAT_MS / 1e3
    with services.jobs.watched(tenant_of(request)):
        response = web.StreamResponse(
            headers={
                hdrs.CONTENT_TYPE: EVENT_STREAM_MEDIA_TYPE,
                hdrs.CACHE_CONTROL: "no-store",
                hdrs.SERVER: "nearfar",
                "X-Accel-Buffering": "no",  # nginx would hold events back
                REQUEST_ID_HEADER: request[TRACE].request_id,
                **origin_headers(request),
            }
        )
        await response.prepare(request)
        await _write(request, response, f"retry: {_RETRY_MS}\n\n".encode())
        while (events := await services.jobs.next_events(job, last, heartbeat_s)) is not None:
            for number, name, info in events:
                await _write(request, response, _event(number, name, info))
                last = number
            if not events:
                await _write(request, response, b":\n\n")
        await response.write_eof()
        return response


async def _write(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    """Raises ``ConnectionResetError`` when the client takes nothing for too long."""
    try:
        async with asyncio.timeout(limits.MAX_SESSION_WRITE_MS / 1e3):
            await response.write(data)
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the reader of an event stream takes nothing") from None


def _event(number: int, name: str, info: JobInfo) -> bytes:
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (number, name.encode(), msgspec.json.encode(info))


def _last_event(value: str | None) -> int:
    """Raises ``WireError``."""
    if value is None or not value.strip():
        return -1
    if not (value.isascii() and value.isdigit() and len(value) <= _MAX_EVENT_ID_DIGITS):
        raise WireError("Last-Event-ID must be the id of an event of this stream")
    return int(value)
