"""Health, metadata and statistics of the Open Inference Protocol, version 2.

https://github.com/kserve/open-inference-protocol, with Triton's extensions. Errors here are
``{"error": text}``.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Final

import msgspec
from aiohttp import web

from broker.http.context import SERVICES, TRACE
from broker.http.errors import problem_response
from broker.models.servable import OpenedServable
from broker.oip.interface import Interface

__all__ = [
    "all_statistics",
    "live",
    "model_config",
    "model_metadata",
    "model_ready",
    "model_statistics",
    "not_offered",
    "ready",
    "server_metadata",
]

_EXTENSIONS: Final = (
    "classification",
    "model_configuration",
    "model_repository",
    "schedule_policy",
    "statistics",
    "binary_tensor_data",
)
_NOT_OFFERED: Final = {
    "oip_logging": "the server does not support the logging extension: set what the broker "
    "logs where it is started",
    "oip_trace": "the server does not support tracing: answers carry Server-Timing",
    "oip_model_trace": "the server does not support tracing: answers carry Server-Timing",
    "oip_shared_memory": "the server does not support shared memory: send and take tensors in "
    "the body",
}


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(value), content_type="application/json"
    )


def _model(request: web.Request) -> OpenedServable:
    return request.app[SERVICES].repository.get(
        request.match_info["name"], request.match_info.get("version")
    )


def _is_ready(request: web.Request) -> bool:
    services = request.app[SERVICES]
    return services.executor.stats().ready and not services.draining


async def server_metadata(_request: web.Request) -> web.Response:
    """``GET /v2``."""
    return _json({"name": "nearfar", "version": version("nearfar"), "extensions": _EXTENSIONS})


async def live(_request: web.Request) -> web.Response:
    """``GET /v2/health/live``: this process answers."""
    return _json({"live": True})


async def ready(request: web.Request) -> web.Response:
    """``GET /v2/health/ready``: 200 when models can run now, else 503."""
    is_ready = _is_ready(request)
    return _json({"ready": is_ready}, 200 if is_ready else 503)


async def model_metadata(request: web.Request) -> web.Response:
    """``GET /v2/models/{name}[/versions/{version}]``."""
    return _json(Interface(_model(request)).metadata)


async def model_ready(request: web.Request) -> web.Response:
    """``GET /v2/models/{name}[/versions/{version}]/ready``."""
    manifest = _model(request).manifest
    is_ready = _is_ready(request)
    return _json({"name": manifest.name, "ready": is_ready}, 200 if is_ready else 503)


async def model_config(request: web.Request) -> web.Response:
    """``GET /v2/models/{name}[/versions/{version}]/config``, as Triton says it."""
    return _json(Interface(_model(request)).config)


async def model_statistics(request: web.Request) -> web.Response:
    """``GET /v2/models/{name}[/versions/{version}]/stats``."""
    statistics = request.app[SERVICES].telemetry.statistics
    return _json(statistics.document((_model(request).key,)))


async def all_statistics(request: web.Request) -> web.Response:
    """``GET /v2/models/stats``: of every model in service."""
    services = request.app[SERVICES]
    served = [key for key in services.repository.keys if services.repository.in_service(key.name)]
    return _json(services.telemetry.statistics.document(served))


async def not_offered(request: web.Request) -> web.Response:
    """An extension of Triton's that is not here: 501, as Triton without it says."""
    trace = request[TRACE]
    trace.code = "not_offered"
    route = request.match_info.route.resource
    name = route.name if route is not None else None
    return problem_response(
        path=request.path,
        status=501,
        code=trace.code,
        detail=_NOT_OFFERED[name or "oip_trace"],
        retryable=False,
        request_id=trace.request_id,
    )
