"""A memory budget over a device of known cost: who comes, who goes, and nobody is dropped."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import pytest

from broker.executors.base import BatchItem, ExecutorStats, LoadedModel
from broker.models.servable import ModelKey
from broker.scheduling.residency import Residency
from broker.scheduling.scheduler import Scheduler
from broker.telemetry import Telemetry
from edge_runtime.contract.errors import (
    ConfigError,
    DeadlineExceeded,
    ModelLoadError,
    NearfarError,
    Overloaded,
    WorkerLost,
)
from tests.support.broker import Events
from tests.support.executors import SleepExecutor

A, B, C = (ModelKey(name, "1") for name in "abc")
ALL = (A, B, C)


class Loading(SleepExecutor):
    """Takes ``load_ms`` for a load, and holds what it says."""

    def __init__(self, load_ms: float) -> None:
        super().__init__(fixed_ms=1.0)
        self.load_ms = load_ms
        self.held: set[ModelKey] = set(ALL)
        self.loads: list[ModelKey] = []
        self.most_held = 0
        self.load_error: NearfarError | None = None

    async def run(self, model, batch):  # type: ignore[no-untyped-def]
        assert model in self.held
        return await super().run(model, batch)

    async def load(self, model: ModelKey) -> None:
        await asyncio.sleep(self.load_ms / 1e3)
        if self.load_error is not None:
            error, self.load_error = self.load_error, None
            raise error
        self.held.add(model)
        self.loads.append(model)
        self.most_held = max(self.most_held, len(self.held))

    async def unload(self, model: ModelKey) -> None:
        self.held.discard(model)

    def stats(self) -> ExecutorStats:
        how = LoadedModel(runtime="eager", precision="fp32")
        return ExecutorStats(device="cpu", ready=True, models=dict.fromkeys(self.held, how))


@contextlib.asynccontextmanager
async def running(
    executor: Loading, budget: int = 20, sizes: dict[ModelKey, int] | None = None
) -> AsyncIterator[tuple[Scheduler, Residency]]:
    clock = asyncio.get_running_loop().time
    sizes = sizes or dict.fromkeys(ALL, 10)
    residency = Residency(executor, sizes, budget, Events(), clock)
    await residency.begin()
    scheduler = Scheduler(executor, ALL, Telemetry(), max_batch=4, clock=clock, residency=residency)
    await scheduler.warm_up(dict.fromkeys(ALL, b"warm"))
    executor.batches.clear()
    executor.loads.clear()
    scheduler.start()
    try:
        yield scheduler, residency
    finally:
        await scheduler.close()


async def ask(scheduler: Scheduler, model: ModelKey, left_s: float = 5.0) -> str:
    deadline_s = asyncio.get_running_loop().time() + left_s
    with scheduler.admitted(model, deadline_s, 1) as ticket:
        answer = await scheduler.submit(ticket, BatchItem(model.name.encode()))
        assert answer.encoded.predictions is not None
        return answer.encoded.predictions[0].label


async def until(condition, limit_s: float = 5.0) -> None:  # type: ignore[no-untyped-def]
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def test_a_model_that_can_never_fit_is_told_at_the_start():
    with pytest.raises(ConfigError, match="raise --memory-budget"):
        Residency(Loading(1), {A: 30}, 20, Events(), lambda: 0.0)


async def test_all_are_tried_before_the_first_request_and_the_last_ones_stay():
    executor = Loading(1)
    async with running(executor) as (_, residency):
        assert executor.held == {B, C}
        assert executor.most_held == 2
        assert residency.used_bytes == 20


async def test_a_cold_model_comes_and_the_least_recently_used_goes():
    executor = Loading(5)
    async with running(executor) as (scheduler, residency):
        assert await ask(scheduler, B) == "b"
        assert await ask(scheduler, A) == "a"
        assert executor.held == {A, B}
        assert await ask(scheduler, C) == "c"
        assert executor.held == {A, C}
        assert (executor.loads, executor.most_held) == ([A, C], 2)
        assert residency.evictions == 3


async def test_the_forecast_holds_the_load():
    executor = Loading(80)
    async with running(executor) as (scheduler, _):
        assert scheduler.queue_delay_ms(B) <= 1
        assert scheduler.queue_delay_ms(A) >= 80
        with pytest.raises(Overloaded):
            await ask(scheduler, A, left_s=0.04)
        assert executor.batches == []


async def test_whoever_was_refused_for_a_load_finds_the_model_there_later():
    executor = Loading(30)
    async with running(executor) as (scheduler, _):
        with pytest.raises(Overloaded):
            await ask(scheduler, A, left_s=0.02)
        await until(lambda: A in executor.held)
        assert await ask(scheduler, A, left_s=1.0) == "a"
        assert executor.loads == [A]


async def test_a_load_waits_for_what_was_admitted_before_it():
    executor = Loading(40)
    async with running(executor) as (scheduler, _):
        executor.gate.clear()
        early = [asyncio.create_task(ask(scheduler, B, left_s=9)) for _ in range(6)]
        await until(lambda: executor.batches)
        cold = asyncio.create_task(ask(scheduler, A, left_s=2))
        await until(lambda: scheduler.queued(A) == 1)
        executor.gate.set()
        await asyncio.gather(cold, *early)
    assert [name for name, _ in executor.batches] == ["b", "b", "a"]


async def test_whoever_comes_while_a_cold_request_waits_is_told_of_both_loads():
    executor = Loading(60)
    async with running(executor) as (scheduler, _):
        executor.gate.clear()
        first = asyncio.create_task(ask(scheduler, C, left_s=9))
        await until(lambda: executor.batches)
        cold = asyncio.create_task(ask(scheduler, A, left_s=9))
        await until(lambda: scheduler.queued(A) == 1)
        assert scheduler.queue_delay_ms(C) >= 60  # A comes; B goes, which C is not
        assert scheduler.queue_delay_ms(B) >= 120  # B must come back
        executor.gate.set()
        await asyncio.gather(first, cold)


async def test_a_load_that_fails_is_answered_and_tried_again():
    executor = Loading(1)
    async with running(executor) as (scheduler, residency):
        executor.load_error = ModelLoadError("no")
        with pytest.raises(ModelLoadError, match="no"):
            await ask(scheduler, A)
        assert await ask(scheduler, A) == "a"
        executor.load_error = ModelLoadError("no")
        with pytest.raises(ModelLoadError):
            await residency.bring(B if B not in executor.held else C)


async def test_a_process_that_dies_while_it_loads_costs_nobody_an_answer():
    executor = Loading(1)
    async with running(executor) as (scheduler, _):
        executor.load_error = WorkerLost("gone")
        assert await ask(scheduler, A) == "a"


async def test_an_operator_brings_a_model_in_and_drops_it():
    executor = Loading(1)
    async with running(executor) as (scheduler, residency):
        await residency.bring(A)
        assert A in executor.held
        await residency.bring(A)
        await residency.drop(A)
        assert A not in executor.held
        assert await ask(scheduler, A) == "a"


async def test_nobody_who_was_admitted_is_dropped_however_models_swap():
    executor = Loading(15)
    rng = random.Random(3)
    results: list[str] = []

    async def client(scheduler: Scheduler, number: int) -> None:
        for _ in range(25):
            model = rng.choice(ALL)
            left_s = rng.choice((2.0, 4.0, 8.0))
            try:
                with scheduler.admitted(
                    model, asyncio.get_running_loop().time() + left_s, 1
                ) as ticket:
                    await asyncio.sleep(rng.random() * 0.01)  # its body comes
                    await scheduler.submit(ticket, BatchItem(b"x"))
                    results.append("answered")
            except DeadlineExceeded:
                results.append("dropped")
            except Overloaded:
                results.append("refused")

    async with running(executor) as (scheduler, residency):
        async with asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(client(scheduler, number))
        assert executor.most_held <= 2
        assert residency.loads > 5
    assert results.count("dropped") == 0
    assert results.count("answered") > 150
