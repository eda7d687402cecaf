"""Ended jobs and their answers: kept for a bounded time, number and size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from broker.jobs.record import Job

__all__ = ["Kept"]


class Kept:
    """In the order of their ends."""

    def __init__(self, max_jobs: int, max_bytes: int, ttl_s: float) -> None:
        self._max_jobs = max_jobs
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._bytes = 0

    def add(self, job: Job) -> None:
        """It has ended, as the last one."""
        if job.id not in self._jobs:
            self._jobs[job.id] = job
            self._bytes += _answer_bytes(job)

    def discard(self, job: Job) -> None:
        """It is forgotten."""
        if self._jobs.pop(job.id, None) is not None:
            self._bytes -= _answer_bytes(job)

    def overdue(self, now_s: float) -> Iterator[Job]:
        """Those to ``discard``, oldest first, until the rest is within the bounds."""
        while self._jobs:
            oldest = next(iter(self._jobs.values()))
            crowded = len(self._jobs) > self._max_jobs or self._bytes > self._max_bytes
            if not crowded and oldest.updated_s > now_s - self._ttl_s:
                return
            yield oldest


def _answer_bytes(job: Job) -> int:
    return 0 if job.answer is None else job.answer.size_bytes
