"""From a checked request to its answer: what POST and the session share.

Whatever way a request came, it is admitted, uploaded, looked at, queued and answered here,
under its idempotency key if it has one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import msgspec

from broker.executors.base import BatchItem
from broker.http.accept import AnswerType
from broker.http.body import collect_body
from broker.http.callers import caller_of, spend
from broker.http.context import Services, Trace
from broker.http.headers import BodyKind, Query
from broker.http.reply import Reply
from broker.models.servable import OpenedServable
from broker.scheduling.admission import UploadRate
from broker.scheduling.replays import Try
from broker.scheduling.ticket import DEFAULT_PRIORITY, TOO_LATE, Answer, Ticket
from edge_runtime.contract.errors import (
    DeadlineExceeded,
    ImageUnreadable,
    MediaTypeUnsupported,
    Overloaded,
)
from edge_runtime.contract.imaging import sniff_media_type
from edge_runtime.contract.wire import (
    JSON_MEDIA_TYPE,
    PredictAnswer,
    ServerTiming,
    decode_seed,
)

__all__ = ["Ask", "Upload", "answer_once", "check_content"]

_encoder = msgspec.json.Encoder()


class Ask(msgspec.Struct, frozen=True):
    """One request, checked as far as that goes without its body."""

    servable: OpenedServable
    version: str | None
    """As asked for, an alias too; None: whichever the broker chose."""
    kind: BodyKind
    media_type: str
    size_bytes: int | None
    """As announced; None: it was not."""
    bound_bytes: int
    """What the body can have at most."""
    query: Query
    wanted: AnswerType
    deadline_s: float
    """On the event loop's clock."""
    key: str | None = None
    """Idempotency key."""
    priority: int = DEFAULT_PRIORITY
    """As asked for; its key may have a lower ceiling."""

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """What a retry under the same key must repeat.

        Not which version answered: the split may have changed since.
        """
        query = (self.query.top_k, self.query.palette)
        asked = (self.servable.key.name, self.version)
        return (asked, self.media_type, self.size_bytes, query, self.wanted)


class Upload(Protocol):
    """The way a body comes."""

    withdrawn: bool
    """The caller said that it wants no answer any more."""

    async def begin(self) -> None:
        """Admitted: ask for the body."""

    async def skip(self) -> None:
        """Admitted, and the body is here already, from an earlier try."""

    def arrived(self, max_bytes: int) -> bytes | None:
        """The whole body, of at most so many bytes, where it is here already."""

    async def read_piece(self) -> bytes:
        """The next bytes; none at the end."""


async def answer_once(
    services: Services, trace: Trace, ask: Ask, rate: UploadRate, upload: Upload
) -> Reply:
    """The answer, from an earlier try under the same key where there is one.

    A try whose body has arrived goes on when its connection is lost, so that a retry can
    have its answer; one that was withdrawn ends, unless somebody else waits for it. Raises
    the errors of ``answer``, and ``WireError`` for a key that was used otherwise.
    """
    if ask.key is None:
        return await _answer(services, trace, ask, rate, upload)
    tenant = "" if trace.principal is None else trace.principal.tenant
    known = services.replays.find(tenant, ask.key, ask.fingerprint)
    if known is not None and known.joinable:
        trace.joined = trace.admitted = True
        services.telemetry.replayed()
        await upload.skip()
        return await _join(known, ask, upload)
    if known is not None:
        known.task.cancel()  # its body never came whole: this try sends it again
    started: Try[Reply] | None = None

    def body_arrived() -> None:
        if started is not None:
            started.complete = True

    work = _answer(services, trace, ask, rate, upload, body_arrived)
    started = services.replays.start(tenant, ask.key, ask.fingerprint, work)
    return await _wait(started, upload)


async def _join(attempt: Try[Reply], ask: Ask, upload: Upload) -> Reply:
    """Wait for an earlier try, whose own deadline may be another one."""
    try:
        async with asyncio.timeout_at(ask.deadline_s):
            return await _wait(attempt, upload)
    except TimeoutError:
        raise DeadlineExceeded(TOO_LATE) from None


async def _wait(attempt: Try[Reply], upload: Upload) -> Reply:
    attempt.waiting += 1
    try:
        return await asyncio.shield(attempt.task)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if attempt.task.cancelled() and (task is None or not task.cancelling()):
            raise Overloaded("another request took over this idempotency key") from None
        if attempt.waiting == 1 and (upload.withdrawn or not attempt.complete):
            attempt.task.cancel()
        raise
    finally:
        attempt.waiting -= 1


async def _answer(
    services: Services,
    trace: Trace,
    ask: Ask,
    rate: UploadRate,
    upload: Upload,
    body_arrived: Callable[[], None] | None = None,
) -> Reply:
    """Admit, read, queue, answer by the deadline.

    Everything up to ``admitted`` looked at headers only: a refusal costs no upload.
    """
    spend(services, trace)
    scheduler, key = services.scheduler, ask.servable.key
    upload_ms = rate.expected_ms(ask.size_bytes or 0, trace.arrived_s)
    caller = caller_of(trace.principal, ask.priority)
    with scheduler.admitted(key, ask.deadline_s, ask.bound_bytes, upload_ms, caller) as ticket:
        trace.admitted = True
        await upload.begin()
        body = await _receive(upload, trace, ticket, ask.kind)
        rate.observe(len(body), trace.recv_ms or 0.0, trace.arrived_s)
        services.telemetry.body_read(len(body))
        check_content(body, ask.media_type)
        if body_arrived is not None:
            body_arrived()
        item = BatchItem(
            body,
            top_k=ask.query.top_k,
            media_type="image/jpeg" if ask.wanted == "image/jpeg" else "image/png",
            colored=ask.query.palette,
        )
        answer = await scheduler.submit(ticket, item)
    trace.queue_ms = answer.queue_ms
    trace.inference_ms = answer.inference_ms
    services.telemetry.image_answered(key.name, answer.queue_ms)
    services.shadows.offer(ask.servable, ask.key or trace.request_id, item, answer)
    return _encode(ask, answer, trace)


async def _receive(upload: Upload, trace: Trace, ticket: Ticket, kind: BodyKind) -> bytes:
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    body = upload.arrived(ticket.upload_bytes)
    if body is None:
        body = await collect_body(
            upload.read_piece,
            max_bytes=ticket.upload_bytes,
            too_large=kind.too_large,
            deadline_s=ticket.deadline_s,
        )
    trace.recv_ms = (loop.time() - started_s) * 1e3
    trace.upload_bytes = len(body)
    return body


def check_content(body: bytes, declared: str) -> None:
    """Raise what is wrong with a body at first sight, or with its declared type."""
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


def _encode(ask: Ask, answer: Answer, trace: Trace) -> Reply:
    timing = ServerTiming(
        recv_ms=trace.recv_ms, queue_ms=answer.queue_ms, inference_ms=answer.inference_ms
    )
    reference = ask.servable.ref
    picture = answer.encoded.mask or answer.encoded.image
    if ask.wanted != JSON_MEDIA_TYPE and picture is not None:
        return Reply(picture.media_type, picture.data, timing, reference, picture.region)
    body = _encoder.encode(PredictAnswer.of(reference, answer.encoded))
    return Reply(JSON_MEDIA_TYPE, body, timing, reference, None)
