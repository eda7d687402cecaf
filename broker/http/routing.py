"""``/v1/models/{name}/routing``: who gets which version, shown and changed."""

from __future__ import annotations

import msgspec
from aiohttp import web

from broker.http.admin import read_control_body, require_admin
from broker.http.context import SERVICES, TRACE
from broker.models.changes import decode_change
from edge_runtime.contract.errors import ConfigError, RequestRejected

__all__ = ["change_routing", "show_routing"]


async def show_routing(request: web.Request) -> web.Response:
    """Default, aliases, canary with what it did so far, shadow, events. ``ModelNotFound``."""
    return _shown(request)


async def change_routing(request: web.Request) -> web.Response:
    """Make one change (``broker/models/changes.py``) and show the routing after it.

    Raises ``Unauthorized`` without an admin key, ``WireError``, ``ModelNotFound``, and
    ``RequestRejected`` where the change contradicts what there is.
    """
    require_admin(request[TRACE], "changing the routing")
    services = request.app[SERVICES]
    services.repository.versions(request.match_info["name"])
    change = decode_change(await read_control_body(request))
    try:
        services.rollouts.change(request.match_info["name"], change)
    except ConfigError as error:
        raise RequestRejected(error.detail) from None
    return _shown(request)


def _shown(request: web.Request) -> web.Response:
    services, name = request.app[SERVICES], request.match_info["name"]
    status = services.rollouts.status(name)
    shadow = services.shadows.status(name)
    document = msgspec.to_builtins(status) | {"shadow": msgspec.to_builtins(shadow)}
    return web.Response(body=msgspec.json.encode(document), content_type="application/json")
