"""``POST /v2/models/{name}[/versions/{version}]/infer``: inference of the Open Inference Protocol.

Each row of a request becomes one ticket of the scheduler, the same that an image of
``:predict`` gets: admission, deadlines, batches and metrics are one thing for both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Final

from aiohttp import hdrs, web

from broker.executors.base import BatchItem
from broker.http.body import read_body
from broker.http.callers import caller_of, spend
from broker.http.choosing import choose_version
from broker.http.context import SERVICES, TRACE, Services, Trace
from broker.http.headers import parse_priority, send_continue, single_header
from broker.http.protocol import upload_rate_of
from broker.models.servable import OpenedServable
from broker.oip.answers import encode_infer
from broker.oip.compression import Coding, answer_coding, pack, request_coding, unpack
from broker.oip.interface import Interface
from broker.oip.message import HEADER_LENGTH, check_header_length, parse_header_length
from broker.oip.rows import Asked, read_infer
from broker.scheduling.ticket import LOWEST_PRIORITY, TOO_LATE, Answer, Caller, Ticket
from edge_runtime.contract import limits
from edge_runtime.contract.errors import DeadlineExceeded, ImageTooLarge, NearfarError, WireError
from edge_runtime.contract.wire import (
    DEADLINE_HEADER,
    SERVER_TIMING_HEADER,
    ServerTiming,
    format_server_timing,
    parse_deadline_ms,
)

__all__ = ["infer"]

_DEFLATE_RATIO: Final = 1032
"""The most that a byte of deflate can become (https://www.zlib.net/zlib_tech.html)."""
_SMALL_BYTES: Final = 64 * 1024
"""Of an answer that is compressed at once: a thread would cost more."""
_WORTH_PACKING_BYTES: Final = 1024


class _Places:
    """The tickets that one request holds; ``contextlib.ExitStack`` costs as much as admission."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: list[AbstractContextManager[Ticket]] = []

    def take(self, held: AbstractContextManager[Ticket]) -> Ticket:
        """One more."""
        ticket = held.__enter__()
        self._held.append(held)
        return ticket

    def free(self) -> None:
        """Give back what is held, if anything is."""
        while self._held:
            self._held.pop().__exit__(None, None, None)


async def infer(request: web.Request) -> web.Response:
    """Refuse on the headers, or read the body, queue its rows and answer by the deadline."""
    services, trace = request.app[SERVICES], request[TRACE]
    servable = choose_version(
        services,
        trace,
        request.match_info["name"],
        request.match_info.get("version"),
        address=request.remote,
        tensors=True,
    )
    header_length = parse_header_length(single_header(request, HEADER_LENGTH))
    coding = request_coding(single_header(request, hdrs.CONTENT_ENCODING))
    answer_as = answer_coding(single_header(request, hdrs.ACCEPT_ENCODING))
    interface = Interface.of(servable)
    most = _most_bytes(interface, header_length, coding)
    bound_bytes = _bound_bytes(request, header_length, coding, most)
    said = single_header(request, DEADLINE_HEADER)
    deadline_ms = limits.DEFAULT_INFER_DEADLINE_MS if said is None else parse_deadline_ms(said)
    deadline_s = trace.arrived_s + deadline_ms / 1e3
    rate = upload_rate_of(request)
    upload_ms = rate.expected_ms(request.content_length or 0, trace.arrived_s)
    caller = caller_of(trace.principal, parse_priority(request))
    spend(services, trace)
    places = _Places()
    try:
        door = places.take(
            services.scheduler.admitted(servable.key, deadline_s, bound_bytes, upload_ms, caller)
        )
        await send_continue(request)
        body = await _receive(request, trace, door, most)
        if coding is not None:
            # In a thread however little came: it may become much.
            body = await asyncio.to_thread(unpack, body, coding, most)
        rate.observe(trace.upload_bytes, trace.recv_ms or 0.0, trace.arrived_s)
        services.telemetry.body_read(trace.upload_bytes)
        asked = read_infer(interface, body, header_length)
        del body  # its rows are copies
        tickets = [door]
        if asked.timeout_us is not None:
            own_s = trace.arrived_s + min(asked.timeout_us / 1e6, limits.MAX_DEADLINE_MS / 1e3)
            if said is None or own_s < deadline_s:
                places.free()  # the rows ask by their own deadline
                deadline_s, tickets = own_s, []
        if asked.priority is not None:
            own = caller_of(trace.principal, min(asked.priority, LOWEST_PRIORITY))
            if own != caller:
                places.free()
                caller, tickets = own, []
        answers = await _run(services, servable, asked, deadline_s, tickets, places, caller)
    finally:
        places.free()
    trace.queue_ms = trace.inference_ms = 0.0
    for answer in answers:
        trace.queue_ms = max(trace.queue_ms, answer.queue_ms)
        trace.inference_ms = max(trace.inference_ms, answer.inference_ms)
        services.telemetry.image_answered(servable.key.name, answer.queue_ms)
    services.shadows.offer(servable, trace.request_id, asked.items[0], answers[0])
    return await _respond(servable, asked, answers, trace, answer_as)


def _most_bytes(interface: Interface, header_length: int | None, coding: Coding | None) -> int:
    """The most bytes that a body of this kind can have, unpacked."""
    most = limits.MAX_INFER_BYTES if coding is None else limits.MAX_UNPACKED_BYTES
    if header_length is None:
        return min(most, limits.MAX_INFER_JSON_BYTES)
    if header_length == 0:
        return min(most, max(limits.MAX_IMAGE_BYTES, interface.inputs[0].size_bytes))
    return most


def _bound_bytes(
    request: web.Request, header_length: int | None, coding: Coding | None, most: int
) -> int:
    """The most memory that this very body can take. Raises ``ImageTooLarge`` or ``WireError``."""
    sent_bytes = request.content_length
    if not request.body_exists or sent_bytes == 0:
        raise WireError("the body is empty: send an inference request in it")
    if sent_bytes is None:
        return most
    if sent_bytes > most:
        raise _too_large(most)
    if coding is not None:
        return min(most, sent_bytes * _DEFLATE_RATIO)
    check_header_length(header_length, sent_bytes)
    return sent_bytes


def _too_large(most: int) -> ImageTooLarge:
    return ImageTooLarge(
        f"the body has more than {most} bytes: send fewer images at once, tensors as binary data"
    )


async def _receive(request: web.Request, trace: Trace, door: Ticket, most: int) -> bytes:
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    body = await read_body(
        request,
        max_bytes=door.upload_bytes,
        too_large=lambda: _too_large(most),
        deadline_s=door.deadline_s,
    )
    trace.recv_ms = (loop.time() - started_s) * 1e3
    trace.upload_bytes = len(body)
    return body


async def _run(
    services: Services,
    servable: OpenedServable,
    asked: Asked,
    deadline_s: float,
    tickets: list[Ticket],
    places: _Places,
    caller: Caller,
) -> list[Answer]:
    """One answer a row, or the first error. ``tickets``: those that are admitted already."""
    scheduler = services.scheduler
    body_is_held = bool(tickets)  # all of it, by the ticket that it was read under
    for item in asked.items[len(tickets) :]:
        held_bytes = 0 if body_is_held else len(item.body)
        tickets.append(
            places.take(scheduler.admitted(servable.key, deadline_s, held_bytes, caller=caller))
        )
    if len(tickets) == 1:
        return [await scheduler.submit(tickets[0], asked.items[0])]
    try:
        async with asyncio.timeout_at(deadline_s):
            return await _gather(services, tickets, asked.items)
    except TimeoutError:
        raise DeadlineExceeded(TOO_LATE) from None


async def _gather(
    services: Services, tickets: Sequence[Ticket], items: Sequence[BatchItem]
) -> list[Answer]:
    """All rows at once. The first that fails takes the others out of the queue."""

    async def answer(row: int, ticket: Ticket, item: BatchItem) -> Answer:
        try:
            return await services.scheduler.submit(ticket, item)
        except NearfarError as error:
            raise type(error)(f"row {row}: {error.detail}") from None

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(answer(row, ticket, item))
                for row, (ticket, item) in enumerate(zip(tickets, items, strict=True))
            ]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _respond(
    servable: OpenedServable,
    asked: Asked,
    answers: list[Answer],
    trace: Trace,
    coding: Coding | None,
) -> web.Response:
    body, header_length = encode_infer(servable, asked.id, asked.wanted, answers)
    timing = ServerTiming(
        recv_ms=trace.recv_ms, queue_ms=trace.queue_ms, inference_ms=trace.inference_ms
    )
    headers = {
        SERVER_TIMING_HEADER: format_server_timing(timing),
        hdrs.VARY: hdrs.ACCEPT_ENCODING,
    }
    media_type = "application/json"
    if header_length is not None:
        headers[HEADER_LENGTH] = str(header_length)
        media_type = "application/octet-stream"
    if coding is not None and len(body) >= _WORTH_PACKING_BYTES:
        headers[hdrs.CONTENT_ENCODING] = coding
        if len(body) <= _SMALL_BYTES:
            body = pack(body, coding)
        else:
            body = await asyncio.to_thread(pack, body, coding)
    return web.Response(body=body, content_type=media_type, headers=headers)
