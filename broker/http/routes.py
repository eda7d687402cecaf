"""Every route, with its name. ``docs/openapi.yaml`` describes them; a test compares."""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler

from broker.http import (
    jobs,
    jobs_events,
    metrics,
    models,
    oip,
    oip_infer,
    oip_repository,
    predict,
    quotes,
    routing,
)
from broker.http.headers import defer_continue
from broker.http.sessions.route import session
from edge_runtime.contract.frames import SESSION_PATH

__all__ = ["add_routes"]

_NAME = "{name:[^/:{}]+}"
_VERSION = "{version:[^/:{}]+}"
_JOB = "{id:[A-Za-z0-9_-]{1,64}}"


def add_routes(router: web.UrlDispatcher) -> None:
    """Register all handlers. Their names are the ``route`` label of the metrics."""
    # aiohttp tries resources in the order they were added: those that are asked most come first.
    posts: tuple[tuple[str, Handler, str], ...] = (
        (f"/v1/models/{_NAME}:predict", predict.predict, "predict"),
        (f"/v1/models/{_NAME}/jobs", jobs.submit_job, "job_submit"),
        (f"/v2/models/{_NAME}/infer", oip_infer.infer, "oip_infer"),
        (
            f"/v2/models/{_NAME}/versions/{_VERSION}/infer",
            oip_infer.infer,
            "oip_version_infer",
        ),
        (f"/v1/models/{_NAME}/routing", routing.change_routing, "routing_change"),
        ("/v2/repository/index", oip_repository.index, "oip_index"),
        (f"/v2/repository/models/{_NAME}/load", oip_repository.load, "oip_load"),
        (f"/v2/repository/models/{_NAME}/unload", oip_repository.unload, "oip_unload"),
    )
    for path, handler, name in posts:
        router.add_post(path, handler, name=name, expect_handler=defer_continue)
    gets: tuple[tuple[str, Handler, str], ...] = (
        ("/v1/models", models.list_models, "models"),
        (f"/v1/models/{_NAME}", models.show_model, "model"),
        (f"/v1/models/{_NAME}/quote", quotes.quote, "quote"),
        (f"/v1/models/{_NAME}/routing", routing.show_routing, "routing"),
        ("/v1/load", quotes.load, "load"),
        ("/v2", oip.server_metadata, "oip_server"),
        ("/v2/health/live", oip.live, "oip_live"),
        ("/v2/health/ready", oip.ready, "oip_ready"),
        ("/v2/models/stats", oip.all_statistics, "oip_all_stats"),  # before the model "stats"
        (f"/v2/models/{_NAME}", oip.model_metadata, "oip_model"),
        (f"/v2/models/{_NAME}/ready", oip.model_ready, "oip_model_ready"),
        (f"/v2/models/{_NAME}/config", oip.model_config, "oip_model_config"),
        (f"/v2/models/{_NAME}/stats", oip.model_statistics, "oip_model_stats"),
        (f"/v2/models/{_NAME}/versions/{_VERSION}", oip.model_metadata, "oip_version"),
        (
            f"/v2/models/{_NAME}/versions/{_VERSION}/config",
            oip.model_config,
            "oip_version_config",
        ),
        (
            f"/v2/models/{_NAME}/versions/{_VERSION}/stats",
            oip.model_statistics,
            "oip_version_stats",
        ),
        (
            f"/v2/models/{_NAME}/versions/{_VERSION}/ready",
            oip.model_ready,
            "oip_version_ready",
        ),
        (SESSION_PATH, session, "session"),
        (f"/v1/jobs/{_JOB}", jobs.show_job, "job"),
        (f"/v1/jobs/{_JOB}/result", jobs.job_result, "job_result"),
        (f"/v1/jobs/{_JOB}/events", jobs_events.job_events, "job_events"),
        ("/metrics", metrics.metrics, "metrics"),
    )
    for path, handler, name in gets:
        router.add_get(path, handler, name=name, expect_handler=defer_continue)
    router.add_delete(f"/v1/jobs/{_JOB}", jobs.cancel_job, name="job_cancel")
    absent = (
        ("/v2/logging", oip.no_logging, "logging"),
        ("/v2/trace/setting", oip.no_tracing, "trace"),
        (f"/v2/models/{_NAME}/trace/setting", oip.no_tracing, "model_trace"),
        ("/v2/systemsharedmemory/{rest:.+}", oip.no_shared_memory, "system_memory"),
        ("/v2/cudasharedmemory/{rest:.+}", oip.no_shared_memory, "cuda_memory"),
    )
    for path, handler, name in absent:
        router.add_get(path, handler, name=f"oip_{name}", expect_handler=defer_continue)
        router.add_post(path, handler, name=f"oip_set_{name}", expect_handler=defer_continue)
