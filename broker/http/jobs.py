"""``/v1/models/{name}/jobs`` and ``/v1/jobs/{id}``: submit, look, fetch, cancel."""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import hdrs, web

from broker.http.accept import answer_types, negotiate
from broker.http.answering import check_content
from broker.http.body import read_body
from broker.http.callers import spend
from broker.http.choosing import asked_version
from broker.http.context import SERVICES, TRACE, Services
from broker.http.errors import error_response
from broker.http.headers import (
    body_kind,
    parse_query,
    send_continue,
    single_header,
    upload_bound_bytes,
    upload_media_type,
)
from broker.jobs.record import Job, JobSpec
from edge_runtime.contract import limits
from edge_runtime.contract.errors import JobNotReady, NearfarError
from edge_runtime.contract.jobs import job_path
from edge_runtime.contract.wire import (
    IDEMPOTENCY_HEADER,
    JSON_MEDIA_TYPE,
    SERVER_TIMING_HEADER,
    format_picture_headers,
    format_server_timing,
    parse_idempotency_key,
)

__all__ = ["cancel_job", "find_job", "job_result", "show_job", "submit_job", "tenant_of"]


async def submit_job(request: web.Request) -> web.Response:
    """Refuse on the headers, or read the body, store it and say where the job is (202)."""
    services, tenant = request.app[SERVICES], tenant_of(request)
    version = asked_version(request)
    servable = services.repository.get(request.match_info["name"], version)
    kind = body_kind(servable.task)
    media_type = upload_media_type(request, kind)
    bound_bytes = upload_bound_bytes(request, kind)
    query = parse_query(request, servable.task)
    spec = JobSpec(
        model=servable.key.name,
        media_type=media_type,
        accept=negotiate(single_header(request, hdrs.ACCEPT), answer_types(servable.task)),
        top_k=query.top_k,
        palette=query.palette,
        version=version,
    )
    key = parse_idempotency_key(single_header(request, IDEMPOTENCY_HEADER))
    job = services.jobs.known(tenant, key, spec, request.content_length)
    trace = request[TRACE]
    trace.model = servable.key  # a refusal says when to come back
    if job is None:
        spend(services, trace)
        with services.jobs.uploading(tenant, bound_bytes):
            await send_continue(request)
            body = await read_body(
                request,
                max_bytes=bound_bytes,
                too_large=kind.too_large,
                deadline_s=asyncio.get_running_loop().time() + limits.MAX_BODY_MS / 1e3,
            )
            services.telemetry.body_read(len(body))
            trace.upload_bytes = len(body)
            check_content(body, media_type)
            job = await services.jobs.add(tenant, key, spec, body)
    trace.model = None  # nothing ran yet: no inference to count
    return _shown(services, job, status=202)


async def show_job(request: web.Request) -> web.Response:
    """State, progress and place. ``JobNotFound``."""
    return _shown(request.app[SERVICES], find_job(request), status=200)


async def job_result(request: web.Request) -> web.Response:
    """The answer as ``:predict`` would have given it, or why there is none."""
    services = request.app[SERVICES]
    job = find_job(request)
    try:
        answer, body = await services.jobs.result(job)
    except JobNotReady as error:
        return _not_ready(request, error)
    headers = {SERVER_TIMING_HEADER: format_server_timing(answer.timing)}
    if answer.media_type != JSON_MEDIA_TYPE:
        headers |= format_picture_headers(answer.model, answer.region)
    return web.Response(body=body, content_type=answer.media_type, headers=headers)


async def cancel_job(request: web.Request) -> web.Response:
    """End it, or forget one that has ended (204). ``JobNotFound``."""
    await request.app[SERVICES].jobs.cancel(find_job(request))
    return web.Response(status=204)


def find_job(request: web.Request) -> Job:
    """The job of the path, if it is the caller's. ``JobNotFound``."""
    return request.app[SERVICES].jobs.get(tenant_of(request), request.match_info["id"])


def tenant_of(request: web.Request) -> str:
    """Who asks; without keys everybody is the same."""
    principal = request[TRACE].principal
    return "" if principal is None else principal.tenant


def _shown(services: Services, job: Job, *, status: int) -> web.Response:
    response = web.Response(
        status=status,
        body=msgspec.json.encode(services.jobs.info(job)),
        content_type=JSON_MEDIA_TYPE,
        headers={hdrs.CACHE_CONTROL: "no-store"},
    )
    if status == 202:
        response.headers[hdrs.LOCATION] = job_path(job.id)
    return response


def _not_ready(request: web.Request, error: NearfarError) -> web.Response:
    trace = request[TRACE]
    trace.code = error.code
    response = error_response(error, request.path, trace.request_id)
    response.headers[hdrs.RETRY_AFTER] = "1"
    return response
