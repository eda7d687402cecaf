"""One job through the scheduler that every other request goes through.

It is of the lowest class and its deadline the farthest there is, so whatever else waits goes
first; ``quiet`` tells when nothing else is there at all.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

import msgspec

from broker.executors.base import BatchItem
from broker.jobs.record import Job, JobAnswer
from broker.models.repository import Repository
from broker.scheduling.scheduler import Scheduler
from broker.scheduling.ticket import LOWEST_PRIORITY, Caller
from edge_runtime.contract import limits
from edge_runtime.contract.errors import DeadlineExceeded
from edge_runtime.contract.wire import JSON_MEDIA_TYPE, PredictAnswer, ServerTiming

__all__ = ["Execution"]

_encoder: Final = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class Execution:
    """Runs jobs on behalf of ``Jobs``."""

    repository: Repository
    scheduler: Scheduler

    def quiet(self) -> bool:
        """Nothing uploads, waits or runs, and a batch could start now."""
        return self.scheduler.idle

    async def run(self, job: Job, body: bytes) -> tuple[JobAnswer, bytes]:
        """The answer and its body. Raises ``ModelNotFound`` and what ``submit`` raises."""
        servable = self.repository.get(job.spec.model, job.spec.version)
        item = BatchItem(
            body,
            top_k=job.spec.top_k,
            media_type=job.spec.picture_type,
            colored=job.spec.palette,
        )
        deadline_s = asyncio.get_running_loop().time() + limits.MAX_DEADLINE_MS / 1e3
        caller = Caller(tenant=job.tenant, priority=LOWEST_PRIORITY)
        admitted = self.scheduler.admitted(servable.key, deadline_s, len(body), caller=caller)
        with admitted as ticket:
            try:
                async with asyncio.timeout_at(deadline_s):
                    given = await self.scheduler.submit(ticket, item)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"the job did not end within {limits.MAX_DEADLINE_MS / 1e3:.0f} s of its turn: "
                    "submit it when the broker has less to do"
                ) from None
        timing = ServerTiming(queue_ms=given.queue_ms, inference_ms=given.inference_ms)
        encoded = given.encoded
        picture = encoded.mask or encoded.image
        if job.spec.accept == JSON_MEDIA_TYPE or picture is None:
            data = _encoder.encode(PredictAnswer.of(servable.ref, encoded))
            return JobAnswer(
                media_type=JSON_MEDIA_TYPE,
                size_bytes=len(data),
                model=servable.ref,
                timing=timing,
            ), data
        return JobAnswer(
            media_type=picture.media_type,
            size_bytes=len(picture.data),
            model=servable.ref,
            region=picture.region,
            timing=timing,
        ), picture.data
