"""The same question and answer as HTTP and as frames of a session."""

from __future__ import annotations

import math
import re
from http import HTTPStatus
from typing import Final

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.frames import Error, Pong, Reject, Request, Result
from edge_runtime.contract.wire import (
    DEADLINE_HEADER,
    IDEMPOTENCY_HEADER,
    JSON_MEDIA_TYPE,
    PROBLEM_MEDIA_TYPE,
    QUEUE_DELAY_HEADER,
    REQUEST_ID_HEADER,
    SERVER_TIMING_HEADER,
    Problem,
    ServerTiming,
    format_picture_headers,
    format_server_timing,
)
from edge_runtime.offload.transport import HttpRequest, HttpResponse

__all__ = [
    "HEALTH_PATH",
    "as_frame",
    "from_error",
    "from_pong",
    "from_result",
    "with_time_left",
]

HEALTH_PATH: Final = "/v2/health/ready"
_PREDICT: Final = re.compile(r"/v1/models/([^/:{}?]{1,128}):predict\Z")


def as_frame(request: HttpRequest) -> Request | None:
    """The REQUEST frame that says the same (its id to be given); None: there is none."""
    match = _PREDICT.match(request.path)
    size_bytes = len(request.body)
    if request.method != "POST" or match is None or not 1 <= size_bytes <= limits.MAX_IMAGE_BYTES:
        return None
    headers = request.headers
    known = {
        "Authorization",
        "Accept",
        "Content-Type",
        DEADLINE_HEADER,
        IDEMPOTENCY_HEADER,
        REQUEST_ID_HEADER,
    }
    if set(headers) - known:
        return None
    return Request(
        id=1,
        model=match[1],
        media_type=headers.get("Content-Type", ""),
        size_bytes=size_bytes,
        deadline_ms=int(headers.get(DEADLINE_HEADER, limits.DEFAULT_DEADLINE_MS)),
        key=headers.get(IDEMPOTENCY_HEADER),
        accept=headers.get("Accept", JSON_MEDIA_TYPE),
        request_id=headers.get(REQUEST_ID_HEADER),
    )


def with_time_left(request: HttpRequest, deadline_ms: int) -> HttpRequest:
    """The same request, later."""
    headers = {**request.headers, DEADLINE_HEADER: str(deadline_ms)}
    return msgspec.structs.replace(request, headers=headers)


def from_result(
    result: Result, body: bytes, *, first_byte_ms: float, body_ms: float
) -> HttpResponse:
    """An answer as POST would have given it."""
    timing = ServerTiming(
        recv_ms=result.recv_ms, queue_ms=result.queue_ms, inference_ms=result.inference_ms
    )
    headers = {
        "content-type": result.media_type,
        SERVER_TIMING_HEADER.lower(): format_server_timing(timing),
        REQUEST_ID_HEADER.lower(): result.request_id,
    }
    if result.model is not None:
        pictured = format_picture_headers(result.model, result.region)
        headers |= {name.lower(): value for name, value in pictured.items()}
    if result.queue_delay_ms is not None:
        headers[QUEUE_DELAY_HEADER.lower()] = str(result.queue_delay_ms)
    return HttpResponse(
        status=200, headers=headers, body=body, first_byte_ms=first_byte_ms, body_ms=body_ms
    )


def from_error(why: Reject | Error, *, first_byte_ms: float) -> HttpResponse:
    """A refusal as POST would have given it."""
    problem = Problem(
        title=_title(why.status),
        status=why.status,
        detail=why.detail,
        code=why.code,
        retryable=why.retryable,
        request_id=why.request_id,
    )
    headers = {"content-type": PROBLEM_MEDIA_TYPE}
    if why.retry_after_ms is not None:
        headers["retry-after"] = str(math.ceil(min(why.retry_after_ms, 10**9) / 1e3))
    if why.queue_delay_ms is not None:
        headers[QUEUE_DELAY_HEADER.lower()] = str(min(why.queue_delay_ms, 10**9 - 1))
    return HttpResponse(
        status=why.status,
        headers=headers,
        body=msgspec.json.encode(problem),
        first_byte_ms=first_byte_ms,
    )


def from_pong(pong: Pong, *, first_byte_ms: float) -> HttpResponse:
    """What ``GET /v2/health/ready`` would have said."""
    if pong.ready:
        return HttpResponse(status=200, headers={}, body=b"{}", first_byte_ms=first_byte_ms)
    why = Error(
        id=0,
        status=503,
        code="overloaded",
        detail="the broker is shutting down" if pong.draining else "no batch can run now",
        retryable=True,
    )
    return from_error(why, first_byte_ms=first_byte_ms)


def _title(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"
