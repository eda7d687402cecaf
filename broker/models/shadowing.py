"""Shadow traffic: some requests are computed again by another version, and thrown away.

A copy begins after the real answer was given, when the device is idle, in the lowest class, one
at a time; what finds no such moment within ``_PATIENCE_S`` is skipped, and so is what comes while
enough copies wait. So a copy takes no place and no time of a request that is there. One that
arrives while a copy runs waits for the rest of that batch of one image, which admission knows of.
Copies are on nobody's account: they pass no key, no rate and no log of requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import msgspec

from broker.executors.base import BatchItem, Executor, TensorAnswer
from broker.models.agreement import Agreement, agreement
from broker.models.rollout import Rollouts
from broker.models.servable import ModelKey, OpenedServable
from broker.scheduling.scheduler import Scheduler
from broker.scheduling.ticket import LOWEST_PRIORITY, Answer, Caller
from edge_runtime.contract.errors import NearfarError, RequestRejected, WorkerLost
from edge_runtime.contract.wire import EncodedAnswer

__all__ = ["ShadowStatus", "Shadows"]

_MOST_WAITING: Final = 4
"""Copies that wait, of all models: each holds a body in memory."""
_PATIENCE_S: Final = 2.0
_POLL_S: Final = 0.01
_MOST_LOST: Final = 2
_DEADLINE_S: Final = 30.0

Given = EncodedAnswer | TensorAnswer


class ShadowStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a shadow did since it was set."""

    version: str
    percent: float
    agreed: int
    differed: int
    failed: int
    skipped: int
    """The device was busy, or the version not in memory."""
    mean_difference: float
    max_difference: float


class _Count:
    def __init__(self) -> None:
        self.results = dict.fromkeys(("agreed", "differed", "failed", "skipped"), 0)
        self.sum = 0.0
        self.max = 0.0
        self.lost = 0


class Shadows:
    """Runs the copies. ``observe`` is told model and result of each, for metrics."""

    def __init__(
        self,
        rollouts: Rollouts,
        scheduler: Scheduler,
        executor: Executor,
        observe: Callable[[ModelKey, str], None],
    ) -> None:
        self._rollouts = rollouts
        self._scheduler = scheduler
        self._executor = executor
        self._observe = observe
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._counts: dict[ModelKey, _Count] = {}

    def offer(self, answered: OpenedServable, unit: str, item: BatchItem, answer: Answer) -> None:
        """A request was answered: compute it again, if its draw says so. Never waits."""
        shadow = self._rollouts.shadow_of(answered.key, unit)
        if shadow is None:
            return
        if len(self._tasks) >= _MOST_WAITING or not _comparable(answered, shadow, item):
            self._note(shadow.key, "skipped")
            return
        task = asyncio.create_task(self._copy(shadow, item, answer.given), name="shadow")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Drop those that wait."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _copy(self, shadow: OpenedServable, item: BatchItem, given: Given) -> None:
        async with self._turn:
            if not await self._until_idle(shadow.key):
                self._note(shadow.key, "skipped")
                return
            loop = asyncio.get_running_loop()
            deadline_s = loop.time() + _DEADLINE_S
            caller = Caller(priority=LOWEST_PRIORITY)
            try:
                async with asyncio.timeout_at(deadline_s):
                    with self._scheduler.admitted(
                        shadow.key, deadline_s, len(item.body), caller=caller
                    ) as ticket:
                        copied = await self._scheduler.submit(ticket, item)
            except (NearfarError, TimeoutError) as error:
                self._note(shadow.key, "failed")
                self._blame(shadow.key, error)
                return
        outputs = item.outputs or ()
        found = await asyncio.to_thread(agreement, shadow, outputs, given, copied.given)
        self._note(shadow.key, "agreed" if found.agree else "differed", found)

    def _blame(self, model: ModelKey, error: Exception) -> None:
        """A version that ends its process takes real requests' time: it gets few chances."""
        if not isinstance(error, WorkerLost | RequestRejected):
            return
        count = self._counts[model]
        count.lost += 1
        if count.lost >= _MOST_LOST:
            detail = f"its process died {count.lost} times"
            self._rollouts.drop_shadow(model.name, detail)
            count.lost = 0

    async def _until_idle(self, model: ModelKey) -> bool:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + _PATIENCE_S
        while loop.time() < end_s:
            if self._scheduler.idle and model in self._executor.stats().models:
                return True
            await asyncio.sleep(_POLL_S)
        return False

    def _note(self, model: ModelKey, result: str, found: Agreement | None = None) -> None:
        count = self._counts.setdefault(model, _Count())
        count.results[result] += 1
        if found is not None:
            count.sum += found.difference
            count.max = max(count.max, found.difference)
        self._observe(model, result)

    def status(self, name: str) -> ShadowStatus | None:
        """Of the shadow of a model; None where it has none."""
        shadow = self._rollouts.status(name).shadow
        if shadow is None:
            return None
        count = self._counts.get(ModelKey(name, shadow.version), _Count())
        compared = count.results["agreed"] + count.results["differed"]
        return ShadowStatus(
            version=shadow.version,
            percent=shadow.percent,
            mean_difference=count.sum / compared if compared else 0.0,
            max_difference=count.max,
            **count.results,
        )


def _comparable(answered: OpenedServable, shadow: OpenedServable, item: BatchItem) -> bool:
    """Tensors that go in or come out must be the same ones for both."""
    mine, others = answered.manifest.model, shadow.manifest.model
    if item.tensor and mine.inputs != others.inputs:
        return False
    return item.outputs is None or mine.outputs == others.outputs
