"""Triton's model repository extension: what is there, and what of it is in service.

Unloading takes a model out of service; once what was admitted before is answered, its memory is
freed. Loading brings it back into memory and then into service. Other models are
answered meanwhile. Both need an admin key.
"""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec
from aiohttp import web

from broker.http.body import read_body
from broker.http.context import SERVICES, TRACE, Services
from broker.http.headers import send_continue
from broker.log import log_event
from broker.oip.message import decode_control
from edge_runtime.contract import limits
from edge_runtime.contract.errors import LimitExceeded, NearfarError, Unauthorized, WireError

__all__ = ["index", "load", "unload"]

_DRAIN_S: Final = 30.0
"""What waits longer for an unloaded model is answered ``model_not_found``."""
_POLL_S: Final = 0.01


async def index(request: web.Request) -> web.Response:
    """``POST /v2/repository/index``: every model, or with ``ready`` those in service."""
    only_ready, _ = decode_control(await _body(request))
    services = request.app[SERVICES]
    is_ready = services.executor.stats().ready and not services.draining
    entries = []
    for key in services.repository.keys:
        if services.repository.in_service(key.name):
            state, reason = ("READY", "") if is_ready else ("LOADING", "its process starts")
        else:
            state, reason = "UNAVAILABLE", "unloaded"
        if state == "READY" or not only_ready:
            entries.append(
                {"name": key.name, "version": key.version, "state": state, "reason": reason}
            )
    return web.Response(body=msgspec.json.encode(entries), content_type="application/json")


async def load(request: web.Request) -> web.Response:
    """``POST /v2/repository/models/{name}/load``: put it back into service."""
    name = await _controlled(request)
    services = request.app[SERVICES]
    async with services.loading:
        await services.executor.load(services.repository.key_of(name))
        services.repository.restore(name)
    log_event("model_loaded", {"model": name, "request_id": request[TRACE].request_id})
    return web.Response()


async def unload(request: web.Request) -> web.Response:
    """``POST /v2/repository/models/{name}/unload``: no new requests, and then no memory."""
    name = await _controlled(request)
    services = request.app[SERVICES]
    services.repository.withdraw(name)
    freeing = asyncio.create_task(_free(services, name), name="unload")
    services.freeing.add(freeing)
    freeing.add_done_callback(services.freeing.discard)
    log_event("model_unloaded", {"model": name, "request_id": request[TRACE].request_id})
    return web.Response()


async def _free(services: Services, name: str) -> None:
    """Free a model's memory once nobody waits for it, unless it is back in service by then."""
    loop = asyncio.get_running_loop()
    key = services.repository.key_of(name)
    end_s = loop.time() + _DRAIN_S
    while services.scheduler.queued(key) and loop.time() < end_s:  # noqa: ASYNC110  # once
        await asyncio.sleep(_POLL_S)
    async with services.loading:
        if services.repository.in_service(name):
            return
        try:
            await services.executor.unload(key)
        except NearfarError as error:
            log_event("unload_failed", {"model": name, "text": error.detail})


async def _controlled(request: web.Request) -> str:
    """The model of a request that may change the service.

    Raises ``Unauthorized`` without an admin key, and ``WireError`` where the request wants
    to bring a configuration or files along.
    """
    principal = request[TRACE].principal
    if principal is None:
        raise Unauthorized(
            "loading and unloading need an admin key: start the broker with --keys, and make "
            "one with nearfar keys add --admin"
        )
    if not principal.admin:
        raise Unauthorized("this API key is no admin key: loading and unloading need one")
    _, parameters = decode_control(await _body(request))
    foreign = [name for name in parameters if name != "unload_dependents"]
    if foreign:
        raise WireError(
            f"parameter {foreign[0][:64]!r} is not taken: a model is what its servable says; "
            "export another one and start a broker with it"
        )
    return request.match_info["name"]


async def _body(request: web.Request) -> bytes:
    await send_continue(request)
    deadline_s = asyncio.get_running_loop().time() + limits.MAX_BODY_MS / 1e3
    return await read_body(
        request,
        max_bytes=limits.MAX_CONTROL_BODY_BYTES,
        too_large=lambda: LimitExceeded(
            f"the body has more than {limits.MAX_CONTROL_BODY_BYTES} bytes"
        ),
        deadline_s=deadline_s,
    )
