"""One job of a runtime, and what is under way for it."""

from __future__ import annotations

from concurrent.futures import Future

from edge_runtime.contract.wire import ServerTiming
from edge_runtime.jobs.drive import CloudJob
from edge_runtime.jobs.job import JobCore
from edge_runtime.jobs.plan import Plan
from edge_runtime.jobs.store import JobRecord
from edge_runtime.local import LocalAnswer
from edge_runtime.local_queue import Ticket
from edge_runtime.observation import Asked
from edge_runtime.offload.messages import CloudReply

__all__ = ["Entry"]


class Entry:
    """Guarded by the lock of its book."""

    def __init__(self, core: JobCore, record: JobRecord, asked: Asked, planned: Plan) -> None:
        self.core = core
        self.record = record
        self.asked = asked
        self.plan = planned
        self.canceled = False
        self.ticket: Ticket[LocalAnswer] | None = None
        self.local: LocalAnswer | None = None
        """Held while the cloud is asked as well."""
        self.cloud: CloudJob | None = None
        self.driving: Future[tuple[CloudReply, ServerTiming]] | None = None
