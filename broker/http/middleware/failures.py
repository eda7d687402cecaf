"""Every error becomes an answer; what nobody foresaw is logged and says nothing outside."""

from __future__ import annotations

import logging

from aiohttp import web
from aiohttp.typedefs import Handler

from broker.http.context import TRACE
from broker.http.errors import (
    INTERNAL_DETAIL,
    error_response,
    problem_response,
    response_for_http_exception,
)
from edge_runtime.contract.errors import BrokerFault, NearfarError

__all__ = ["answer_failures"]

_LOG = logging.getLogger(__name__)


@web.middleware
async def answer_failures(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn exceptions into error bodies. A client that left stays an exception."""
    trace = request[TRACE]
    try:
        return await handler(request)
    except NearfarError as error:
        trace.code = error.code
        return error_response(error, request.path, trace.request_id)
    except web.HTTPException as error:
        response, trace.code = response_for_http_exception(error, request.path, trace.request_id)
        return response
    except ConnectionError:
        raise  # nobody is there to be answered
    except Exception:
        _LOG.exception("request %s failed in a way nobody foresaw", trace.request_id)
        trace.code = BrokerFault.code
        return problem_response(
            path=request.path,
            status=500,
            code=BrokerFault.code,
            detail=INTERNAL_DETAIL,
            retryable=BrokerFault.retryable,
            request_id=trace.request_id,
        )
