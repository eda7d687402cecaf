"""How many jobs, bytes and event streams there may be, for one tenant and for all."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence

from broker.jobs.record import Job
from edge_runtime.contract import limits
from edge_runtime.contract.errors import Overloaded

__all__ = ["Places"]


class Places:
    """Counts what is being uploaded and watched; jobs that live are counted by the caller."""

    def __init__(self, max_jobs: int, max_per_tenant: int, max_bytes: int) -> None:
        self._max_jobs = max_jobs
        self._max_per_tenant = max_per_tenant
        self._max_bytes = max_bytes
        self._uploads: Counter[str] = Counter()
        self._upload_bytes = 0
        self._streams: Counter[str] = Counter()

    @contextlib.contextmanager
    def upload(self, tenant: str, bound_bytes: int, live: Sequence[Job]) -> Iterator[None]:
        """A place for a body, beside the jobs that live. Raises ``Overloaded``."""
        if len(live) + self._uploads.total() >= self._max_jobs:
            raise Overloaded(f"{self._max_jobs} jobs wait already: submit it later")
        own = sum(job.tenant == tenant for job in live) + self._uploads[tenant]
        if own >= self._max_per_tenant:
            raise Overloaded(
                f"{self._max_per_tenant} of your jobs wait already: wait for one, or cancel one"
            )
        held_bytes = sum(job.size_bytes for job in live) + self._upload_bytes
        if held_bytes + bound_bytes > self._max_bytes:
            raise Overloaded("jobs of too many bytes wait already: submit it later")
        self._uploads[tenant] += 1
        self._upload_bytes += bound_bytes
        try:
            yield
        finally:
            self._upload_bytes -= bound_bytes
            _give_back(self._uploads, tenant)

    @contextlib.contextmanager
    def stream(self, tenant: str) -> Iterator[None]:
        """A place for an event stream. Raises ``Overloaded``."""
        count = self._streams[tenant]
        if count >= limits.MAX_JOB_STREAMS_PER_TENANT:
            raise Overloaded(f"{count} of your event streams are open already: poll instead")
        self._streams[tenant] += 1
        try:
            yield
        finally:
            _give_back(self._streams, tenant)


def _give_back(places: Counter[str], tenant: str) -> None:
    places[tenant] -= 1
    if not places[tenant]:
        del places[tenant]
