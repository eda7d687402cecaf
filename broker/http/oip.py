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
    "no_logging",
    "no_shared_memory",
    "no_tracing",
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
    servable = _model(request)
    serving = request.app[SERVICES].repository.serving
    versions = [key.version for key in serving if key.name == servable.key.name]
    return _json(Interface.of(servable).metadata(versions))


async def model_ready(request: web.Request) -> web.Response:
    """``GET /v2/models/{name}[/versions/{version}]/ready``."""
    manifest = _model(request).manifest
    is_ready = _is_ready(request)
    return _json({"name": manifest.name, "ready": is_ready}, 200 if is_ready else 503)


async def model_config(request: web.Request) -> web.Response:
    """``GET /v2/models/{name}[/versions/{version}]/config``, as Triton says it."""
    return _json(Interface.of(_model(request)).config)


async def model_statistics(request: web.Request) -> web.Response:
    """``GET /v2/models/{name}[/versions/{version}]/stats``."""
    statistics = request.app[SERVICES].telemetry.statistics
    return _json(statistics.document((_model(request).key,)))


async def all_statistics(request: web.Request) -> web.Response:
    """``GET /v2/models/stats``: of every model in service."""
    services = request.app[SERVICES]
    return _json(services.telemetry.statistics.document(services.repository.serving))


async def no_logging(request: web.Request) -> web.Response:
    """``/v2/logging``: 501, as a Triton without the extension says."""
    return _not_offered(request, "logging settings: say what to log where the broker is started")


async def no_tracing(request: web.Request) -> web.Response:
    """``/v2/trace/setting`` and that of a model: 501."""
    return _not_offered(request, "tracing: each answer carries Server-Timing")


async def no_shared_memory(request: web.Request) -> web.Response:
    """``/v2/systemsharedmemory/...`` and ``/v2/cudasharedmemory/...``: 501."""
    return _not_offered(request, "shared memory: send and take tensors in the body")


def _not_offered(request: web.Request, what: str) -> web.Response:
    trace = request[TRACE]
    trace.code = "not_offered"
    return problem_response(
        path=request.path,
        status=501,
        code=trace.code,
        detail=f"the server does not support {what}",
        retryable=False,
        request_id=trace.request_id,
    )
