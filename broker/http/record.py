"""One log line and one count for each request, however it came."""

from __future__ import annotations

import math

from broker.http.context import Services, Trace
from broker.log import log_event
from edge_runtime.contract import limits

__all__ = ["CLIENT_LEFT", "record_request", "retry_after_s"]

CLIENT_LEFT = 499
"""nginx's status for a client that closed the connection: for log and metrics only."""
_SWITCHING_PROTOCOLS = 101
_MAX_LOGGED_PATH_CHARS = 256


def record_request(
    services: Services, trace: Trace, *, method: str, path: str, status: int, now_s: float
) -> None:
    """Count and log what was answered; ``now_s`` is on the event loop's clock."""
    seconds = now_s - trace.arrived_s
    if status == _SWITCHING_PROTOCOLS:
        services.telemetry.session_ended(trace.route, status)  # its length is no latency
    else:
        services.telemetry.request_answered(trace.route, status, seconds)
    if trace.code is not None:
        services.telemetry.error_answered(trace.code)
    if trace.model is not None:  # only requests to run a model carry one
        services.telemetry.inference_ended(
            trace.model,
            status=status,
            code=trace.code,
            total_ms=seconds * 1e3,
            queue_ms=trace.queue_ms,
            inference_ms=trace.inference_ms,
        )
        if not trace.joined:
            services.rollouts.ended(trace.model, split=trace.split, status=status, code=trace.code)
    model, principal = trace.model, trace.principal
    fields: dict[str, object] = {
        "request_id": trace.request_id,
        "method": method,
        "path": path[:_MAX_LOGGED_PATH_CHARS],
        "route": trace.route,
        "status": status,
        "ms": round(seconds * 1e3, 3),
    }
    if trace.code is not None:
        fields["code"] = trace.code
    if model is not None:
        fields["model"] = model.name
        fields["version"] = model.version
        fields["upload_bytes"] = trace.upload_bytes
        fields["recv_ms"] = _rounded(trace.recv_ms)
        fields["queue_ms"] = _rounded(trace.queue_ms)
        fields["inference_ms"] = _rounded(trace.inference_ms)
    if trace.joined:
        fields["joined"] = True
    if principal is not None:
        fields["tenant"] = principal.tenant
        fields["key"] = principal.key_id
    log_event("request", fields)


def retry_after_s(trace: Trace, queue_delay_ms: int) -> int:
    """Whole seconds after which a refused request may be tried again."""
    if trace.retry_after_s is not None:
        return max(1, math.ceil(trace.retry_after_s))
    return max(1, math.ceil(min(queue_delay_ms, limits.MAX_DEADLINE_MS) / 1e3))


def _rounded(value_ms: float | None) -> float | None:
    return None if value_ms is None else round(value_ms, 3)
