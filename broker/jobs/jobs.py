"""Jobs from their submission to their end: bounds, owners, turns, runs and results.

    queued ──▶ running ──▶ done | failed
       ▲          │
       └──────────┘ the worker was lost, or the broker stopped
    queued, running ──▶ canceled

One job runs at a time, when no request with a deadline waits. A submitted job is in the
journal before its client is told so; each change is there before its event is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

from broker.executors.base import EventSink
from broker.jobs.journal import Journal
from broker.jobs.kept import Kept
from broker.jobs.order import Turns
from broker.jobs.places import Places
from broker.jobs.record import Job, JobAnswer, JobSpec
from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    BrokerFault,
    JobCanceled,
    JobNotFound,
    JobNotReady,
    NearfarError,
    Overloaded,
    WireError,
    WorkerLost,
)
from edge_runtime.contract.jobs import ENDED_STATES, JobFailure, JobInfo, JobState

__all__ = ["Jobs", "Runner"]

_LOG: Final = logging.getLogger(__name__)
_QUIET_POLL_S: Final = 0.02
_MOST_QUIET_WAIT_S: Final = 5.0
_PROGRESS_EVERY_S: Final = 0.25
_SWEEP_EVERY_S: Final = 60.0
_RETRY_PAUSE_S: Final = 1.0
_CLOSE_S: Final = 0.5
_MEAN_STEP: Final = 0.25
_SHUTTING_DOWN: Final = "the broker is shutting down: ask it again when it is back"


class Runner(Protocol):
    """Runs one job."""

    def quiet(self) -> bool:
        """No request with a deadline is there."""

    async def run(self, job: Job, body: bytes) -> tuple[JobAnswer, bytes]:
        """The answer and its body; raises ``NearfarError``."""


class Jobs:
    """All jobs of one broker. Used from one event loop; ``clock`` gives Unix seconds."""

    def __init__(
        self,
        journal: Journal,
        runner: Runner,
        events: EventSink,
        *,
        clock: Callable[[], float] = time.time,
        max_jobs: int = limits.MAX_JOBS,
        max_per_tenant: int = limits.MAX_JOBS_PER_TENANT,
        max_bytes: int = limits.MAX_JOB_BYTES,
        max_result_bytes: int = limits.MAX_JOB_RESULT_BYTES,
        max_ended: int = limits.MAX_ENDED_JOBS,
        ttl_ms: float = limits.JOB_RESULT_TTL_MS,
    ) -> None:
        self._journal = journal
        self._runner = runner
        self._events = events
        self._clock = clock
        self._places = Places(max_jobs, max_per_tenant, max_bytes)
        self._kept = Kept(max_ended, max_result_bytes, ttl_ms / 1e3)
        self._by_id: dict[str, Job] = {}
        self._by_key: dict[tuple[str, str], Job] = {}
        self._adding: dict[tuple[str, str], asyncio.Task[Job]] = {}
        self._removals: set[asyncio.Task[None]] = set()
        self._turns = Turns()
        self._usual_s: dict[str, float] = {}
        self.ended: Counter[tuple[str, JobState]] = Counter()
        """By model and state, since this process began."""
        """Mean run time by model, of this process."""
        self._running: tuple[Job, asyncio.Task[tuple[JobAnswer, bytes]]] | None = None
        self._work = asyncio.Event()
        self._draining = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the journal and begin to run what waits. Raises ``ConfigError``."""
        jobs = await self._journal.open()
        for job in sorted(jobs, key=lambda job: job.updated_s):
            self._register(job)
        for job in self._waiting():
            job.tell("queued", self.info(job), max(self._clock(), job.updated_s))
        self._loop_task = asyncio.create_task(self._feed(), name="jobs")

    def drain(self) -> None:
        """Begin no other job and take none; end every event stream."""
        self._draining.set()
        for job in self._by_id.values():
            job.changed.set()

    async def close(self) -> None:
        """Stop; what was running is queued again. After the scheduler was closed."""
        self.drain()
        if self._loop_task is not None:
            await asyncio.wait((self._loop_task,), timeout=_CLOSE_S)
            self._loop_task.cancel()
            ends: tuple[asyncio.Task[Any], ...] = (
                self._loop_task,
                *self._adding.values(),
                *self._removals,
            )
            await asyncio.wait(ends)
        await self._journal.close()

    # Submission ---------------------------------------------------------------------------

    def known(
        self, tenant: str, key: str | None, spec: JobSpec, size_bytes: int | None
    ) -> Job | None:
        """The job that this idempotency key stands for already.

        Raises ``WireError`` when it stands for another request.
        """
        self._forget_old()
        job = None if key is None else self._by_key.get((tenant, key))
        if job is not None and (job.spec != spec or size_bytes not in (None, job.size_bytes)):
            raise WireError(
                "this idempotency key was used for another job: make a new key for each"
            )
        return job

    def uploading(self, tenant: str, bound_bytes: int) -> AbstractContextManager[None]:
        """A place for a body of at most so many bytes. Raises ``Overloaded``."""
        self._require_serving()
        live = [job for job in self._by_id.values() if not job.ended]
        return self._places.upload(tenant, bound_bytes, live)

    async def add(self, tenant: str, key: str | None, spec: JobSpec, body: bytes) -> Job:
        """A new job, in the journal; or the one that ``key`` stands for.

        Once begun it goes on, whatever becomes of the connection: the key finds the job.
        Raises ``WireError`` when the key stands for another request.
        """
        sha256 = hashlib.sha256(body).hexdigest()
        if key is not None and (tenant, key) in self._adding:
            await asyncio.wait((self._adding[tenant, key],))
        job = self.known(tenant, key, spec, len(body))
        if job is not None:
            if job.sha256 != sha256:
                raise WireError(
                    "this idempotency key was used for another body: make a new key for each job"
                )
            return job
        task = asyncio.create_task(self._add(tenant, key, spec, body, sha256))
        if key is not None:
            self._adding[tenant, key] = task
            task.add_done_callback(lambda _: self._adding.pop((tenant, key), None))
        return await asyncio.shield(task)

    async def _add(
        self, tenant: str, key: str | None, spec: JobSpec, body: bytes, sha256: str
    ) -> Job:
        now_s = self._clock()
        job = Job(
            id=secrets.token_urlsafe(16),
            number=0,
            tenant=tenant,
            key=key,
            spec=spec,
            size_bytes=len(body),
            sha256=sha256,
            created_s=now_s,
            updated_s=now_s,
        )
        await self._journal.add(job, body)
        self._register(job)
        job.tell("queued", self.info(job), now_s)
        self._work.set()
        return job

    def _register(self, job: Job) -> None:
        self._by_id[job.id] = job
        if job.key is not None:
            self._by_key[job.tenant, job.key] = job
        if job.ended:
            job.tell(job.state, job.info(None), job.updated_s)
            self._kept.add(job)
        else:
            self._work.set()

    # What its owner may ask ----------------------------------------------------------------

    def get(self, tenant: str, job_id: str) -> Job:
        """A job of this tenant. ``JobNotFound``, also for one of another tenant."""
        self._forget_old()
        job = self._by_id.get(job_id)
        if job is None or job.tenant != tenant:
            raise JobNotFound("no job of this id: it may have been forgotten, submit it again")
        return job

    def info(self, job: Job) -> JobInfo:
        """As it is now."""
        place = None
        if job.state == "queued":
            ahead = self._turns.order(self._waiting())
            place = ahead.index(job) if job in ahead else 0
            place += self._running is not None
        return job.info(place)

    async def result(self, job: Job) -> tuple[JobAnswer, bytes]:
        """Its answer. Raises ``JobNotReady``, ``JobCanceled``, or the error it failed with."""
        if job.state == "canceled":
            raise JobCanceled("this job was canceled: submit it again")
        if job.failure is not None:
            raise job.failure.as_error()
        if job.answer is None:
            raise JobNotReady(f"this job is {job.state}: ask again, or follow its events")
        return job.answer, await self._journal.answer_body(job)

    async def cancel(self, job: Job) -> None:
        """End it if it has not ended; forget it, with its answer, if it has."""
        if job.ended:
            self._drop(job)
            await self._journal.remove(job)
            return
        await self._end(job, "canceled")
        if self._running is not None and self._running[0] is job:
            self._running[1].cancel()  # its batch goes on; nobody waits for it

    def watched(self, tenant: str) -> AbstractContextManager[None]:
        """A place for an event stream. Raises ``Overloaded``."""
        self._require_serving()
        return self._places.stream(tenant)

    def _require_serving(self) -> None:
        if self._draining.is_set():
            raise Overloaded(_SHUTTING_DOWN)

    async def next_events(
        self, job: Job, last: int, wait_s: float
    ) -> list[tuple[int, str, JobInfo]] | None:
        """Events after number ``last``; empty: none within ``wait_s``; None: no more will come.

        ``last`` -1: how it stands, which is the latest one.
        """
        changed = job.changed
        found = [event for event in job.events if event[0] > last]
        found = found[-1:] if last < 0 else found
        told_all = bool(job.events) and job.events[-1][1] in ENDED_STATES
        if found or told_all or self._draining.is_set():
            return found or None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await changed.wait()
        found = [event for event in job.events if event[0] > last]
        return None if not found and self._draining.is_set() else found

    # Running ------------------------------------------------------------------------------

    def live(self) -> dict[JobState, int]:
        """How many wait and run."""
        states = [job.state for job in self._by_id.values()]
        return {"queued": states.count("queued"), "running": states.count("running")}

    def _waiting(self) -> list[Job]:
        return [job for job in self._by_id.values() if job.state == "queued"]

    async def _feed(self) -> None:
        while not self._draining.is_set():
            if not self._waiting():
                self._work.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_SWEEP_EVERY_S if self._by_id else None):
                        await self._work.wait()
                self._forget_old()
                continue
            await self._until_quiet()
            ahead = self._turns.order(self._waiting())
            if ahead and not self._draining.is_set():
                self._turns.served(ahead[0].tenant)
                await self._run(ahead[0])

    async def _until_quiet(self) -> None:
        """Requests with deadlines go first; under a load that never ends, for so long.

        Then the job waits in the scheduler itself, behind all of them.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_MOST_QUIET_WAIT_S):
                while not (self._runner.quiet() or self._draining.is_set()):  # noqa: ASYNC110  # of another part's queue
                    await asyncio.sleep(_QUIET_POLL_S)

    async def _run(self, job: Job) -> None:
        if job.attempts >= limits.MAX_JOB_ATTEMPTS:
            lost = WorkerLost(f"what ran this job was lost {job.attempts} times")
            await self._end(job, "failed", failure=lost)
            return
        job.attempts += 1
        task = asyncio.create_task(self._execute(job))
        self._running = job, task
        try:
            await self._change(job, "running")
            self._tell_places()
            await self._settle(job, task)
        except BrokerFault as error:  # the disk: what a restart finds there decides
            _LOG.error("a job cannot be stored: %s", error.detail)
            job.state, job.failure = "failed", JobFailure(code=error.code, detail=error.detail)
            job.tell("failed", job.info(None), self._clock())
            self._remember(job)
        finally:
            task.cancel()
            self._running = None

    async def _execute(self, job: Job) -> tuple[JobAnswer, bytes]:
        body = await self._journal.body(job)
        return await self._runner.run(job, body)

    async def _settle(self, job: Job, task: asyncio.Task[tuple[JobAnswer, bytes]]) -> None:
        started_s = time.monotonic()
        while not task.done():
            await asyncio.wait((task,), timeout=_PROGRESS_EVERY_S)
            self._progress(job, time.monotonic() - started_s)
        if job.ended or task.cancelled():
            return
        error = task.exception()
        if error is None:
            took_s = time.monotonic() - started_s
            usual_s = self._usual_s.get(job.spec.model, took_s)
            self._usual_s[job.spec.model] = usual_s + _MEAN_STEP * (took_s - usual_s)
            job.answer, data = task.result()
            await self._end(job, "done", answer_body=data)
        elif isinstance(error, Overloaded):  # no fault of the job's: the broker stops, or is full
            job.attempts -= 1
            await self._requeue(job)
        elif isinstance(error, WorkerLost) and job.attempts < limits.MAX_JOB_ATTEMPTS:
            await self._requeue(job)
        elif isinstance(error, NearfarError):
            await self._end(job, "failed", failure=error)
        else:
            _LOG.error("a job failed in a way nobody foresaw", exc_info=error)
            fault = BrokerFault("the broker failed on this job; it is logged")
            await self._end(job, "failed", failure=fault)

    async def _requeue(self, job: Job) -> None:
        job.progress = 0.0
        await self._change(job, "queued")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RETRY_PAUSE_S):
                await self._draining.wait()

    def _progress(self, job: Job, elapsed_s: float) -> None:
        usual_s = self._usual_s.get(job.spec.model)
        if job.state != "running" or usual_s is None:
            return
        progress = round(min(0.99, elapsed_s / max(usual_s, 1e-3)), 2)
        if progress > job.progress:
            job.progress = progress
            job.tell("running", job.info(None), self._clock())

    def _tell_places(self) -> None:
        for place, job in enumerate(self._turns.order(self._waiting()), start=1):
            job.tell("queued", job.info(place), self._clock())

    async def _change(self, job: Job, state: JobState, answer_body: bytes | None = None) -> None:
        job.state = state
        job.updated_s = max(self._clock(), job.updated_s)
        await self._journal.update(job, answer_body)
        if job.state == state:  # else canceled meanwhile, and told so
            job.tell(state, self.info(job), job.updated_s)

    async def _end(
        self,
        job: Job,
        state: JobState,
        *,
        failure: NearfarError | None = None,
        answer_body: bytes | None = None,
    ) -> None:
        if failure is not None:
            detail = failure.detail[: limits.MAX_TEXT_CHARS]
            job.failure = JobFailure(code=failure.code, detail=detail)
        await self._change(job, state, answer_body)
        took_ms = round((job.updated_s - job.created_s) * 1e3, 1)
        fields: dict[str, object] = {"job": job.id, "model": job.spec.model, "state": state}
        fields |= {"tenant": job.tenant, "ms": took_ms, "attempts": job.attempts}
        if failure is not None:
            fields["code"] = failure.code
        self._events("job_ended", fields)
        self.ended[job.spec.model, state] += 1
        self._remember(job)

    # Forgetting ---------------------------------------------------------------------------

    def _remember(self, job: Job) -> None:
        self._kept.add(job)
        self._forget_old()

    def _forget_old(self) -> None:
        for oldest in self._kept.overdue(self._clock()):
            self._drop(oldest)
            removal = asyncio.create_task(self._remove_quietly(oldest))
            self._removals.add(removal)
            removal.add_done_callback(self._removals.discard)

    def _drop(self, job: Job) -> None:
        self._by_id.pop(job.id, None)
        if job.key is not None:
            self._by_key.pop((job.tenant, job.key), None)
        self._kept.discard(job)

    async def _remove_quietly(self, job: Job) -> None:
        try:
            await self._journal.remove(job)
        except BrokerFault as error:  # it is read and forgotten again at the next start
            _LOG.warning("a job stays in the journal: %s", error.detail)
