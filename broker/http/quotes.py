"""What a request would meet, told before it is made: a quote, and the load of the whole broker."""

from __future__ import annotations

import asyncio
import math

import msgspec
from aiohttp import web

from broker.http.callers import caller_of
from broker.http.choosing import asked_version
from broker.http.context import SERVICES, TRACE
from broker.http.headers import announced_bytes, body_kind, parse_priority, single_header
from broker.http.protocol import upload_rate_of
from edge_runtime.contract import limits
from edge_runtime.contract.errors import WireError
from edge_runtime.contract.wire import DEADLINE_HEADER, QUEUE_DELAY_HEADER, parse_deadline_ms

__all__ = ["BrokerLoad", "ModelLoad", "Quote", "load", "quote"]


class Quote(msgspec.Struct, frozen=True, kw_only=True):
    """A forecast for one request, made now; times in milliseconds, null where nobody knows."""

    model: str
    version: str
    size_bytes: int
    deadline_ms: int
    admitted: bool
    """Whether it would be let in now. A quote keeps no place."""
    code: str | None
    """Of the error that it would get."""
    queue_delay_ms: float | None
    """Until its batch starts."""
    upload_ms: float
    """Of the body, at the rate of this connection's latest uploads; 0: none is known."""
    inference_ms: float
    """Of its batch."""
    finish_ms: float | None
    """Until its answer."""
    price_microusd: int
    """Millionths of a US dollar."""


class ModelLoad(msgspec.Struct, frozen=True, kw_only=True):
    """How busy one model is."""

    name: str
    version: str
    queue_delay_ms: int
    """Predicted wait of a new request behind all others of its class."""
    queued: int
    """Requests that upload or wait."""
    capacity_per_s: float
    """Requests a second with full batches, were there no other model; 0: not known yet."""


class BrokerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """How busy a broker is: of two, a client or proxy asks the one with less delay."""

    ready: bool
    draining: bool
    in_flight: int
    """Requests whose answer has not gone out."""
    queue_delay_ms: int
    """The longest of its models' in memory: for a client that asks for several, or knows no names
    yet."""
    models: tuple[ModelLoad, ...]
    """All versions in service, by name, the highest of each first."""


async def quote(request: web.Request) -> web.Response:
    """``GET /v1/models/{name}/quote?bytes=[&version=]``; without a version of the stable one.

    Raises ``ModelNotFound``, ``WireError``, and for a body over the limit what a prediction would.
    """
    services, trace = request.app[SERVICES], request[TRACE]
    servable = services.repository.get(request.match_info["name"], asked_version(request))
    size_bytes = announced_bytes(_parse_bytes(request), body_kind(servable.task))
    deadline_ms = parse_deadline_ms(single_header(request, DEADLINE_HEADER))
    caller = caller_of(trace.principal, parse_priority(request))
    upload_ms = upload_rate_of(request).expected_ms(size_bytes, trace.arrived_s)
    now_s = asyncio.get_running_loop().time()
    predicted, error = services.scheduler.quote(
        servable.key, now_s + deadline_ms / 1e3, upload_ms, caller
    )
    answer = Quote(
        model=servable.key.name,
        version=servable.key.version,
        size_bytes=size_bytes,
        deadline_ms=deadline_ms,
        admitted=error is None,
        code=None if error is None else error.code,
        queue_delay_ms=_known(predicted.wait_ms),
        upload_ms=round(upload_ms, 3),
        inference_ms=round(predicted.batch_ms, 3),
        finish_ms=_known(predicted.finish_ms),
        price_microusd=0,
    )
    response = _json(answer)
    delay_ms = services.scheduler.queue_delay_ms(servable.key)
    response.headers[QUEUE_DELAY_HEADER] = str(delay_ms)
    return response


async def load(request: web.Request) -> web.Response:
    """``GET /v1/load``."""
    services = request.app[SERVICES]
    scheduler, repository = services.scheduler, services.repository
    models = tuple(
        ModelLoad(
            name=key.name,
            version=key.version,
            queue_delay_ms=scheduler.queue_delay_ms(key),
            queued=scheduler.queued(key),
            capacity_per_s=round(scheduler.capacity_per_s(key), 3),
        )
        for key in repository.serving
    )
    residency = services.residency
    ready_ms = [
        model.queue_delay_ms
        for model, key in zip(models, repository.serving, strict=True)
        if residency is None or residency.resident(key)
    ]
    return _json(
        BrokerLoad(
            ready=services.executor.ready_in_s() == 0.0 and not services.draining,
            draining=services.draining,
            in_flight=services.in_flight,
            queue_delay_ms=max(ready_ms, default=0),
            models=models,
        )
    )


def _parse_bytes(request: web.Request) -> int:
    values = request.query.getall("bytes", [])
    if set(request.query) - {"version"} != {"bytes"} or len(values) != 1:
        raise WireError("say once how large the body will be, and beside it the version at most: "
                        "?bytes=30000")  # fmt: skip
    digits = values[0]
    if not (digits.isascii() and digits.isdigit()) or len(digits) > len(
        str(limits.MAX_INFER_BYTES)
    ):
        raise WireError("bytes must be a whole number")
    return int(digits)


def _known(value_ms: float) -> float | None:
    return round(value_ms, 3) if math.isfinite(value_ms) else None


def _json(value: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
