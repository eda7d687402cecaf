"""The worker process: lost, hung or orphaned, it costs one batch and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from broker.executors.base import BatchItem, ExecutorOptions
from broker.executors.worker import WorkerExecutor
from broker.models.servable import ModelKey, open_servable
from edge_runtime.contract import errors as e
from tests.support import broker_images as images
from tests.support.broker import Events, is_running, parent_of, stopped, until
from tests.support.servables import direct_scores, shared_servable, tiny_net

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

TINY = ModelKey("tiny", "1.0.0")


def worker_for(folder: Path, events: Events, **options: object) -> WorkerExecutor:
    values = {"device": "cpu", "precision": "fp32", "threads": 1, "hang_timeout_s": 60.0}
    values |= options
    return WorkerExecutor([open_servable(folder)], ExecutorOptions(**values), events)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def events() -> Events:
    return Events()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(events: Events) -> AsyncIterator[WorkerExecutor]:
    executor = worker_for(shared_servable(), events)
    await executor.start()
    yield executor
    pid = executor.stats().pid
    await executor.close()
    assert pid is None or not is_running(pid)


async def test_a_batch_is_answered_image_by_image(worker: WorkerExecutor):
    good, bad = images.png(1), images.png(1)[:-500]
    outcome = await worker.run(TINY, [BatchItem(good, 2), BatchItem(bad), BatchItem(good, 1)])
    first, second, third = outcome.results
    assert isinstance(second, e.ImageUnreadable)
    assert not isinstance(first, e.NearfarError)
    assert not isinstance(third, e.NearfarError)
    expected = direct_scores(tiny_net(), good)
    assert first.predictions is not None
    assert third.predictions is not None
    assert [len(first.predictions), len(third.predictions)] == [2, 1]
    best = first.predictions[0]
    assert best.index == third.predictions[0].index == int(expected.argmax())
    assert best.score == pytest.approx(expected.max(), abs=1e-6)


async def test_a_batch_of_only_bad_images_runs_no_model(worker: WorkerExecutor):
    outcome = await worker.run(TINY, [BatchItem(b"junk"), BatchItem(images.bomb_png())])
    assert [type(result) for result in outcome.results] == [e.ImageUnreadable, e.ImageTooLarge]


async def test_killed_in_the_middle_every_request_of_the_batch_is_answered_by_the_next_worker(
    worker: WorkerExecutor, events: Events
):
    pid = worker.stats().pid
    assert pid is not None
    restarts = worker.stats().restarts
    with stopped(pid):
        batch = asyncio.create_task(worker.run(TINY, [BatchItem(images.png(1))] * 3))
        await asyncio.sleep(0.1)
        assert not batch.done()
        os.kill(pid, signal.SIGKILL)
        outcome = await batch
    assert len(outcome.results) == 3
    assert not any(isinstance(result, e.NearfarError) for result in outcome.results)
    assert worker.ready_in_s() == 0.0
    assert worker.stats().restarts == restarts + 1
    assert worker.stats().pid != pid
    assert worker.stats().quarantined == 0
    assert not is_running(pid)
    assert {"pid": pid, "exit": "killed by SIGKILL"} in events.named("worker_exited")


async def test_while_the_worker_restarts_a_batch_is_refused_retryably_at_once(
    worker: WorkerExecutor,
):
    pid = worker.stats().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not worker.stats().ready)
    assert 0.0 < worker.ready_in_s() < 120.0
    with pytest.raises(e.WorkerLost) as caught:
        await worker.run(TINY, [BatchItem(images.png())])
    assert caught.value.retryable
    await asyncio.wait_for(worker.wait_ready(), 120)


async def test_killed_while_idle_it_is_replaced(worker: WorkerExecutor):
    pid = worker.stats().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: worker.stats().ready and worker.stats().pid != pid, 60)
    outcome = await worker.run(TINY, [BatchItem(images.png())])
    assert not isinstance(outcome.results[0], e.NearfarError)


async def test_without_its_zygote_a_worker_serves_on_and_is_replaced(
    worker: WorkerExecutor, events: Events
):
    pid = worker.stats().pid
    assert pid is not None
    zygote = parent_of(pid)
    os.kill(zygote, signal.SIGKILL)
    await until(lambda: not is_running(zygote))
    outcome = await worker.run(TINY, [BatchItem(images.png())])
    assert not isinstance(outcome.results[0], e.NearfarError)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: worker.stats().ready and worker.stats().pid != pid, 120)
    assert {"pid": pid, "exit": "exit status unknown"} in events.named("worker_exited")
    outcome = await worker.run(TINY, [BatchItem(images.png())])
    assert not isinstance(outcome.results[0], e.NearfarError)


async def test_a_hung_worker_is_stopped_and_its_batch_answered_by_the_next_one():
    executor = worker_for(shared_servable(), Events(), hang_timeout_s=5.0)
    await executor.start()
    try:
        pid = executor.stats().pid
        assert pid is not None
        with stopped(pid):
            outcome = await executor.run(TINY, [BatchItem(images.png())] * 2)
        assert not any(isinstance(result, e.NearfarError) for result in outcome.results)
        assert outcome.interrupted
        assert not is_running(pid)
        assert not (await executor.run(TINY, [BatchItem(images.png())])).interrupted
    finally:
        await executor.close()


async def test_interrupts_and_terminations_are_left_to_the_broker(worker: WorkerExecutor):
    pid = worker.stats().pid
    assert pid is not None
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    outcome = await worker.run(TINY, [BatchItem(images.png())])
    assert not isinstance(outcome.results[0], e.NearfarError)
    assert worker.stats().pid == pid


async def test_what_a_worker_prints_is_an_event_and_no_answer(worker: WorkerExecutor):
    """The pipes for frames are not its standard output any more."""
    pid = worker.stats().pid
    targets = [os.readlink(f"/proc/{pid}/fd/{n}") for n in (0, 1, 2)]  # noqa: PTH115
    assert targets[0] == "/dev/null"
    assert targets[1] == targets[2]


async def test_closing_leaves_no_process_behind():
    events = Events()
    executor = worker_for(shared_servable(), events)
    await executor.start()
    pid = executor.stats().pid
    assert pid is not None
    await executor.close()
    assert not is_running(pid)
    assert events.named("worker_exited") == [{"pid": pid, "exit": "exit status 0"}]
    assert executor.ready_in_s() == float("inf")


async def test_a_worker_that_cannot_start_again_promises_nothing(tmp_path: Path):
    folder = Path(shutil.copytree(shared_servable(), tmp_path / "tiny"))
    executor = worker_for(folder, Events())
    await executor.start()
    try:
        (folder / "model.pt2").write_bytes(b"junk")
        pid = executor.stats().pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: executor.ready_in_s() == float("inf"), 60)
        shutil.copyfile(shared_servable() / "model.pt2", folder / "model.pt2")
        await asyncio.wait_for(executor.wait_ready(), 120)
        assert executor.ready_in_s() == 0.0
    finally:
        await executor.close()


@pytest.mark.parametrize(
    ("harm", "expected", "says"),
    [("model", e.ModelLoadError, "cannot load"), ("manifest", e.ManifestError, "changed since")],
)
async def test_a_servable_that_changed_under_the_broker_stops_the_start(
    tmp_path: Path, harm: str, expected: type[e.NearfarError], says: str
):
    folder = Path(shutil.copytree(shared_servable(), tmp_path / "tiny"))
    servable = open_servable(folder)
    if harm == "model":
        (folder / "model.pt2").write_bytes(b"junk")
    else:
        text = (folder / "servable.json").read_text()
        (folder / "servable.json").write_text(text + "\n")
    executor = WorkerExecutor([servable], ExecutorOptions(device="cpu", threads=1), Events())
    with pytest.raises(expected, match=says):
        await executor.start()
    assert executor.stats().pid is None


async def test_a_device_that_is_not_there_stops_the_start():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    executor = worker_for(shared_servable(), Events(), device="cuda")
    with pytest.raises(e.ConfigError, match="--device cpu"):
        await executor.start()
