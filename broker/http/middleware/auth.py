"""Who asks: decided by the API key alone, before anything else is looked at."""

from __future__ import annotations

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from broker.http.context import SERVICES, TRACE
from broker.http.headers import single_header

__all__ = ["authenticate"]

_OPEN_ROUTES = frozenset(("oip_live", "oip_ready"))
"""Probes of orchestrators carry no key, and learn only whether we are up."""
_SESSION_ROUTE = "session"
"""A page in a browser cannot set a header here: its key comes in the first frame."""


@web.middleware
async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Raises ``Unauthorized`` where keys are asked for and this is none of them."""
    key_ring = request.app[SERVICES].key_ring
    trace = request[TRACE]
    if key_ring is not None and trace.route not in _OPEN_ROUTES:
        said = single_header(request, hdrs.AUTHORIZATION)
        if said is not None or trace.route != _SESSION_ROUTE:
            trace.principal = key_ring.authenticate(said)
    return await handler(request)
