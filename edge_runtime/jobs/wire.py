"""Requests about jobs, what their answers mean, and the lines of an event stream."""

from __future__ import annotations

import codecs
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

from edge_runtime.contract import limits
from edge_runtime.contract.errors import JobNotFound, NearfarError, WireError, error_from_code
from edge_runtime.contract.jobs import (
    EVENT_STREAM_MEDIA_TYPE,
    JobInfo,
    decode_job,
    job_path,
    jobs_path,
)
from edge_runtime.contract.wire import IDEMPOTENCY_HEADER, decode_problem
from edge_runtime.offload.messages import refusal
from edge_runtime.offload.transport import HttpRequest, HttpResponse

__all__ = [
    "cancel_request",
    "events_of",
    "events_request",
    "raise_refusal",
    "result_request",
    "status_request",
    "submit_request",
]

_MAX_SMALL_ANSWER: Final = 64 * 1024
_MAX_EVENT_CHARS: Final = 64 * 1024


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def submit_request(
    model: str, body: bytes, media_type: str, key: str, api_key: str | None, accept: str
) -> HttpRequest:
    """A job for ``model``, under an idempotency key."""
    return HttpRequest(
        method="POST",
        path=jobs_path(model),
        headers={
            **_headers(api_key),
            "Accept": accept,
            "Content-Type": media_type,
            IDEMPOTENCY_HEADER: key,
        },
        body=body,
        max_answer_bytes=_MAX_SMALL_ANSWER,
    )


def status_request(job_id: str, api_key: str | None) -> HttpRequest:
    """How far is it?"""
    return HttpRequest(
        method="GET",
        path=job_path(job_id),
        headers=_headers(api_key),
        max_answer_bytes=_MAX_SMALL_ANSWER,
    )


def result_request(job_id: str, api_key: str | None) -> HttpRequest:
    """The answer."""
    return HttpRequest(
        method="GET",
        path=f"{job_path(job_id)}/result",
        headers=_headers(api_key),
        max_answer_bytes=limits.MAX_ANSWER_BYTES,
    )


def cancel_request(job_id: str, api_key: str | None) -> HttpRequest:
    """It is not wanted any more."""
    return HttpRequest(
        method="DELETE",
        path=job_path(job_id),
        headers=_headers(api_key),
        max_answer_bytes=_MAX_SMALL_ANSWER,
    )


def events_request(job_id: str, api_key: str | None, last: str | None) -> HttpRequest:
    """What happens to it from now on, or after the event ``last``."""
    seen = {} if last is None else {"Last-Event-ID": last}
    return HttpRequest(
        method="GET",
        path=f"{job_path(job_id)}/events",
        headers={**_headers(api_key), **seen, "Accept": EVENT_STREAM_MEDIA_TYPE},
        max_answer_bytes=_MAX_SMALL_ANSWER,
    )


def raise_refusal(response: HttpResponse) -> None:
    """Raise the error that an answer other than 2xx tells of."""
    if 200 <= response.status < 300:
        return
    problem = decode_problem(response.body)
    if problem is not None and response.status < 500:
        named = error_from_code(problem.code, problem.detail[:500])
        if isinstance(named, NearfarError) and type(named) is not NearfarError:
            raise named
    if response.status == 404:
        raise JobNotFound("the broker knows no jobs: it is of an earlier version")
    no = refusal(response)
    raise WireError("the broker's answer makes no sense") if no is None else no.error


async def events_of(pieces: AsyncGenerator[bytes, None]) -> AsyncIterator[tuple[str, JobInfo]]:
    """Ids and contents of server-sent events (WHATWG HTML, section 9.2.6).

    Raises ``WireError`` when they make no sense, and what ``pieces`` raises.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, event_id, data = "", "", ""
    async for piece in pieces:
        text += decoder.decode(piece)
        *lines, text = text.replace("\r\n", "\n").split("\n")
        for line in lines:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if not line and data:
                yield event_id, decode_job(data.encode())
            if not line:
                data = ""
            elif name == "id":
                event_id = value
            elif name == "data":
                data += value
        if len(text) + len(data) > _MAX_EVENT_CHARS:
            raise WireError("an event of the broker is too large: is a broker there?")
