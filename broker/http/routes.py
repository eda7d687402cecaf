"""Every route, with its name. ``docs/openapi.yaml`` describes them; a test compares."""

from __future__ import annotations

from aiohttp import web

from broker.http import metrics, models, oip, predict
from broker.http.headers import defer_continue
from broker.http.sessions.route import session
from edge_runtime.contract.frames import SESSION_PATH

__all__ = ["add_routes"]

_NAME = "{name:[^/:{}]+}"
_VERSION = "{version:[^/:{}]+}"


def add_routes(router: web.UrlDispatcher) -> None:
    """Register all handlers. Their names are the ``route`` label of the metrics."""
    gets = (
        ("/v1/models", models.list_models, "models"),
        (f"/v1/models/{_NAME}", models.show_model, "model"),
        ("/v2", oip.server_metadata, "oip_server"),
        ("/v2/health/live", oip.live, "oip_live"),
        ("/v2/health/ready", oip.ready, "oip_ready"),
        (f"/v2/models/{_NAME}", oip.model_metadata, "oip_model"),
        (f"/v2/models/{_NAME}/ready", oip.model_ready, "oip_model_ready"),
        (f"/v2/models/{_NAME}/versions/{_VERSION}", oip.model_metadata, "oip_version"),
        (
            f"/v2/models/{_NAME}/versions/{_VERSION}/ready",
            oip.model_ready,
            "oip_version_ready",
        ),
        (SESSION_PATH, session, "session"),
        ("/metrics", metrics.metrics, "metrics"),
    )
    for path, handler, name in gets:
        router.add_get(path, handler, name=name, expect_handler=defer_continue)
    router.add_post(
        f"/v1/models/{_NAME}:predict",
        predict.predict,
        name="predict",
        expect_handler=defer_continue,
    )
