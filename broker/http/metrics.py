"""``GET /metrics``: for Prometheus."""

from __future__ import annotations

from aiohttp import web

from broker.http.context import SERVICES
from broker.telemetry import METRICS_CONTENT_TYPE

__all__ = ["metrics"]


async def metrics(request: web.Request) -> web.Response:
    """All metrics in Prometheus' text format."""
    return web.Response(
        body=request.app[SERVICES].telemetry.exposition(),
        headers={"Content-Type": METRICS_CONTENT_TYPE},
    )
