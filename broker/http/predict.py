"""``POST /v1/models/{name}:predict``: an image in, ranked labels out."""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import web

from broker.http.body import read_body
from broker.http.context import SERVICES, TRACE, Services, Trace
from broker.http.headers import (
    parse_top_k,
    send_continue,
    single_header,
    upload_bound_bytes,
    upload_media_type,
)
from broker.http.protocol import BrokerProtocol
from broker.models.servable import OpenedServable
from broker.scheduling.admission import UploadRate
from broker.scheduling.ticket import Answer, Ticket
from edge_runtime.contract.errors import (
    DeadlineExceeded,
    ImageUnreadable,
    MediaTypeUnsupported,
)
from edge_runtime.contract.imaging import sniff_media_type
from edge_runtime.contract.wire import (
    DEADLINE_HEADER,
    SERVER_TIMING_HEADER,
    PredictAnswer,
    ServerTiming,
    format_server_timing,
    parse_deadline_ms,
)

__all__ = ["predict"]

_encoder = msgspec.json.Encoder()


async def predict(request: web.Request) -> web.Response:
    """Refuse on the headers, or read the image, queue it and answer by the deadline.

    Everything up to ``admitted`` looks at headers only: a refusal costs no upload.
    """
    services, trace = request.app[SERVICES], request[TRACE]
    servable = services.repository.get(request.match_info["name"])
    trace.model = servable.key
    media_type = upload_media_type(request)
    bound_bytes = upload_bound_bytes(request)
    top_k = parse_top_k(request)
    deadline_ms = parse_deadline_ms(single_header(request, DEADLINE_HEADER))
    deadline_s = trace.arrived_s + deadline_ms / 1e3
    upload_rate = _upload_rate(request)
    upload_ms = upload_rate.expected_ms(request.content_length or 0, trace.arrived_s)
    with services.scheduler.admitted(servable.key, deadline_s, bound_bytes, upload_ms) as ticket:
        await send_continue(request)
        image = await _receive(request, trace, ticket)
        upload_rate.observe(len(image), trace.recv_ms or 0.0, trace.arrived_s)
        services.telemetry.body_read(len(image))
        _check_content(image, media_type)
        answer = await _answer_in_time(services, ticket, image, top_k)
    trace.queue_ms = answer.queue_ms
    trace.inference_ms = answer.inference_ms
    services.telemetry.image_answered(servable.key.name, answer.queue_ms)
    return _respond(servable, answer, trace)


def _upload_rate(request: web.Request) -> UploadRate:
    """What earlier uploads on this connection showed."""
    protocol = request.protocol
    return protocol.upload_rate if isinstance(protocol, BrokerProtocol) else UploadRate()


async def _receive(request: web.Request, trace: Trace, ticket: Ticket) -> bytes:
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    image = await read_body(request, max_bytes=ticket.upload_bytes, deadline_s=ticket.deadline_s)
    trace.recv_ms = (loop.time() - started_s) * 1e3
    trace.upload_bytes = len(image)
    return image


def _check_content(image: bytes, declared: str) -> None:
    found = sniff_media_type(image)
    if found is None:
        raise ImageUnreadable("the body is no JPEG, PNG or WebP image: send one of those")
    if found != declared:
        raise MediaTypeUnsupported(
            f"Content-Type says {declared} and the body is {found}: make them agree"
        )


async def _answer_in_time(
    services: Services, ticket: Ticket, image: bytes, top_k: int | None
) -> Answer:
    try:
        async with asyncio.timeout_at(ticket.deadline_s):
            return await services.scheduler.submit(ticket, image, top_k)
    except TimeoutError:
        raise DeadlineExceeded(
            "the deadline passed before the answer: answer on the device, or allow more time"
        ) from None


def _respond(servable: OpenedServable, answer: Answer, trace: Trace) -> web.Response:
    body = _encoder.encode(PredictAnswer(model=servable.ref, predictions=answer.predictions))
    timing = ServerTiming(
        recv_ms=trace.recv_ms, queue_ms=answer.queue_ms, inference_ms=answer.inference_ms
    )
    return web.Response(
        body=body,
        content_type="application/json",
        headers={SERVER_TIMING_HEADER: format_server_timing(timing)},
    )
