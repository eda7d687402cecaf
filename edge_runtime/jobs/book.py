"""All jobs of one runtime: begun, found again after a restart, ended."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Final
from uuid import uuid4

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    ConfigError,
    ContractError,
    JobCanceled,
    MissingFile,
    NearfarError,
    NetworkUnreachable,
)
from edge_runtime.contract.jobs import JobInfo
from edge_runtime.contract.tasks.answer import Answer
from edge_runtime.contract.wire import JSON_MEDIA_TYPE, ModelRef, ServerTiming, decode_seed
from edge_runtime.engine import Engine
from edge_runtime.jobs.drive import CloudJob
from edge_runtime.jobs.job import JobCore, JobStatus
from edge_runtime.jobs.plan import Plan, plan
from edge_runtime.jobs.store import JobRecord, JobStore
from edge_runtime.local import LocalAnswer
from edge_runtime.local_queue import Ticket
from edge_runtime.observation import Asked
from edge_runtime.offload.messages import CloudReply
from edge_runtime.photo import Photo
from edge_runtime.policies.base import Action
from edge_runtime.results import InferenceSource, Timings, make_result
from edge_runtime.seed import Seed

__all__ = ["JobBook"]

_log = logging.getLogger(__name__)
_CLOSED: Final = "this EdgeRuntime is being closed"


class _Entry:
    """One job and what is under way for it."""

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


class JobBook:
    """Thread-safe. ``folder`` None: jobs end with the runtime."""

    def __init__(self, engine: Engine, bundle: str, folder: Path | None) -> None:
        self._engine = engine
        self._bundle = bundle
        self._store = JobStore(folder)
        self._lock = threading.RLock()
        self._entries: dict[str, _Entry] = {}
        self._closed = False

    # From any thread ----------------------------------------------------------------------

    def submit(self, asked: Photo | Seed, top_k: int | None, *, private: bool) -> JobCore:
        """Begin a job. In the state folder before this returns, unless it is private.

        Raises ``ConfigError``, ``LimitExceeded`` or ``ImageError``.
        """
        body, media_type = asked.upload()
        question = _asked(asked, private=private)
        planned = plan(self._engine, question)
        record = JobRecord(
            id=uuid4().hex,
            bundle=self._bundle,
            created_s=time.time(),
            media_type=media_type,
            top_k=top_k,
            on_device=planned.on_device,
        )
        if not private:
            self._store.add(record, body)
        return self._begin(record, question, planned).core

    def resume(self) -> list[JobCore]:
        """Every job there is: those of this runtime, and those that the state folder holds."""
        with self._lock:
            if self._store.lasting:
                for record in self._store.records(self._bundle):
                    if record.id not in self._entries:
                        self._resume(record)
            entries = sorted(self._entries.values(), key=lambda entry: entry.record.created_s)
            return [entry.core for entry in entries if not entry.canceled]

    def cancel(self, core: JobCore) -> None:
        """End it; the broker is told in the background."""
        entry = self._entries.get(core.status.id)
        if entry is None or core.done.done():
            return
        with self._lock:
            entry.canceled = True
        core.fail(JobCanceled("this job was canceled"))
        if entry.ticket is not None:
            entry.ticket.future.cancel()
        self._withdraw(entry)
        self._store.remove(entry.record.id)

    def forget(self, core: JobCore) -> None:
        """Remove it here and at the broker; one that goes on is canceled first."""
        self.cancel(core)
        with self._lock:
            entry = self._entries.pop(core.status.id, None)
        if entry is not None and not entry.canceled:
            self._withdraw(entry)
        self._store.remove(core.status.id)

    def close(self) -> None:
        """End every wait; jobs in the state folder, and at the broker, go on later."""
        with self._lock:
            self._closed = True
            entries = tuple(self._entries.values())
        for entry in entries:
            if entry.ticket is not None:
                entry.ticket.future.cancel()
            entry.core.fail(NetworkUnreachable(f"{_CLOSED}: the job was not waited for"))

    # Beginnings ---------------------------------------------------------------------------

    def _begin(self, record: JobRecord, asked: Asked, planned: Plan) -> _Entry:
        runs = InferenceSource.ON_DEVICE if record.on_device else InferenceSource.IN_CLOUD
        core = JobCore(self, JobStatus(id=record.id, state="queued", runs=runs))
        entry = _Entry(core, record, asked, planned)
        with self._lock:
            if self._closed:
                raise ConfigError("this EdgeRuntime is closed: make a new one")
            self._entries[record.id] = entry
        self._start(entry)
        return entry

    def _resume(self, record: JobRecord) -> None:
        try:
            asked = _asked(_read(self._store.body(record), record.media_type), private=False)
            planned = plan(self._engine, asked)
        except (ContractError, MissingFile) as error:
            _log.warning("job %s is lost: %s", record.id, error.detail)
            self._store.remove(record.id)
            return
        except NearfarError as error:  # no broker this time: it stays for another
            _log.warning("job %s cannot go on: %s", record.id, error.detail)
            return
        if record.broker_job is None:
            record = msgspec.structs.replace(record, on_device=planned.on_device)
        self._begin(record, asked, planned)

    def _start(self, entry: _Entry) -> None:
        try:
            if entry.record.on_device:
                self._start_local(entry)
            else:
                self._start_cloud(entry)
        except NearfarError as error:
            entry.core.fail(error)

    # On the device ------------------------------------------------------------------------

    def _start_local(self, entry: _Entry) -> None:
        local = self._engine.local
        if local is None:
            raise ConfigError("there is no local model any more for this job: submit it again")
        ticket = local.submit(entry.asked.image, entry.record.top_k, float("inf"))
        entry.ticket = ticket
        ticket.future.add_done_callback(lambda future: self._on_local(entry, future))

    def _on_local(self, entry: _Entry, future: Future[LocalAnswer]) -> None:
        if future.cancelled() or entry.canceled:
            return
        error = future.exception()
        try:
            if error is not None:
                self._local_failed(entry, error)
                return
            entry.local = future.result()
            if entry.plan.decision.action is Action.CASCADE and not entry.core.done.done():
                entry.plan = plan(self._engine, entry.asked, entry.local.confidence)
                if entry.plan.decision.action is not Action.LOCAL:
                    self._start_cloud(entry)
                    return
            self._give_local(entry)
        except Exception as failure:  # a policy's own
            entry.core.fail(failure)

    def _local_failed(self, entry: _Entry, error: BaseException) -> None:
        may_ask = self._engine.uplink is not None and not entry.asked.private
        if may_ask and not isinstance(error, NearfarError):
            may_ask = False
        if may_ask and entry.cloud is None and entry.plan.decision.action is not Action.LOCAL:
            self._start_cloud(entry)
        else:
            entry.core.fail(error)

    def _give_local(self, entry: _Entry) -> None:
        answer, local = entry.local, self._engine.local
        assert answer is not None  # noqa: S101  # the caller holds it
        assert local is not None  # noqa: S101  # it answered
        timings = Timings(
            total_ms=_age_ms(entry), local_wait_ms=answer.wait_ms, local_ms=answer.run_ms
        )
        self._give(entry, answer.answer, InferenceSource.ON_DEVICE, local.variant.id, timings, None)

    # In the cloud -------------------------------------------------------------------------

    def _start_cloud(self, entry: _Entry) -> None:
        way = self._engine.uplink
        if way is None:
            raise ConfigError("this job needs a broker: make the runtime with broker=URL")
        uplink = way.pick(entry.record.broker)
        if entry.record.broker != uplink.url:  # a new job, or its broker is no longer named
            entry.record = msgspec.structs.replace(entry.record, broker=uplink.url, broker_job=None)
            if not entry.asked.private:
                self._store.write(entry.record)
        body, _ = entry.asked.image.upload()
        if entry.record.broker_job is None:
            self._engine.history.uploading(len(body), entry.plan.situation.conditions)
        cloud = CloudJob(
            uplink,
            entry.record,
            lambda: entry.asked.image.upload()[0],
            tell=lambda news: self._heard(entry, news),
            keep=lambda record: self._keep(entry, record),
        )
        with self._lock:
            if entry.canceled or self._closed:
                return
            entry.cloud = cloud
            entry.driving = uplink.spawn(cloud.run())
        entry.driving.add_done_callback(lambda future: self._on_cloud(entry, future))

    def _heard(self, entry: _Entry, news: JobInfo | NearfarError) -> None:
        last = entry.core.status
        if isinstance(news, NearfarError):
            entry.core.tell(msgspec.structs.replace(last, trouble=news.code))
            return
        entry.core.tell(
            JobStatus(
                id=last.id,
                state=news.state,
                progress=news.progress,
                place=news.place,
                runs=InferenceSource.IN_CLOUD,
            )
        )

    def _keep(self, entry: _Entry, record: JobRecord) -> None:
        with self._lock:
            entry.record = record
            if not entry.canceled and record.id in self._entries:
                self._store.write(record)

    def _on_cloud(self, entry: _Entry, future: Future[tuple[CloudReply, ServerTiming]]) -> None:
        if future.cancelled():
            entry.core.fail(NetworkUnreachable(f"{_CLOSED}: the job was not waited for"))
            return
        error = future.exception()
        if error is None:
            reply, timing = future.result()
            timings = Timings(
                total_ms=_age_ms(entry),
                server_queue_ms=timing.queue_ms,
                server_inference_ms=timing.inference_ms,
            )
            self._give(entry, reply.answer, InferenceSource.IN_CLOUD, reply.model, timings, None)
        elif entry.local is not None:
            self._give_local(entry)
        elif self._engine.local is not None and entry.plan.decision.action is not Action.CLOUD_ONLY:
            self._start_local(entry)
        else:
            entry.core.fail(error)

    def _withdraw(self, entry: _Entry) -> None:
        """Nobody waits for the broker's answer any more."""
        way, cloud = self._engine.uplink, entry.cloud
        if entry.driving is not None:
            entry.driving.cancel()
        if way is None or cloud is None or self._closed:
            return
        uplink = way.pick(entry.record.broker)
        try:
            uplink.spawn(cloud.withdraw())
        except NearfarError:
            return  # being closed: the broker forgets it in its own time

    def _give(
        self,
        entry: _Entry,
        answer: Answer,
        source: InferenceSource,
        model: str | ModelRef,
        timings: Timings,
        error: str | None,
    ) -> None:
        entry.core.succeed(
            make_result(
                self._engine.task,
                answer,
                source,
                model,
                top_k=entry.record.top_k,
                deadline_ms=float("inf"),
                timings=timings,
                decision=entry.plan.decision,
                situation=entry.plan.situation,
                error=error,
            )
        )


def _asked(image: Photo | Seed, *, private: bool) -> Asked:
    now_s = time.monotonic()
    return Asked(
        image=image,
        started_s=now_s,
        deadline_ms=float(limits.MAX_DEADLINE_MS),
        answer_by_s=now_s + limits.MAX_DEADLINE_MS / 1e3,
        private=private,
    )


def _read(body: bytes, media_type: str) -> Photo | Seed:
    return Seed(decode_seed(body)) if media_type == JSON_MEDIA_TYPE else Photo.read(body)


def _age_ms(entry: _Entry) -> float:
    return max(0.0, time.time() - entry.record.created_s) * 1e3
