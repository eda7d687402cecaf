"""Which job is next: tenants take turns, and each tenant's jobs go in their order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from broker.jobs.record import Job

__all__ = ["Turns"]


class Turns:
    """Remembers whose turn was how long ago, so that many jobs of one delay no other."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._turn = 0

    def order(self, waiting: Iterable[Job]) -> list[Job]:
        """All of them, the next one first, as it would be if no more came."""
        by_tenant: dict[str, list[Job]] = defaultdict(list)
        for job in sorted(waiting, key=lambda job: job.number):
            by_tenant[job.tenant].append(job)
        self._served = {name: turn for name, turn in self._served.items() if name in by_tenant}
        ranked = [
            (round_, self._served.get(tenant, 0), job.number, job)
            for tenant, jobs in by_tenant.items()
            for round_, job in enumerate(jobs)
        ]
        return [job for *_, job in sorted(ranked, key=lambda entry: entry[:3])]

    def served(self, tenant: str) -> None:
        """A job of this tenant was taken."""
        self._turn += 1
        self._served[tenant] = self._turn
