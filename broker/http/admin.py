"""What requests that change the service have in common: an admin key and a small body."""

from __future__ import annotations

import asyncio

from aiohttp import web

from broker.http.body import read_body
from broker.http.context import Trace
from broker.http.headers import send_continue
from edge_runtime.contract import limits
from edge_runtime.contract.errors import LimitExceeded, Unauthorized

__all__ = ["read_control_body", "require_admin"]


def require_admin(trace: Trace, doing: str) -> None:
    """Raise ``Unauthorized`` without an admin key; ``doing`` says what needs one."""
    if trace.principal is None:
        raise Unauthorized(
            f"{doing} needs an admin key: start the broker with --keys, and make one with "
            "nearfar keys add --admin"
        )
    if not trace.principal.admin:
        raise Unauthorized(f"this API key is no admin key: {doing} needs one")


async def read_control_body(request: web.Request) -> bytes:
    """The whole body. Raises ``LimitExceeded`` and what ``read_body`` raises."""
    await send_continue(request)
    return await read_body(
        request,
        max_bytes=limits.MAX_CONTROL_BODY_BYTES,
        too_large=lambda: LimitExceeded(
            f"the body has more than {limits.MAX_CONTROL_BODY_BYTES} bytes"
        ),
        deadline_s=asyncio.get_running_loop().time() + limits.MAX_BODY_MS / 1e3,
    )
