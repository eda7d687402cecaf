"""Triton's model repository extension: what is there, and what of it is in service.

Loading and unloading change whether a model is asked, not what is in memory: every model
stays with the process that runs it, so that one that is loaded again answers at once, and
what was admitted before an unload is answered. Both need an admin key.
"""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import web

from broker.http.body import read_body
from broker.http.context import SERVICES, TRACE
from broker.http.headers import send_continue
from broker.log import log_event
from broker.oip.message import decode_control
from edge_runtime.contract import limits
from edge_runtime.contract.errors import LimitExceeded, Unauthorized, WireError

__all__ = ["index", "load", "unload"]


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
    request.app[SERVICES].repository.restore(name)
    log_event("model_loaded", {"model": name, "request_id": request[TRACE].request_id})
    return web.Response()


async def unload(request: web.Request) -> web.Response:
    """``POST /v2/repository/models/{name}/unload``: no new requests for it."""
    name = await _controlled(request)
    request.app[SERVICES].repository.withdraw(name)
    log_event("model_unloaded", {"model": name, "request_id": request[TRACE].request_id})
    return web.Response()


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
