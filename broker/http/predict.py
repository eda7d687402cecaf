"""``POST /v1/models/{name}:predict``: an image or a seed in, the task's answer out."""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import hdrs, web

from broker.executors.base import BatchItem
from broker.http.accept import AnswerType, answer_types, negotiate
from broker.http.body import read_body
from broker.http.context import SERVICES, TRACE, Services, Trace
from broker.http.headers import (
    BodyKind,
    body_kind,
    parse_query,
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
    JSON_MEDIA_TYPE,
    SERVER_TIMING_HEADER,
    PredictAnswer,
    ServerTiming,
    decode_seed,
    format_picture_headers,
    format_server_timing,
    parse_deadline_ms,
)

__all__ = ["predict"]

_encoder = msgspec.json.Encoder()


async def predict(request: web.Request) -> web.Response:
    """Refuse on the headers, or read the body, queue it and answer by the deadline.

    Everything up to ``admitted`` looks at headers only: a refusal costs no upload.
    """
    services, trace = request.app[SERVICES], request[TRACE]
    servable = services.repository.get(request.match_info["name"])
    trace.model = servable.key
    kind = body_kind(servable.task)
    media_type = upload_media_type(request, kind)
    bound_bytes = upload_bound_bytes(request, kind)
    query = parse_query(request, servable.task)
    wanted = negotiate(single_header(request, hdrs.ACCEPT), answer_types(servable.task))
    deadline_ms = parse_deadline_ms(single_header(request, DEADLINE_HEADER))
    deadline_s = trace.arrived_s + deadline_ms / 1e3
    upload_rate = _upload_rate(request)
    upload_ms = upload_rate.expected_ms(request.content_length or 0, trace.arrived_s)
    with services.scheduler.admitted(servable.key, deadline_s, bound_bytes, upload_ms) as ticket:
        await send_continue(request)
        body = await _receive(request, trace, ticket, kind)
        upload_rate.observe(len(body), trace.recv_ms or 0.0, trace.arrived_s)
        services.telemetry.body_read(len(body))
        _check_content(body, media_type)
        item = BatchItem(
            body,
            top_k=query.top_k,
            media_type="image/jpeg" if wanted == "image/jpeg" else "image/png",
            colored=query.palette,
        )
        answer = await _answer_in_time(services, ticket, item)
    trace.queue_ms = answer.queue_ms
    trace.inference_ms = answer.inference_ms
    services.telemetry.image_answered(servable.key.name, answer.queue_ms)
    return _respond(servable, answer, trace, wanted)


def _upload_rate(request: web.Request) -> UploadRate:
    """What earlier uploads on this connection showed."""
    protocol = request.protocol
    return protocol.upload_rate if isinstance(protocol, BrokerProtocol) else UploadRate()


async def _receive(request: web.Request, trace: Trace, ticket: Ticket, kind: BodyKind) -> bytes:
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    body = await read_body(
        request,
        max_bytes=ticket.upload_bytes,
        too_large=kind.too_large,
        deadline_s=ticket.deadline_s,
    )
    trace.recv_ms = (loop.time() - started_s) * 1e3
    trace.upload_bytes = len(body)
    return body


def _check_content(body: bytes, declared: str) -> None:
    if declared == JSON_MEDIA_TYPE:
        decode_seed(body)
        return
    found = sniff_media_type(body)
    if found is None:
        raise ImageUnreadable("the body is no JPEG, PNG or WebP image: send one of those")
    if found != declared:
        raise MediaTypeUnsupported(
            f"Content-Type says {declared} and the body is {found}: make them agree"
        )


async def _answer_in_time(services: Services, ticket: Ticket, item: BatchItem) -> Answer:
    try:
        async with asyncio.timeout_at(ticket.deadline_s):
            return await services.scheduler.submit(ticket, item)
    except TimeoutError:
        raise DeadlineExceeded(
            "the deadline passed before the answer: answer on the device, or allow more time"
        ) from None


def _respond(
    servable: OpenedServable, answer: Answer, trace: Trace, wanted: AnswerType
) -> web.Response:
    timing = ServerTiming(
        recv_ms=trace.recv_ms, queue_ms=answer.queue_ms, inference_ms=answer.inference_ms
    )
    headers = {SERVER_TIMING_HEADER: format_server_timing(timing)}
    picture = answer.encoded.mask or answer.encoded.image
    if wanted != JSON_MEDIA_TYPE and picture is not None:
        headers |= format_picture_headers(servable.ref, picture.region)
        return web.Response(body=picture.data, content_type=picture.media_type, headers=headers)
    body = _encoder.encode(PredictAnswer.of(servable.ref, answer.encoded))
    return web.Response(body=body, content_type=JSON_MEDIA_TYPE, headers=headers)
