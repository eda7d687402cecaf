"""Triton's model repository extension: what is there, and what of it is in service.

Unloading takes a model out of service; once what was admitted before is answered, its memory is
freed. Loading brings it back into memory and then into service. Other models are
answered meanwhile. Both need an admin key, and mean every version of the model unless the
parameter ``version`` names one.
"""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec
from aiohttp import web

from broker.http.admin import read_control_body, require_admin
from broker.http.context import SERVICES, TRACE, Services
from broker.log import log_event
from broker.models.servable import ModelKey
from broker.oip.message import decode_control
from edge_runtime.contract.errors import NearfarError, WireError

__all__ = ["index", "load", "unload"]

_DRAIN_S: Final = 30.0
"""What waits longer for an unloaded model is answered ``model_not_found``."""
_POLL_S: Final = 0.01


async def index(request: web.Request) -> web.Response:
    """``POST /v2/repository/index``: every version, or with ``ready`` those in service."""
    only_ready, _ = decode_control(await read_control_body(request))
    services = request.app[SERVICES]
    is_ready = services.executor.stats().ready and not services.draining
    entries = []
    for key in services.repository.keys:
        if services.repository.in_service(*key):
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
    name, version = await _controlled(request)
    services = request.app[SERVICES]
    async with services.loading:
        for key in _named(services, name, version):
            if services.residency is None:
                await services.executor.load(key)
            else:
                await services.residency.bring(key)
            services.repository.restore(*key)
            _log(request, "model_loaded", key)
    return web.Response()


async def unload(request: web.Request) -> web.Response:
    """``POST /v2/repository/models/{name}/unload``: no new requests, and then no memory."""
    name, version = await _controlled(request)
    services = request.app[SERVICES]
    services.repository.withdraw(name, version)
    for key in _named(services, name, version):
        freeing = asyncio.create_task(_free(services, key), name="unload")
        services.freeing.add(freeing)
        freeing.add_done_callback(services.freeing.discard)
        _log(request, "model_unloaded", key)
    return web.Response()


def _named(services: Services, name: str, version: str | None) -> list[ModelKey]:
    """All versions, or the one that is named. ``ModelNotFound``."""
    if version is not None:
        return [services.repository.key_of(name, version)]
    return [one.key for one in services.repository.versions(name)]


def _log(request: web.Request, event: str, key: ModelKey) -> None:
    fields = {"model": key.name, "version": key.version}
    log_event(event, fields | {"request_id": request[TRACE].request_id})


async def _free(services: Services, key: ModelKey) -> None:
    """Free a model's memory once nobody waits for it, unless it is back in service by then."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + _DRAIN_S
    while services.scheduler.queued(key) and loop.time() < end_s:  # noqa: ASYNC110  # once
        await asyncio.sleep(_POLL_S)
    async with services.loading:
        if services.repository.in_service(*key):
            return
        try:
            if services.residency is None:
                await services.executor.unload(key)
            else:
                await services.residency.drop(key)
        except NearfarError as error:
            log_event("unload_failed", {"model": key.name, "text": error.detail})


async def _controlled(request: web.Request) -> tuple[str, str | None]:
    """The model of a request that may change the service, and the version that it names.

    Raises ``Unauthorized`` without an admin key, and ``WireError`` where the request wants
    to bring a configuration or files along.
    """
    require_admin(request[TRACE], "loading and unloading")
    _, parameters = decode_control(await read_control_body(request))
    version = parameters.pop("version", None)
    if version is not None and not isinstance(version, str):
        raise WireError("parameter 'version' is the text of a version or alias")
    foreign = [name for name in parameters if name != "unload_dependents"]
    if foreign:
        raise WireError(
            f"parameter {foreign[0][:64]!r} is not taken: a model is what its servable says; "
            "export another one and start a broker with it"
        )
    return request.match_info["name"], version
