"""``EdgeRuntime.submit``: where a job runs, and what it survives."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from edge_runtime import (
    Bundle,
    ConfigError,
    DeadlineExceeded,
    EdgeRuntime,
    InferenceSource,
    NetworkUnreachable,
)
from edge_runtime.contract.errors import JobCanceled, LimitExceeded, Unauthorized, WireError
from edge_runtime.testing import HttpRequest, HttpResponse, ScriptedTransport, problem
from tests.support.broker import broker_process
from tests.support.bundles import LABELS, photo, servable, tiny_bundle
from tests.support.watch import our_threads

pytestmark = pytest.mark.slow

BUNDLE = Bundle.open(tiny_bundle())
CREATED = "2026-01-01T00:00:00Z"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return servable(tmp_path_factory.mktemp("servable") / "same")


@pytest.fixture(scope="module")
def broker(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("broker")
    with broker_process(folder, "--models", str(models)) as running:
        yield running.url


def label_of(data: bytes) -> str | None:
    with EdgeRuntime(BUNDLE, variant="tflite-fp32") as runtime:
        return runtime.run(data).label


class ScriptedJobs:
    """A broker whose jobs are scripted; it has no event stream, so it is polled."""

    def __init__(self, *states: str | HttpResponse, answer: HttpResponse | None = None) -> None:
        self._states = list(states)
        self._answer = answer
        self.keys: list[str] = []
        self.base = ScriptedTransport.for_bundle(BUNDLE, lambda _: LABELS[2])
        self.transport = ScriptedTransport(self._handle)

    async def _handle(self, request: HttpRequest) -> HttpResponse:
        if "/jobs" not in request.path:
            return await self.base.send(request)
        if request.path.endswith("/result"):
            if self._answer is not None:
                return self._answer
            predict = msgspec.structs.replace(request, path="/v1/models/scripted:predict")
            return await self.base.send(predict)
        if request.method == "DELETE":
            return HttpResponse(status=204, headers={}, body=b"")
        if request.method == "POST":
            self.keys.append(request.headers["Idempotency-Key"])
        state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        if isinstance(state, HttpResponse):
            return state
        info = {"id": "job-1", "model": "scripted", "state": state, "created": CREATED}
        status = 202 if request.method == "POST" else 200
        return HttpResponse(status=status, headers={}, body=json.dumps(info).encode())

    def methods(self) -> list[str]:
        return [one.method for one in self.transport.requests if "/jobs" in one.path]


def scripted(jobs: ScriptedJobs, **options: object) -> EdgeRuntime:
    return EdgeRuntime(BUNDLE, transport=jobs.transport, policy="ONLY_IN_CLOUD", **options)  # type: ignore[arg-type]


def test_a_private_job_needs_a_policy_that_answers_here() -> None:
    with scripted(ScriptedJobs("done")) as runtime, pytest.raises(ConfigError, match="private"):
        runtime.submit(photo(0), private=True)


def test_what_the_bundle_does_not_take_is_refused_at_once() -> None:
    with EdgeRuntime(BUNDLE) as runtime:
        with pytest.raises(ConfigError, match="takes images"):
            runtime.submit(7)
        with pytest.raises(ConfigError, match="top_k"):
            runtime.submit(photo(0), top_k=0)
    with pytest.raises(ConfigError, match="closed"):
        runtime.submit(photo(0))


def test_a_refusal_that_time_will_not_mend_ends_the_job() -> None:
    jobs = ScriptedJobs(problem(401, "unauthorized"))
    with scripted(jobs) as runtime:
        job = runtime.submit(photo(0))
        with pytest.raises(Unauthorized):
            job.result(10)
        assert job.status().state == "failed"


def test_trouble_that_passes_is_waited_out_under_the_same_key() -> None:
    busy = problem(503, "overloaded", headers={"retry-after": "0"})
    jobs = ScriptedJobs(busy, problem(500, "broker_fault"), "queued", "running", "done")
    with scripted(jobs) as runtime:
        job = runtime.submit(photo(0))
        states = [(status.state, status.trouble) for status in job.events()]
        assert job.result(10).label == LABELS[2]
    assert ("queued", "overloaded") in states
    assert states[-1] == ("done", None)
    assert len(jobs.keys) == 3
    assert len(set(jobs.keys)) == 1


def test_a_job_that_the_broker_forgot_is_submitted_again() -> None:
    gone = problem(404, "job_not_found")
    jobs = ScriptedJobs("queued", gone, "queued", "done")
    with scripted(jobs) as runtime:
        assert runtime.submit(photo(0)).result(10).label == LABELS[2]
    assert jobs.methods().count("POST") == 2


def test_a_broker_without_jobs_says_so_and_is_not_asked_for_ever() -> None:
    jobs = ScriptedJobs(HttpResponse(status=200, headers={}, body=b"<html>"))
    with scripted(jobs) as runtime, pytest.raises(WireError):
        runtime.submit(photo(0)).result(60)
    assert jobs.methods().count("POST") == 5


def test_a_wait_that_ends_leaves_the_job_alone() -> None:
    jobs = ScriptedJobs("queued", "queued", "done")
    with scripted(jobs) as runtime:
        job = runtime.submit(photo(0))
        with pytest.raises(DeadlineExceeded, match="goes on"):
            job.result(0.01)
        assert job.result(10).label == LABELS[2]


def test_a_cancel_tells_the_broker_and_the_caller() -> None:
    jobs = ScriptedJobs("queued")
    with scripted(jobs) as runtime:
        job = runtime.submit(photo(0))
        while not jobs.methods():
            time.sleep(0.005)
        job.cancel()
        job.cancel()
        with pytest.raises(JobCanceled):
            job.result(10)
        deadline_s = time.monotonic() + 10
        while "DELETE" not in jobs.methods() and time.monotonic() < deadline_s:
            time.sleep(0.005)
        assert "DELETE" in jobs.methods()
        assert runtime.jobs() == []


def test_closing_the_runtime_ends_every_wait_and_every_thread(tmp_path: Path) -> None:
    runtime = scripted(ScriptedJobs("queued"), state=tmp_path)
    job = runtime.submit(photo(0))
    runtime.close()
    with pytest.raises(NetworkUnreachable, match="closed"):
        job.result(10)
    assert our_threads() == []


def test_jobs_are_found_again_after_a_restart_of_the_app(tmp_path: Path) -> None:
    with scripted(ScriptedJobs("queued"), state=tmp_path) as runtime:
        first = runtime.submit(photo(0)).id
    jobs = ScriptedJobs("running", "done")
    with scripted(jobs, state=tmp_path) as runtime:
        (found,) = runtime.jobs()
        assert found.id == first
        assert found.result(10).label == LABELS[2]
        found.forget()
        assert runtime.jobs() == []
    assert set(jobs.keys) <= {first}
    assert list((tmp_path / "jobs").iterdir()) == []


def test_the_state_folder_is_bounded_and_survives_what_others_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_runtime.jobs.store._MAX_JOBS", 2)
    with scripted(ScriptedJobs("queued"), state=tmp_path) as runtime:
        runtime.submit(photo(0))
        (tmp_path / "jobs" / f"{'0' * 32}.json").write_bytes(b"\xffjunk")
        with pytest.raises(LimitExceeded, match="forget"):
            runtime.submit(photo(1))
        assert len(runtime.jobs()) == 1


def test_no_metadata_of_a_photo_is_stored_or_submitted(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "my address"
    buffer = io.BytesIO()
    Image.open(io.BytesIO(photo(0))).save(buffer, "JPEG", exif=exif)
    jobs = ScriptedJobs("queued")
    with scripted(jobs, state=tmp_path) as runtime:
        runtime.submit(buffer.getvalue())
        stored = b"".join(path.read_bytes() for path in (tmp_path / "jobs").iterdir())
        while not jobs.keys:
            time.sleep(0.005)
    sent = b"".join(request.body for request in jobs.transport.requests)
    assert len(sent) > 1000
    assert b"my address" not in stored + sent


def test_without_a_broker_a_job_runs_on_the_device() -> None:
    with EdgeRuntime(BUNDLE, variant="tflite-fp32") as runtime:
        job = runtime.submit(photo(3), top_k=1)
        result = job.result(30)
        assert (result.label, len(result.predictions)) == (label_of(photo(3)), 1)
        assert result.inference_source is InferenceSource.ON_DEVICE
        assert [status.state for status in job.events()] == ["done"]


def test_a_policy_that_prefers_the_device_keeps_the_job_there() -> None:
    jobs = ScriptedJobs("done")
    with EdgeRuntime(BUNDLE, transport=jobs.transport, policy="PREFER_ON_DEVICE") as runtime:
        assert runtime.submit(photo(0)).result(30).inference_source is InferenceSource.ON_DEVICE
    assert jobs.methods() == []


def test_a_cloud_that_fails_for_good_leaves_the_local_answer() -> None:
    jobs = ScriptedJobs(problem(401, "unauthorized"))
    with EdgeRuntime(BUNDLE, transport=jobs.transport, policy="PREFER_IN_CLOUD") as runtime:
        result = runtime.submit(photo(0)).result(30)
    assert result.inference_source is InferenceSource.ON_DEVICE
    assert jobs.keys


async def test_the_async_job_waits_and_iterates_without_a_thread_of_its_own() -> None:
    jobs = ScriptedJobs("queued", "running", "done")
    async with scripted(jobs) as runtime:
        job = await runtime.asubmit(photo(0))
        states = [status.state async for status in job.events()]
        assert states[-1] == "done"
        assert (await job.result(5)).label == LABELS[2]
        assert [one.id for one in await runtime.ajobs()] == [job.id]


async def test_cancelling_the_wait_leaves_an_async_job_alone() -> None:
    jobs = ScriptedJobs("queued", "queued", "done")
    async with scripted(jobs) as runtime:
        job = await runtime.asubmit(photo(0))
        waiting = asyncio.create_task(job.result())
        await asyncio.sleep(0.01)
        waiting.cancel()
        assert (await job.result(10)).label == LABELS[2]


@pytest.mark.slow
def test_a_real_broker_answers_jobs_as_the_model_does(broker: str) -> None:
    with EdgeRuntime(BUNDLE, broker, "ONLY_IN_CLOUD") as runtime:
        made = [runtime.submit(photo(seed)) for seed in range(6)]
        for seed, job in enumerate(made):
            result = job.result(30)
            assert result.label == label_of(photo(seed))
            assert result.inference_source is InferenceSource.IN_CLOUD
            assert result.timings.server_inference_ms is not None


@pytest.mark.slow
def test_a_job_outlives_a_kill_of_the_broker_and_of_the_app(models: Path, tmp_path: Path) -> None:
    arguments = ("--models", str(models), "--jobs", str(tmp_path / "journal"))
    script = (
        "import os, sys\n"
        "from edge_runtime import EdgeRuntime\n"
        "runtime = EdgeRuntime(sys.argv[1], sys.argv[2], 'ONLY_IN_CLOUD', state=sys.argv[3])\n"
        "for name in sys.argv[4:]:\n"
        "    print(runtime.submit(name).id, flush=True)\n"
        "os._exit(9)\n"
    )
    names = []
    for seed in range(4):
        names.append(str(tmp_path / f"{seed}.jpg"))
        Path(names[-1]).write_bytes(photo(seed))
    state = tmp_path / "state"
    with broker_process(tmp_path, *arguments) as first:
        done = subprocess.run(
            [sys.executable, "-c", script, str(tiny_bundle()), first.url, str(state), *names],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 9, done.stderr
        first.process.kill()
    with (
        broker_process(tmp_path, *arguments) as second,
        EdgeRuntime(BUNDLE, second.url, "ONLY_IN_CLOUD", state=state) as runtime,
    ):
        found = runtime.jobs()
        assert [job.id for job in found] == done.stdout.split()
        for seed, job in enumerate(found):
            assert job.result(60).label == label_of(photo(seed))
