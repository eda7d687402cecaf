"""Jobs behind HTTP: bounds, turns, the journal on disk, and what a restart finds there."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from broker.jobs.jobs import Jobs
from broker.jobs.journal import JOURNAL_NAME, Journal
from broker.jobs.order import Turns
from broker.jobs.record import Job, JobAnswer, JobSpec
from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    ConfigError,
    InferenceError,
    JobCanceled,
    JobNotFound,
    JobNotReady,
    Overloaded,
    WireError,
    WorkerLost,
)
from edge_runtime.contract.wire import ModelRef
from tests.support.broker import Events, until

SPEC = JobSpec(model="m", media_type="image/png", accept="application/json")
REF = ModelRef(name="m", version="1", sha256="0" * 64, labels_sha256=None)


class Runner:
    """Answers a body with itself reversed, once the gate is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.busy = False
        self.ran: list[bytes] = []
        self.errors: list[Exception] = []

    def quiet(self) -> bool:
        return not self.busy

    async def run(self, job: Job, body: bytes) -> tuple[JobAnswer, bytes]:
        self.ran.append(body)
        await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        answer = body[::-1]
        return JobAnswer(media_type="application/json", size_bytes=len(answer), model=REF), answer


@contextlib.asynccontextmanager
async def running(
    runner: Runner, folder: Path | None = None, **options: Any
) -> AsyncIterator[Jobs]:
    jobs = Jobs(Journal(folder), runner, Events(), **options)
    await jobs.start()
    try:
        yield jobs
    finally:
        await jobs.close()


async def ended(job: Job) -> None:
    """Until it has ended, and its end was told."""
    await until(lambda: job.ended and bool(job.events) and job.events[-1][1] == job.state)


async def test_an_idempotency_key_stands_for_one_job_and_one_body():
    runner = Runner()
    async with running(runner) as jobs:
        first, second = await asyncio.gather(
            jobs.add("a", "k", SPEC, b"body"), jobs.add("a", "k", SPEC, b"body")
        )
        assert first is second
        with pytest.raises(WireError, match="another body"):
            await jobs.add("a", "k", SPEC, b"ydob")
        with pytest.raises(WireError, match="another job"):
            jobs.known("a", "k", JobSpec(model="n", media_type="image/png", accept="x"), None)
        other = await jobs.add("b", "k", SPEC, b"else")
        assert other is not first
        await ended(other)
    assert sorted(runner.ran) == [b"body", b"else"]


async def test_jobs_and_their_bytes_are_bounded_for_a_tenant_and_for_all():
    runner = Runner()
    runner.gate.clear()
    async with running(runner, max_jobs=3, max_per_tenant=2, max_bytes=100) as jobs:
        for key in "xy":
            await jobs.add("a", key, SPEC, bytes(30))
        with pytest.raises(Overloaded, match="2 of your jobs"), jobs.uploading("a", 1):
            pass
        with pytest.raises(Overloaded, match="too many bytes"), jobs.uploading("b", 41):
            pass
        with (
            jobs.uploading("b", 1),
            pytest.raises(Overloaded, match="3 jobs wait"),
            jobs.uploading("c", 1),
        ):
            pass
        with jobs.uploading("b", 40):  # places of uploads come back
            pass


async def test_another_tenant_does_not_find_a_job():
    async with running(Runner()) as jobs:
        job = await jobs.add("a", None, SPEC, b"body")
        with pytest.raises(JobNotFound):
            jobs.get("b", job.id)
        assert jobs.get("a", job.id) is job


async def test_results_are_kept_for_a_bounded_time_number_and_bytes(tmp_path: Path):
    now_s = 1_000.0
    options: dict[str, Any] = {"clock": lambda: now_s, "max_ended": 3, "max_result_bytes": 20}
    async with running(Runner(), tmp_path, **options) as jobs:
        made = []
        for number in range(5):
            made.append(await jobs.add("a", str(number), SPEC, b"4444"))
            await ended(made[-1])
        assert [job.id in jobs._by_id for job in made] == [False, False, True, True, True]
        large = await jobs.add("a", "large", SPEC, bytes(15))
        await ended(large)
        assert (await jobs.result(jobs.get("a", large.id)))[1] == bytes(15)
        with pytest.raises(JobNotFound):
            jobs.get("a", made[3].id)
        now_s += limits.JOB_RESULT_TTL_MS / 1e3 + 1
        with pytest.raises(JobNotFound):
            jobs.get("a", large.id)
        assert await jobs.add("a", "large", SPEC, b"new") is not large  # its key is free again
    with sqlite3.connect(tmp_path / JOURNAL_NAME) as database:
        assert database.execute("SELECT key FROM jobs").fetchall() == [("large",)]


async def test_no_job_begins_while_a_request_with_a_deadline_is_there():
    runner = Runner()
    runner.busy = True
    async with running(runner) as jobs:
        job = await jobs.add("a", None, SPEC, b"body")
        await asyncio.sleep(0.1)
        assert (job.state, runner.ran) == ("queued", [])
        with pytest.raises(JobNotReady):
            await jobs.result(job)
        runner.busy = False
        await ended(job)
        assert (await jobs.result(job))[1] == b"ydob"


async def test_a_failed_run_fails_its_job_and_no_other():
    runner = Runner()
    runner.errors = [InferenceError("bad pixels"), ValueError("a bug")]
    async with running(runner) as jobs:
        failed = [await jobs.add("a", None, SPEC, b"%d" % number) for number in range(3)]
        for job in failed:
            await ended(job)
        assert [job.state for job in failed] == ["failed", "failed", "done"]
        with pytest.raises(InferenceError, match="bad pixels"):
            await jobs.result(failed[0])
        assert jobs.info(failed[1]).failure.code == "broker_fault"


async def test_a_lost_worker_is_survived_three_times(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("broker.jobs.jobs._RETRY_PAUSE_S", 0.01)
    runner = Runner()
    runner.errors = [WorkerLost("gone"), WorkerLost("gone")]
    async with running(runner) as jobs:
        job = await jobs.add("a", None, SPEC, b"body")
        await ended(job)
        assert (job.state, job.attempts) == ("done", 3)
        runner.errors = [WorkerLost("gone")] * 3
        job = await jobs.add("a", None, SPEC, b"next")
        await ended(job)
        assert (job.state, job.attempts, job.failure.code) == ("failed", 3, "worker_lost")


async def test_a_cancel_ends_a_job_wherever_it_is():
    runner = Runner()
    runner.gate.clear()
    async with running(runner) as jobs:
        running_job = await jobs.add("a", None, SPEC, b"1")
        waiting = await jobs.add("a", None, SPEC, b"2")
        await until(lambda: runner.ran == [b"1"])
        assert (jobs.info(running_job).place, jobs.info(waiting).place) == (None, 1)
        for job in (waiting, running_job):
            await jobs.cancel(job)
            assert job.state == "canceled"
            with pytest.raises(JobCanceled):
                await jobs.result(job)
        runner.gate.set()
        after = await jobs.add("a", None, SPEC, b"3")
        await ended(after)
        assert runner.ran == [b"1", b"3"]
        assert running_job.state == "canceled"
        await jobs.cancel(after)  # ended: forgotten
        with pytest.raises(JobNotFound):
            jobs.get("a", after.id)


async def test_events_tell_each_change_and_resume_after_the_last_one_seen():
    runner = Runner()
    runner.gate.clear()
    async with running(runner) as jobs:
        job = await jobs.add("a", None, SPEC, b"1")
        await until(lambda: job.state == "running" and len(job.events) == 2)
        assert [name for _, name, _ in await jobs.next_events(job, -1, 0.01)] == ["running"]
        seen = await jobs.next_events(job, 0, 0.01)
        assert [name for _, name, _ in seen] == ["queued", "running"]
        assert await jobs.next_events(job, seen[-1][0], 0.01) == []
        runner.gate.set()
        last = await jobs.next_events(job, seen[-1][0], 5.0)
        assert [(name, info.progress) for _, name, info in last] == [("done", 1.0)]
        assert await jobs.next_events(job, last[-1][0], 5.0) is None
        numbers = [number for number, _, _ in [*seen, *last]]
        assert numbers == sorted(set(numbers))


async def test_progress_is_told_against_the_usual_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("broker.jobs.jobs._PROGRESS_EVERY_S", 0.01)
    runner = Runner()
    async with running(runner) as jobs:
        jobs._usual_s["m"] = 0.05
        runner.gate.clear()
        job = await jobs.add("a", None, SPEC, b"1")
        await until(lambda: job.progress == 0.99)  # longer than usual: not done for all that
        assert job.state == "running"
        assert [name for _, name, _ in job.events] == ["queued", "running"]
        runner.gate.set()
        await ended(job)
        assert jobs.info(job).progress == 1.0


async def test_jobs_survive_a_restart_with_keys_turns_and_answers(tmp_path: Path):
    runner = Runner()
    async with running(runner, tmp_path) as jobs:
        done = await jobs.add("a", "done", SPEC, b"done")
        await ended(done)
        runner.gate.clear()
        cut = await jobs.add("a", "cut", SPEC, b"cut")
        await until(lambda: cut.state == "running")
        waits = await jobs.add("b", "waits", SPEC, b"waits")
        jobs._runner.errors = []
    runner.gate.set()
    runner.ran.clear()
    async with running(runner, tmp_path) as jobs:
        found = jobs.get("a", done.id)
        assert (await jobs.result(found))[1] == b"enod"
        assert jobs.known("a", "cut", SPEC, 3).id == cut.id
        for job in (jobs.get("a", cut.id), jobs.get("b", waits.id)):
            await ended(job)
            assert job.state == "done"
            assert job.events[0][0] >= int(job.created_s * 1e3)
    assert runner.ran == [b"cut", b"waits"]
    with sqlite3.connect(tmp_path / JOURNAL_NAME) as database:
        assert (
            database.execute("SELECT count(*) FROM jobs WHERE body IS NOT NULL").fetchone()[0] == 0
        )


@pytest.mark.slow
async def test_a_job_that_ends_its_broker_each_time_is_given_up(tmp_path: Path):
    runner = Runner()
    runner.gate.clear()
    job_id = ""
    for _ in range(limits.MAX_JOB_ATTEMPTS):
        async with running(runner, tmp_path) as jobs:
            if not job_id:
                job_id = (await jobs.add("a", None, SPEC, b"poison")).id
            await until(lambda: jobs.get("a", job_id).state == "running")  # noqa: B023
    async with running(runner, tmp_path) as jobs:
        job = jobs.get("a", job_id)
        await ended(job)
        assert (job.state, job.failure.code) == ("failed", "worker_lost")


async def test_what_is_deleted_leaves_the_file_too(tmp_path: Path):
    async with running(Runner(), tmp_path) as jobs:
        job = await jobs.add("a", None, SPEC, bytes(4 << 20))
        await ended(job)
        await jobs.cancel(job)
    assert (tmp_path / JOURNAL_NAME).stat().st_size < 100_000


async def test_two_brokers_do_not_share_a_folder(tmp_path: Path):
    async with running(Runner(), tmp_path):
        with pytest.raises(ConfigError, match="one for each broker"):
            await Journal(tmp_path).open()


async def test_a_journal_that_is_no_database_is_named(tmp_path: Path):
    (tmp_path / JOURNAL_NAME).write_bytes(b"junk" * 1000)
    with pytest.raises(ConfigError, match=r"jobs\.sqlite"):
        await Journal(tmp_path).open()


async def test_the_journal_is_for_its_owner_alone(tmp_path: Path):
    async with running(Runner(), tmp_path / "new"):
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "new" / JOURNAL_NAME).stat().st_mode & 0o777 == 0o600


def test_tenants_take_turns():
    def job(number: int, tenant: str) -> Job:
        return Job(str(number), number, tenant, None, SPEC, 1, "", 0.0)

    turns = Turns()
    waiting = [job(1, "a"), job(2, "a"), job(3, "a"), job(4, "b")]
    order = []
    while waiting:
        chosen = turns.order(waiting)[0]
        turns.served(chosen.tenant)
        waiting.remove(chosen)
        order.append(chosen.number)
    assert order == [1, 4, 2, 3]
