"""``GET /v1/models`` and ``GET /v1/models/{name}``: what is served here, and to whom."""

from __future__ import annotations

import msgspec
from aiohttp import web

from broker.http.choosing import VERSION_PARAMETER, asked_version
from broker.http.context import SERVICES, Services
from broker.models.servable import OpenedServable
from edge_runtime.contract.errors import WireError
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
    default: bool
    """What a request gets that names no version, the canary's share aside."""
    aliases: tuple[str, ...]
    """Names that stand for this version."""
    percent: float
    """Of the requests that name no version: how many it answers."""
    shadow_percent: float
    """And how many it computes beside, for comparison."""


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All versions in service: by name, the default of each first, then the highest."""

    models: tuple[ModelInfo, ...]


def _info(servable: OpenedServable, services: Services) -> ModelInfo:
    ref, key = servable.ref, servable.key
    loaded = services.executor.stats().models.get(key)
    aliases = services.repository.aliases(key.name)
    return ModelInfo(
        name=ref.name,
        version=ref.version,
        sha256=ref.sha256,
        labels_sha256=ref.labels_sha256,
        task=servable.task_name,
        classes=servable.task.classes if has_labels(servable.task) else None,
        runtime=None if loaded is None else loaded.runtime,
        precision=None if loaded is None else loaded.precision,
        default=services.repository.is_default(key),
        aliases=tuple(alias for alias, version in aliases.items() if version == key.version),
        percent=services.rollouts.percent_of(key),
        shadow_percent=services.rollouts.shadow_percent_of(key),
    )


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


async def list_models(request: web.Request) -> web.Response:
    """Every version of every model.

    The default of each name comes first: devices take the first entry of a name.
    """
    services = request.app[SERVICES]
    repository = services.repository
    served = [repository.get(*key) for key in repository.serving]
    infos = [_info(servable, services) for servable in served]
    infos.sort(key=lambda info: (info.name, not info.default))
    return _json(ModelList(models=tuple(infos)))


async def show_model(request: web.Request) -> web.Response:
    """One model, of the version or alias ``?version=``. ``ModelNotFound``, ``WireError``."""
    services = request.app[SERVICES]
    unknown = sorted(set(request.query) - {VERSION_PARAMETER})
    if unknown:
        raise WireError(f"unknown query parameter {unknown[0][:64]!r}: only version is known")
    servable = services.repository.get(request.match_info["name"], asked_version(request))
    return _json(_info(servable, services))
