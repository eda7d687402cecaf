"""Which version of a model a request gets, whichever way it came."""

from __future__ import annotations

from aiohttp import web

from broker.http.context import Services, Trace
from broker.models.servable import OpenedServable
from edge_runtime.contract import limits
from edge_runtime.contract.errors import WireError

__all__ = ["VERSION_PARAMETER", "asked_version", "choose_version"]

VERSION_PARAMETER = "version"


def asked_version(request: web.Request) -> str | None:
    """``?version=``, a version or an alias; None: the query names none. Raises ``WireError``."""
    values = request.query.getall(VERSION_PARAMETER, [])
    if not values:
        return None
    if len(values) > 1 or not 0 < len(values[0]) <= limits.MAX_NAME_CHARS:
        raise WireError("version must be one version or alias: GET /v1/models lists them")
    return values[0]


def choose_version(
    services: Services,
    trace: Trace,
    name: str,
    version: str | None,
    *,
    address: str | None,
    key: str | None = None,
    tensors: bool = False,
) -> OpenedServable:
    """The servable for a request, noted in ``trace``.

    ``address``: of the other side of its connection; ``key``: its idempotency key; ``tensors``:
    see ``Rollouts.choose``. Raises ``ModelNotFound``.
    """
    principal = trace.principal
    who = ("", "") if principal is None else (principal.tenant, principal.key_id)
    chosen = services.rollouts.choose(
        name,
        version,
        caller=(*who, address or ""),
        key=key or trace.request_id,
        tensors=tensors,
    )
    trace.model = chosen.servable.key
    trace.split = chosen.split
    return chosen.servable
