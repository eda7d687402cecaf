"""When a deferred job may be sent: what the platform says, held to what the app asked for."""

from __future__ import annotations

import time

from edge_runtime.conditions import Conditions, LinkType
from edge_runtime.contract.errors import DeadlineExceeded, NearfarError, NetworkUnreachable
from edge_runtime.jobs.store import Deferral

__all__ = ["obstacle", "waits_for"]

_FREE_LINKS: tuple[LinkType, ...] = ("wifi", "ethernet")
"""Taken to cost nothing, where the platform does not say."""


def waits_for(deferral: Deferral, conditions: Conditions) -> str | None:
    """What is missing; None: it may be sent. What is not known is missing."""
    if conditions.link_type == "none":
        return "a network"
    if deferral.unmetered:
        free = conditions.metered is False
        if conditions.metered is None:
            free = conditions.link_type in _FREE_LINKS
        if not free or conditions.data_saver is True:
            return "a network that is not metered"
    if deferral.charging and conditions.charging is not True:
        return "a charger"
    return None


def obstacle(deferral: Deferral, conditions: Conditions) -> NearfarError | None:
    """The same as an error: one that passes, or ``DeadlineExceeded`` (not retried) at its end."""
    if time.time() >= deferral.expires_s:
        return _Expired("the deferred job was not sent in its time: defer it again")
    missing = waits_for(deferral, conditions)
    return None if missing is None else NetworkUnreachable(f"the job waits for {missing}")


class _Expired(DeadlineExceeded):
    """Time will not mend this one."""

    retryable = False
