"""How much may be under way at one time: requests and bytes, of all and of one tenant."""

from __future__ import annotations

from collections import Counter

from broker.scheduling.ticket import Caller, Ticket
from edge_runtime.contract import limits
from edge_runtime.contract.errors import Overloaded

__all__ = ["Bounds"]

_TENANT_SHARE = 0.75
"""However long its deadlines are, one tenant leaves room for the others."""


class Bounds:
    """Counts tickets that are given out. ``max_queue``: how many may upload or wait."""

    def __init__(self, max_queue: int) -> None:
        self._max_queue = max_queue
        self.upload_bytes = 0
        self._tenants: Counter[str] = Counter()
        self._tenant_bytes: Counter[str] = Counter()

    def passed(self, caller: Caller, upload_bytes: int, queued: int) -> Overloaded | None:
        """Which bound one more request would pass, ``queued`` being there; None: none.

        The caller without a name is everybody, where nobody is asked for a key: it may have all.
        """
        if queued >= self._max_queue:
            return Overloaded(f"{self._max_queue} requests wait already: ask again later")
        if self.upload_bytes + upload_bytes > limits.MAX_UPLOAD_BYTES_IN_FLIGHT:
            return Overloaded("too many bytes are being uploaded already: ask again later")
        own_bytes = self._tenant_bytes[caller.tenant] + upload_bytes
        if caller.tenant and (
            self._tenants[caller.tenant] >= self._max_queue * _TENANT_SHARE
            or own_bytes > limits.MAX_UPLOAD_BYTES_IN_FLIGHT * _TENANT_SHARE
        ):
            return Overloaded("this tenant has too much under way: ask again later")
        return None

    def take(self, ticket: Ticket) -> None:
        """A ticket was given out."""
        self.upload_bytes += ticket.upload_bytes
        self._tenants[ticket.caller.tenant] += 1
        self._tenant_bytes[ticket.caller.tenant] += ticket.upload_bytes

    def give_back(self, ticket: Ticket) -> None:
        """It has ended."""
        tenant = ticket.caller.tenant
        self.upload_bytes -= ticket.upload_bytes
        self._tenant_bytes[tenant] -= ticket.upload_bytes
        self._tenants[tenant] -= 1
        if not self._tenants[tenant]:
            del self._tenants[tenant], self._tenant_bytes[tenant]
