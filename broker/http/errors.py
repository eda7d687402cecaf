"""From errors to HTTP: the one table of statuses, and the bodies.

``/v2`` answers ``{"error": text}`` as the Open Inference Protocol says, everything else
problem details (RFC 9457). A 5xx of 500 is a bug of ours; what a client does wrong is 4xx,
and what may work later is 408, 409, 503 or 504.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Final

import msgspec
from aiohttp import hdrs, web

from edge_runtime.contract import errors as e
from edge_runtime.contract.wire import PROBLEM_MEDIA_TYPE, REQUEST_ID_HEADER, Problem

__all__ = [
    "INTERNAL_DETAIL",
    "STATUS",
    "error_response",
    "problem_response",
    "response_for_http_exception",
    "status_of",
]

STATUS: Final[Mapping[type[e.NearfarError], int]] = MappingProxyType(
    {
        e.NearfarError: 500,
        e.ConfigError: 500,
        e.ContractError: 400,
        e.ManifestError: 500,
        e.WireError: 400,
        e.MediaTypeUnsupported: 415,
        e.UploadStalled: 408,
        e.LimitExceeded: 400,
        e.TensorError: 400,
        e.ImageError: 422,
        e.ImageUnreadable: 422,
        e.ImageTooLarge: 413,
        e.ImageAnimated: 422,
        e.ImageModeUnsupported: 422,
        e.TrustError: 500,
        e.RuntimeFault: 500,
        e.BackendUnavailable: 503,
        e.ModelLoadError: 503,
        e.InferenceError: 502,
        e.RemoteError: 503,
        e.NetworkUnreachable: 502,
        e.DeadlineExceeded: 504,
        e.CircuitOpen: 503,
        e.Unauthorized: 401,
        e.ModelNotFound: 404,
        e.RequestRejected: 400,
        e.Overloaded: 503,
        e.RateLimited: 429,
        e.WorkerLost: 503,
        e.JobNotFound: 404,
        e.JobNotReady: 409,
        e.JobCanceled: 410,
        e.BrokerFault: 500,
        e.ConversionError: 500,
    }
)

INTERNAL_DETAIL: Final = "the broker failed; its log holds the reason under this request id"


def status_of(error: NearfarErrorOrType) -> int:
    """The HTTP status of an error, or of its nearest ancestor in the table."""
    kind = error if isinstance(error, type) else type(error)
    for ancestor in kind.__mro__:
        status = STATUS.get(ancestor)
        if status is not None:
            return status
    return 500


NearfarErrorOrType = e.NearfarError | type[e.NearfarError]


def error_response(error: e.NearfarError, path: str, request_id: str) -> web.Response:
    """The answer that tells a client of ``error``, in the shape its path asks for."""
    response = problem_response(
        path=path,
        status=status_of(error),
        code=error.code,
        detail=error.detail,
        retryable=error.retryable,
        request_id=request_id,
    )
    if isinstance(error, e.Unauthorized):
        response.headers["WWW-Authenticate"] = 'Bearer realm="nearfar"'
    return response


def problem_response(
    *, path: str, status: int, code: str, detail: str, retryable: bool, request_id: str
) -> web.Response:
    """One error body."""
    if path == "/v2" or path.startswith("/v2/"):
        body = msgspec.json.encode({"error": detail})
        media_type = "application/json"
    else:
        problem = Problem(
            title=HTTPStatus(status).phrase,
            status=status,
            detail=detail,
            code=code,
            retryable=retryable,
            request_id=request_id,
        )
        body = msgspec.json.encode(problem)
        media_type = PROBLEM_MEDIA_TYPE
    response = web.Response(status=status, body=body, content_type=media_type)
    response.headers[hdrs.SERVER] = "nearfar"
    if request_id:
        response.headers[REQUEST_ID_HEADER] = request_id
    return response


def response_for_http_exception(
    error: web.HTTPException, path: str, request_id: str
) -> tuple[web.Response, str]:
    """What the router itself refuses (404, 405, ...), as an error body, and its code."""
    code = e.RequestRejected.code if error.status < 500 else e.BrokerFault.code
    details = {
        404: "no such route: docs/http-api.md lists them",
        405: "this route has another method: see the Allow header",
        417: "only Expect: 100-continue is understood",
    }
    response = problem_response(
        path=path,
        status=error.status,
        code=code,
        detail=details.get(error.status, error.reason),
        retryable=False,
        request_id=request_id,
    )
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response, code
