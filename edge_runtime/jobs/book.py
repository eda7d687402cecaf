"""All jobs of one runtime: begun, found again after a restart, ended."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Final
from uuid import uuid4

import msgspec

from edge_runtime.conditions import read_conditions
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
from edge_runtime.contract.wire import (
    JSON_MEDIA_TYPE,
    ModelRef,
    ServerTiming,
    decode_seed,
    parse_server_timing,
)
from edge_runtime.engine import Engine
from edge_runtime.jobs.deferral import obstacle
from edge_runtime.jobs.drive import CloudJob
from edge_runtime.jobs.entry import Entry
from edge_runtime.jobs.hold import Held
from edge_runtime.jobs.job import JobCore, JobStatus
from edge_runtime.jobs.plan import Plan, in_cloud, plan
from edge_runtime.jobs.store import Deferral, JobRecord, JobStore, StoredAnswer
from edge_runtime.local import LocalAnswer
from edge_runtime.observation import Asked
from edge_runtime.offload.messages import CloudReply, read_answer
from edge_runtime.photo import Photo
from edge_runtime.policies.base import Action
from edge_runtime.results import InferenceSource, Timings, make_result
from edge_runtime.seed import Seed

__all__ = ["JobBook"]

_log = logging.getLogger(__name__)
_CLOSED: Final = "this EdgeRuntime is being closed"


class JobBook:
    """Thread-safe. ``folder`` None: jobs end with the runtime."""

    def __init__(self, engine: Engine, bundle: str, folder: Path | None) -> None:
        self._engine = engine
        self._bundle = bundle
        self._store = JobStore(folder)
        self._lock = threading.RLock()
        self._entries: dict[str, Entry] = {}
        self._held = Held(engine, start=self._start, expire=self._expire)
        self._closed = False

    @property
    def lasting(self) -> bool:
        """Whether jobs outlive the process."""
        return self._store.lasting

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

    def defer(self, asked: Photo | Seed, top_k: int | None, deferral: Deferral) -> JobCore:
        """Keep a job until its conditions hold. On the disk before this returns.

        Raises ``ConfigError``, ``LimitExceeded`` or ``ImageError``.
        """
        body, media_type = asked.upload()
        record = JobRecord(
            id=uuid4().hex,
            bundle=self._bundle,
            created_s=time.time(),
            media_type=media_type,
            top_k=top_k,
            on_device=False,
            deferred=deferral,
        )
        self._store.add(record, body)
        image = asked if isinstance(asked, Seed) else self._store.photo(record)
        return self._hold(record, image).core

    def resume(self) -> list[JobCore]:
        """Every job there is: those of this runtime, and those that the state folder holds."""
        with self._lock:
            self._resume_all(lambda _: True)
            entries = sorted(self._entries.values(), key=lambda entry: entry.record.created_s)
            return [entry.core for entry in entries if not entry.canceled]

    def resume_deferred(self) -> None:
        """Those that wait for their conditions do so again, without being asked for."""
        if self._engine.uplink is not None:
            self._resume_all(lambda record: record.deferred is not None)

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
        self._held.close()
        with self._lock:
            self._closed = True
            entries = tuple(self._entries.values())
        for entry in entries:
            if entry.ticket is not None:
                entry.ticket.future.cancel()
            entry.core.fail(NetworkUnreachable(f"{_CLOSED}: the job was not waited for"))

    # Beginnings ---------------------------------------------------------------------------

    def _resume_all(self, wanted: Callable[[JobRecord], bool]) -> None:
        with self._lock:
            for record in self._store.records(self._bundle) if self._store.lasting else ():
                if record.id not in self._entries and wanted(record):
                    self._resume(record)

    def _hold(self, record: JobRecord, image: Photo | Seed) -> Entry:
        entry = self._enter(record, _asked(image, private=False))
        self._held.add(entry)
        return entry

    def _expire(self, entry: Entry, error: NearfarError) -> None:
        entry.core.fail(error)
        self._store.remove(entry.record.id)

    def _begin(self, record: JobRecord, asked: Asked, planned: Plan) -> Entry:
        entry = self._enter(record, asked, planned)
        self._start(entry)
        return entry

    def _enter(self, record: JobRecord, asked: Asked, planned: Plan | None = None) -> Entry:
        runs = InferenceSource.ON_DEVICE if record.on_device else InferenceSource.IN_CLOUD
        core = JobCore(self, JobStatus(id=record.id, state="queued", runs=runs))
        entry = Entry(core, record, asked, planned or in_cloud(self._engine, asked, "deferred"))
        with self._lock:
            if self._closed:
                raise ConfigError("this EdgeRuntime is closed: make a new one")
            self._entries[record.id] = entry
        return entry

    def _resume(self, record: JobRecord) -> None:
        answer = self._store.answer(record)
        if answer is not None:
            self._resume_answered(record, answer)
            return
        try:
            image = self._read(record)
            if record.deferred is not None:
                self._hold(record, image)
                return
            asked = _asked(image, private=False)
            planned = plan(self._engine, asked)
        except (ContractError, MissingFile, OSError) as error:
            _log.warning("job %s is lost: %s", record.id, error)
            self._store.remove(record.id)
            return
        except NearfarError as error:  # no broker this time: it stays for another
            _log.warning("job %s cannot go on: %s", record.id, error.detail)
            return
        if record.broker_job is None:
            record = msgspec.structs.replace(record, on_device=planned.on_device)
        self._begin(record, asked, planned)

    def _resume_answered(self, record: JobRecord, answer: StoredAnswer) -> None:
        """It was answered before the app ended."""
        way = self._engine.uplink
        if way is None:
            return  # it stays for a runtime with a broker
        entry = self._enter(record, _asked(Seed(0), private=False))  # its body is gone
        response = answer.response()
        try:
            reply = read_answer(response, answer.model, way.pick(None).expected)
        except NearfarError as error:
            entry.core.fail(error)
            return
        self._give_cloud(entry, reply, parse_server_timing(response.headers.get("server-timing")))

    def _read(self, record: JobRecord) -> Photo | Seed:
        if record.media_type == JSON_MEDIA_TYPE:
            return Seed(decode_seed(self._store.body(record)))
        return self._store.photo(record)

    def _start(self, entry: Entry) -> None:
        try:
            if entry.record.on_device:
                self._start_local(entry)
            else:
                self._start_cloud(entry)
        except NearfarError as error:
            entry.core.fail(error)

    # On the device ------------------------------------------------------------------------

    def _start_local(self, entry: Entry) -> None:
        local = self._engine.local
        if local is None:
            raise ConfigError("there is no local model any more for this job: submit it again")
        ticket = local.submit(entry.asked.image, entry.record.top_k, float("inf"))
        entry.ticket = ticket
        ticket.future.add_done_callback(lambda future: self._on_local(entry, future))

    def _on_local(self, entry: Entry, future: Future[LocalAnswer]) -> None:
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

    def _local_failed(self, entry: Entry, error: BaseException) -> None:
        may_ask = self._engine.uplink is not None and not entry.asked.private
        if may_ask and not isinstance(error, NearfarError):
            may_ask = False
        if may_ask and entry.cloud is None and entry.plan.decision.action is not Action.LOCAL:
            self._start_cloud(entry)
        else:
            entry.core.fail(error)

    def _give_local(self, entry: Entry) -> None:
        answer, local = entry.local, self._engine.local
        assert answer is not None  # noqa: S101  # the caller holds it
        assert local is not None  # noqa: S101  # it answered
        timings = Timings(
            total_ms=_age_ms(entry), local_wait_ms=answer.wait_ms, local_ms=answer.run_ms
        )
        self._give(entry, answer.answer, InferenceSource.ON_DEVICE, local.variant.id, timings, None)

    # In the cloud -------------------------------------------------------------------------

    def _start_cloud(self, entry: Entry) -> None:
        way = self._engine.uplink
        if way is None:
            raise ConfigError("this job needs a broker: make the runtime with broker=URL")
        uplink = way.pick(entry.record.broker)
        if entry.record.broker != uplink.url:  # a new job, or its broker is no longer named
            entry.record = msgspec.structs.replace(entry.record, broker=uplink.url, broker_job=None)
            if not entry.asked.private:
                self._store.write(entry.record)
        if entry.record.broker_job is None:
            size_bytes = entry.asked.image.upload_bytes
            self._engine.history.uploading(size_bytes, entry.plan.situation.conditions)
        cloud = CloudJob(
            uplink,
            entry.record,
            lambda: entry.asked.image.upload()[0],
            tell=lambda news: self._heard(entry, news),
            keep=lambda record: self._keep(entry, record),
            answered=lambda answer: self._answered(entry, answer),
            obstacle=lambda: self._obstacle(entry),
        )
        with self._lock:
            if entry.canceled or self._closed:
                return
            entry.cloud = cloud
            entry.driving = uplink.spawn(cloud.run())
        entry.driving.add_done_callback(lambda future: self._on_cloud(entry, future))

    def _heard(self, entry: Entry, news: JobInfo | NearfarError) -> None:
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

    def _keep(self, entry: Entry, record: JobRecord) -> None:
        with self._lock:
            entry.record = record
            if not entry.canceled and record.id in self._entries:
                self._store.write(record)

    def _answered(self, entry: Entry, answer: StoredAnswer) -> None:
        with self._lock:
            kept = not entry.canceled and entry.record.id in self._entries
            if kept and not entry.asked.private:
                self._store.write_answer(entry.record, answer)

    def _obstacle(self, entry: Entry) -> NearfarError | None:
        if entry.record.deferred is None:
            return None
        return obstacle(entry.record.deferred, read_conditions(self._engine.conditions))

    def _on_cloud(self, entry: Entry, future: Future[tuple[CloudReply, ServerTiming]]) -> None:
        if future.cancelled():
            entry.core.fail(NetworkUnreachable(f"{_CLOSED}: the job was not waited for"))
            return
        error = future.exception()
        if error is None:
            self._give_cloud(entry, *future.result())
        elif entry.local is not None:
            self._give_local(entry)
        elif self._engine.local is not None and entry.plan.decision.action is not Action.CLOUD_ONLY:
            self._start_local(entry)
        else:
            entry.core.fail(error)

    def _give_cloud(self, entry: Entry, reply: CloudReply, timing: ServerTiming) -> None:
        timings = Timings(
            total_ms=_age_ms(entry),
            server_queue_ms=timing.queue_ms,
            server_inference_ms=timing.inference_ms,
        )
        self._give(entry, reply.answer, InferenceSource.IN_CLOUD, reply.model, timings, None)

    def _withdraw(self, entry: Entry) -> None:
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
        entry: Entry,
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


def _age_ms(entry: Entry) -> float:
    return max(0.0, time.time() - entry.record.created_s) * 1e3
