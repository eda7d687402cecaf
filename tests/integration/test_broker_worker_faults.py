"""Faults of the worker under load: every request ends in an answer or a typed error."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from broker.executors.base import BatchItem, ExecutorOptions
from broker.executors.worker import WorkerExecutor
from broker.models.servable import ModelKey, open_servable
from edge_runtime.contract import errors as e
from edge_runtime.contract.wire import EncodedAnswer
from tests.support import broker_images as images
from tests.support.broker import (
    Events,
    broker_here,
    broker_process,
    children_of,
    is_running,
    predict,
    stopped,
    wait_until_gone,
)
from tests.support.images import encode
from tests.support.servables import (
    crashing_net,
    greedy_net,
    heavy_net,
    shared_servable,
    tiny_net,
    write_servable,
)

pytestmark = pytest.mark.slow

TINY = ModelKey("tiny", "1.0.0")
BLACK = encode(Image.new("RGB", (40, 40)))


@pytest.fixture(scope="module")
def crashing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_servable(tmp_path_factory.mktemp("crashing") / "tiny", crashing_net())


def best(result: object) -> int:
    """The class that won: scores differ in their last digits with the size of a batch."""
    assert isinstance(result, EncodedAnswer), result
    assert result.predictions is not None
    return result.predictions[0].index


async def test_a_poison_image_among_good_ones_costs_only_itself_and_is_not_taken_again(
    crashing: Path,
):
    events = Events()
    options = ExecutorOptions(device="cpu", threads=1)
    executor = WorkerExecutor([open_servable(crashing)], options, events)
    await executor.start()
    try:
        good = [BatchItem(images.png(index)) for index in range(5)]
        outcome = await executor.run(TINY, [*good[:2], BatchItem(BLACK), *good[2:]])
        kinds = [type(result) for result in outcome.results]
        assert kinds.pop(2) is e.RequestRejected
        assert not any(issubclass(kind, e.NearfarError) for kind in kinds)
        assert executor.stats().restarts == 2  # in the batch, and alone
        exits = [event["exit"] for event in events.named("worker_exited")]
        assert exits == ["killed by SIGFPE", "killed by SIGFPE"]
        assert len(events.named("request_quarantined")) == 1

        pid = executor.stats().pid
        outcome = await executor.run(TINY, [BatchItem(BLACK), good[0]])
        assert isinstance(outcome.results[0], e.RequestRejected)
        assert not outcome.results[0].retryable
        assert not isinstance(outcome.results[1], e.NearfarError)
        outcome = await executor.run(TINY, [BatchItem(BLACK)])
        assert isinstance(outcome.results[0], e.RequestRejected)
        assert executor.stats().pid == pid
        assert executor.stats().quarantined == 1
    finally:
        await executor.close()


async def test_a_batch_that_was_sent_ahead_survives_the_death_of_the_one_before_it(
    crashing: Path,
):
    options = ExecutorOptions(device="cpu", threads=1)
    executor = WorkerExecutor([open_servable(crashing)], options, Events())
    await executor.start()
    try:
        good = [BatchItem(images.png(index)) for index in range(6)]
        alone = await executor.run(TINY, good)
        first, *ahead = await asyncio.gather(
            executor.run(TINY, [good[0], BatchItem(BLACK)]),
            executor.run(TINY, good[:3]),
            executor.run(TINY, good[3:]),
        )
        assert best(first.results[0]) == best(alone.results[0])
        assert isinstance(first.results[1], e.RequestRejected)
        given = [result for outcome in ahead for result in outcome.results]
        assert list(map(best, given)) == list(map(best, alone.results))
        assert first.interrupted
        assert first.at_fault
        assert ahead[0].interrupted, "it was sent to the process that died"
        assert not ahead[0].at_fault, "another batch ended that one"
        assert executor.stats().quarantined == 1
    finally:
        await executor.close()


async def test_what_comes_between_two_batches_gets_its_own_answer():
    servable = open_servable(shared_servable())
    executor = WorkerExecutor([servable], ExecutorOptions(device="cpu"), Events())
    await executor.start()
    try:
        good = [BatchItem(images.png(index)) for index in range(4)]
        alone = await executor.run(servable.key, good)
        for _ in range(3):
            before, ahead, _, _, after = await asyncio.gather(
                executor.run(servable.key, good),
                executor.run(servable.key, good[:2]),
                executor.unload(servable.key),
                executor.load(servable.key),
                executor.run(servable.key, good[2:]),
            )
            assert before == alone
            given = [*ahead.results, *after.results]
            assert list(map(best, given)) == list(map(best, alone.results))
        assert executor.stats().restarts == 0
    finally:
        await executor.close()


async def test_a_batch_that_is_left_in_the_pipe_is_never_taken_for_the_next_one():
    servable = open_servable(shared_servable())
    executor = WorkerExecutor([servable], ExecutorOptions(device="cpu"), Events())
    await executor.start()
    try:
        good = [BatchItem(images.png(index)) for index in range(4)]
        alone = await executor.run(servable.key, good)
        runs = [asyncio.create_task(executor.run(servable.key, good)) for _ in range(2)]
        await asyncio.sleep(0)
        runs[1].cancel()  # in the pipe by now, behind the one that runs
        outcomes = await asyncio.gather(*runs, return_exceptions=True)
        assert isinstance(outcomes[1], asyncio.CancelledError)
        await executor.wait_ready()
        again = await executor.run(servable.key, good[1:])
        assert list(map(best, again.results)) == list(map(best, alone.results[1:]))
    finally:
        await executor.close()


async def test_a_poison_image_is_refused_by_a_broker_that_goes_on_answering(crashing: Path):
    async with broker_here(crashing, executor="worker") as broker:
        sent = [BLACK, *(images.png(index) for index in range(12))]
        replies = await asyncio.gather(
            *(predict(broker.url, body, deadline_ms=30_000) for body in sent)
        )
        assert (replies[0].status, replies[0].code) == (400, "request_rejected")
        assert [reply.status for reply in replies[1:]] == [200] * 12
        pid = broker.services.executor.stats().pid
        again = await predict(broker.url, BLACK)
        assert again.code == "request_rejected"
        assert broker.services.executor.stats().pid == pid


async def test_workers_killed_again_and_again_under_load_cost_no_request_its_end():
    async with broker_here(shared_servable(), executor="worker") as broker:
        killed = []

        async def client(number: int) -> list[tuple[int, str | None]]:
            seen = []
            for turn in range(40):
                reply = await predict(
                    broker.url, images.png(number * 100 + turn), deadline_ms=20_000
                )
                seen.append((reply.status, None if reply.status == 200 else reply.code))
            return seen

        async def killer() -> None:
            for _ in range(3):
                await asyncio.wait_for(broker.services.executor.wait_ready(), 60)
                await asyncio.sleep(0.05)
                pid = broker.services.executor.stats().pid
                if pid is not None:
                    killed.append(pid)
                    os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(0.1)

        *answers, _ = await asyncio.gather(*(client(number) for number in range(6)), killer())
        ends = [end for one in answers for end in one]
        assert len(ends) == 240
        unanswered = {end for end in ends if end[0] != 200}
        assert unanswered <= {(503, "worker_lost"), (503, "overloaded"), (504, "deadline_exceeded")}
        assert len(killed) == 3
        assert broker.services.executor.stats().quarantined == 0
        assert (await predict(broker.url, images.png(1))).status == 200
    assert not any(is_running(pid) for pid in killed)


async def test_a_hung_batch_is_noticed_in_seconds_once_the_model_is_known():
    options = ExecutorOptions(device="cpu", threads=1, hang_timeout_s=600.0)
    executor = WorkerExecutor([open_servable(shared_servable())], options, Events())
    await executor.start()
    try:
        for index in range(8):
            await executor.run(TINY, [BatchItem(images.png(index))] * 2)
        pid = executor.stats().pid
        assert pid is not None
        with stopped(pid):
            outcome = await asyncio.wait_for(
                executor.run(TINY, [BatchItem(images.png(1)), BatchItem(images.png(2))]), 300
            )
        assert not any(isinstance(result, e.NearfarError) for result in outcome.results)
    finally:
        await executor.close()


async def test_a_batch_that_does_not_fit_into_memory_is_halved_and_the_size_remembered(
    tmp_path: Path,
):
    events = Events()
    servable = open_servable(write_servable(tmp_path / "tiny", greedy_net()))
    executor = WorkerExecutor([servable], ExecutorOptions(device="cpu", threads=1), events)
    await executor.start()
    try:
        bodies = [images.png(index) for index in range(7)]
        batch = [BatchItem(body) for body in bodies]
        together = await executor.run(TINY, batch)
        alone = [(await executor.run(TINY, [item])).results[0] for item in batch]
        for one, other in zip(together.results, alone, strict=True):
            assert not isinstance(one, e.NearfarError)
            assert not isinstance(other, e.NearfarError)
            assert one.predictions is not None
            assert other.predictions is not None
            assert [p.index for p in one.predictions] == [p.index for p in other.predictions]
        assert events.named("batch_cap_learned")[-1] == {"model": "tiny", "images": 2}
        assert executor.stats().restarts == 0

        pid = executor.stats().pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await executor.run(TINY, batch[:1])  # on the worker that follows
        count = len(events.named("batch_cap_learned"))
        await executor.run(TINY, batch)
        assert len(events.named("batch_cap_learned")) == count  # it was told
    finally:
        await executor.close()


def resident_bytes(pid: int | None) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


async def test_an_unloaded_model_gives_its_memory_back_while_another_one_answers(tmp_path: Path):
    heavy = write_servable(tmp_path / "heavy", heavy_net(), name="heavy")
    servables = [open_servable(shared_servable()), open_servable(heavy)]
    executor = WorkerExecutor(servables, ExecutorOptions(device="cpu", threads=1), Events())
    second = ModelKey("heavy", "1.0.0")
    await executor.start()
    try:
        stop = asyncio.Event()

        async def ask() -> int:
            count = 0
            while not stop.is_set():
                outcome = await executor.run(TINY, [BatchItem(images.png(count))])
                assert not isinstance(outcome.results[0], e.NearfarError)
                count += 1
            return count

        asking = asyncio.create_task(ask())
        for _ in range(3):
            outcome = await executor.run(second, [BatchItem(images.png(1))])
            assert not isinstance(outcome.results[0], e.NearfarError)
            full = resident_bytes(executor.stats().pid)
            await executor.unload(second)
            assert set(executor.stats().models) == {TINY}
            assert full - resident_bytes(executor.stats().pid) > 45 * 2**20
            late = await executor.run(second, [BatchItem(images.png(1))] * 2)
            assert [type(result) for result in late.results] == [e.ModelNotFound] * 2
            await executor.load(second)
            assert set(executor.stats().models) == {TINY, second}
        stop.set()
        assert await asking > 0
        assert executor.stats().restarts == 0

        await executor.unload(second)
        pid = executor.stats().pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await executor.run(TINY, [BatchItem(images.png(1))])
        assert set(executor.stats().models) == {TINY}  # the next worker does not load it
        await executor.load(second)
        outcome = await executor.run(second, [BatchItem(images.png(1))])
        assert not isinstance(outcome.results[0], e.NearfarError)
    finally:
        await executor.close()


def test_a_broker_that_is_killed_leaves_no_process_behind(tmp_path: Path):
    with broker_process(tmp_path, "--models", str(shared_servable())) as broker:
        zygotes = children_of(broker.process.pid)
        workers = [pid for zygote in zygotes for pid in children_of(zygote)]
        assert workers == [broker.worker_pid()]
        broker.process.kill()
        for pid in (*zygotes, *workers):
            assert wait_until_gone(pid, 20.0)


def test_a_worker_shares_the_memory_of_the_zygote_it_was_forked_from(tmp_path: Path):
    """Torch's pages are there once: what a standby costs is little."""
    with broker_process(tmp_path, "--models", str(shared_servable())) as broker:
        (zygote,) = children_of(broker.process.pid)
        rollup = Path(f"/proc/{zygote}/smaps_rollup").read_text().splitlines()
        values = {line.split(":")[0]: int(line.split()[1]) for line in rollup[1:]}
        assert values["Pss"] < 0.75 * values["Rss"]


def test_the_crashing_net_answers_other_images_like_the_net_within():
    import torch

    batch = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(crashing_net()(batch), tiny_net()(batch))
