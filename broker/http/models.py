"""``GET /v1/models`` and ``GET /v1/models/{name}``: what is served here."""

from __future__ import annotations

import msgspec
from aiohttp import web

from broker.executors.base import Executor
from broker.http.context import SERVICES
from broker.models.servable import OpenedServable
from edge_runtime.contract.tasks import has_labels

__all__ = ["ModelInfo", "ModelList", "list_models", "show_model"]


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a device checks before it trusts a model's answers."""

    name: str
    version: str
    sha256: str
    labels_sha256: str | None
    task: str
    classes: int | None
    """None where answers name no classes."""
    runtime: str | None
    """What computes it, and how exactly; None while it is not in memory."""
    precision: str | None


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All of them, sorted by name."""

    models: tuple[ModelInfo, ...]


def _info(servable: OpenedServable, executor: Executor) -> ModelInfo:
    ref = servable.ref
    loaded = executor.stats().models.get(servable.key)
    return ModelInfo(
        name=ref.name,
        version=ref.version,
        sha256=ref.sha256,
        labels_sha256=ref.labels_sha256,
        task=servable.task_name,
        classes=servable.task.classes if has_labels(servable.task) else None,
        runtime=None if loaded is None else loaded.runtime,
        precision=None if loaded is None else loaded.precision,
    )


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


async def list_models(request: web.Request) -> web.Response:
    """Every model."""
    repository, executor = request.app[SERVICES].repository, request.app[SERVICES].executor
    served = [one for one in repository if repository.in_service(one.manifest.name)]
    served.sort(key=lambda servable: servable.key)
    return _json(ModelList(models=tuple(_info(servable, executor) for servable in served)))


async def show_model(request: web.Request) -> web.Response:
    """One model. ``ModelNotFound``."""
    services = request.app[SERVICES]
    servable = services.repository.get(request.match_info["name"])
    return _json(_info(servable, services.executor))
