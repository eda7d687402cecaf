"""On whose account a request runs, and whether that account may ask now."""

from __future__ import annotations

from broker.accounts.keys import Principal
from broker.http.context import Services, Trace
from broker.scheduling.ticket import DEFAULT_PRIORITY, Caller
from edge_runtime.contract.errors import RateLimited

__all__ = ["caller_of", "spend"]


def caller_of(principal: Principal | None, priority: int = DEFAULT_PRIORITY) -> Caller:
    """Tenant and weight are the key's; a class above its ceiling becomes the ceiling.

    Where no keys are asked for, everybody is one tenant and may ask for any class.
    """
    if principal is None:
        return Caller(priority=priority)
    return Caller(
        tenant=principal.tenant,
        weight=principal.weight,
        priority=max(priority, principal.max_priority),
    )


def spend(services: Services, trace: Trace) -> None:
    """Count one request to run a model against the rate of its key. Raises ``RateLimited``."""
    if trace.principal is None:
        return
    wait_s = services.rates.take(trace.principal)
    if wait_s > 0.0:
        trace.retry_after_s = wait_s
        raise RateLimited(
            f"this key may make {trace.principal.rate_per_s:g} requests a second: "
            "answer on the device, or ask again after Retry-After"
        )
