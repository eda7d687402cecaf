"""Health and metadata of the Open Inference Protocol, version 2.

https://github.com/kserve/open-inference-protocol. Errors here are ``{"error": text}``.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Final

import msgspec
from aiohttp import web

from broker.http.context import SERVICES
from broker.models.servable import OpenedServable
from edge_runtime.contract.tensors import DType, TensorSpec

__all__ = [
    "live",
    "model_metadata",
    "model_ready",
    "ready",
    "server_metadata",
]

_DATATYPES: Final[dict[DType, str]] = {
    "float32": "FP32",
    "float16": "FP16",
    "int8": "INT8",
    "uint8": "UINT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
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


def _tensor(spec: TensorSpec) -> dict[str, object]:
    """The batch axis is -1: any number of images."""
    return {
        "name": spec.name,
        "datatype": _DATATYPES[spec.dtype],
        "shape": [-1, *spec.shape[1:]],
    }


async def server_metadata(_request: web.Request) -> web.Response:
    """``GET /v2``."""
    return _json({"name": "nearfar", "version": version("nearfar"), "extensions": []})


async def live(_request: web.Request) -> web.Response:
    """``GET /v2/health/live``: this process answers."""
    return _json({"live": True})


async def ready(request: web.Request) -> web.Response:
    """``GET /v2/health/ready``: 200 when models can run now, else 503."""
    is_ready = _is_ready(request)
    return _json({"ready": is_ready}, 200 if is_ready else 503)


async def model_metadata(request: web.Request) -> web.Response:
    """``GET /v2/models/{name}[/versions/{version}]``."""
    manifest = _model(request).manifest
    return _json(
        {
            "name": manifest.name,
            "versions": [manifest.version],
            "platform": "pytorch_exportedprogram",
            "inputs": [_tensor(spec) for spec in manifest.model.inputs],
            "outputs": [_tensor(spec) for spec in manifest.model.outputs],
        }
    )


async def model_ready(request: web.Request) -> web.Response:
    """``GET /v2/models/{name}[/versions/{version}]/ready``."""
    manifest = _model(request).manifest
    is_ready = _is_ready(request)
    return _json({"name": manifest.name, "ready": is_ready}, 200 if is_ready else 503)
