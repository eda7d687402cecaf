"""The scheduler: admission and queues in front of one executor; ``dispatch.py`` feeds it.

Life of a request: ``admit`` on its headers, ``submit`` with its body, an ``Answer`` or a
typed error, ``release`` whatever happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from broker.executors.base import BatchItem, Executor
from broker.models.servable import ModelKey
from broker.scheduling.admission import (
    Forecast,
    Margin,
    forecast,
    refusal,
    wants_probe,
)
from broker.scheduling.bounds import Bounds
from broker.scheduling.dispatch import SHUTTING_DOWN, Dispatcher
from broker.scheduling.lane import Lane, warm_up
from broker.scheduling.latency import LatencyModel
from broker.scheduling.observer import Observer
from broker.scheduling.shares import Shares
from broker.scheduling.ticket import ANYBODY, DEFAULT_PRIORITY, Answer, Caller, Ticket
from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    NearfarError,
    Overloaded,
)

__all__ = ["Scheduler"]

_LOG = logging.getLogger(__name__)
_LATE_UPLOAD_S = 0.001


class Scheduler:
    """Feeds one executor. Used from one event loop only.

    ``max_batch`` bounds every batch, ``largest`` those of single models further. ``clock``
    gives seconds and must be the event loop's, as deadlines are compared with it.
    """

    def __init__(
        self,
        executor: Executor,
        models: Iterable[ModelKey],
        observer: Observer,
        *,
        max_batch: int,
        largest: Mapping[ModelKey, int] | None = None,
        max_queue: int = limits.MAX_QUEUE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        caps = largest or {}
        self._lanes = {
            model: Lane(max_batch=min(max_batch, caps.get(model, max_batch))) for model in models
        }
        self._clock = clock
        self._margin = Margin()
        self._shares = Shares()
        self._bounds = Bounds(max_queue)
        self._dispatcher = Dispatcher(
            executor, self._lanes, observer, margin=self._margin, shares=self._shares, clock=clock
        )
        self._draining = False
        self._loop_task: asyncio.Task[None] | None = None

    # Requests ------------------------------------------------------------------

    @contextlib.contextmanager
    def admitted(
        self,
        model: ModelKey,
        deadline_s: float,
        upload_bytes: int,
        upload_ms: float = 0.0,
        caller: Caller = ANYBODY,
    ) -> Iterator[Ticket]:
        """A ticket for the length of the block; its place is free again afterwards.

        ``upload_bytes``: what the body may have at most; ``upload_ms``: how long it will
        take at least; ``caller``: on whose account. Raises ``DeadlineExceeded`` or
        ``Overloaded`` when the deadline cannot be kept, and ``Overloaded`` at a bound.
        """
        ticket = self._admit(model, deadline_s, upload_bytes, upload_ms, caller)
        try:
            yield ticket
        finally:
            self._release(ticket)

    async def submit(self, ticket: Ticket, item: BatchItem) -> Answer:
        """Queue an admitted request, whose body has arrived, and wait for its answer.

        Raises ``DeadlineExceeded``, at the deadline at the latest, ``Overloaded``,
        ``WorkerLost``, ``InferenceError`` or the ``ImageError`` of this image. Canceling it
        gives the place back at once.
        """
        lane = self._lanes[ticket.model]
        if ticket.place is not None:
            lane.uploading.remove(ticket.place)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer | NearfarError] = loop.create_future()
        ticket.item = item
        ticket.outcome = future
        ticket.queued_s = self._clock()
        ticket.uploaded_late = ticket.queued_s > ticket.predicted_start_s + _LATE_UPLOAD_S
        ticket.place = lane.waiting.push(ticket.deadline_s, ticket, ticket.caller.priority)
        self._dispatcher.wake()
        # A timer alone: asyncio.timeout would cancel this task, and costs five times as much.
        timer = loop.call_later(ticket.deadline_s - ticket.queued_s, ticket.expire)
        try:
            outcome = await future
        finally:
            timer.cancel()
        if isinstance(outcome, NearfarError):
            raise outcome
        return outcome

    def queue_delay_ms(self, model: ModelKey) -> int:
        """Predicted wait of a new request behind all others, for ``X-Queue-Delay-Ms``."""
        forecast = self._forecast(model, math.inf, 0.0, self._clock(), DEFAULT_PRIORITY)
        wait_ms = forecast.wait_ms
        return math.ceil(min(wait_ms, limits.MAX_DEADLINE_MS))

    @property
    def upload_bytes(self) -> int:
        """What the bodies under way may have, all together."""
        return self._bounds.upload_bytes

    def capacity_per_s(self, model: ModelKey) -> float:
        """Requests a second with full batches and no other model; 0 when nothing ran yet."""
        work_ms = self._lanes[model].work_ms
        return 1e3 / work_ms if work_ms > 0.0 else 0.0

    def queued(self, model: ModelKey) -> int:
        """Requests that upload or wait."""
        return len(self._lanes[model])

    def quote(
        self, model: ModelKey, deadline_s: float, upload_ms: float, caller: Caller
    ) -> tuple[Forecast, NearfarError | None]:
        """What a request asked for now could expect, and why it would be refused; None: not.

        Nothing is admitted and nothing counted.
        """
        now_s = self._clock()
        left_ms = (deadline_s - now_s) * 1e3
        flow = self._shares.flow(caller.priority, caller.tenant, caller.weight, left_ms, now_s)
        fair_ms = self._shares.wait_ms(flow, left_ms, now_s)
        predicted = self._forecast(model, deadline_s, upload_ms, now_s, caller.priority, fair_ms)
        error = self._bound_passed(caller, 0)
        margin_ms = self._margin_ms(model, left_ms)
        return predicted, error or refusal(predicted, left_ms, margin_ms)

    def _margin_ms(self, model: ModelKey, left_ms: float) -> float:
        lane = self._lanes[model]
        return self._margin.for_deadline(left_ms, lane.latency.mean_ms(lane.max_batch))

    def _bound_passed(self, caller: Caller, upload_bytes: int) -> Overloaded | None:
        if self._draining:
            return Overloaded(SHUTTING_DOWN)
        queued = sum(len(lane) for lane in self._lanes.values())
        return self._bounds.passed(caller, upload_bytes, queued)

    def _admit(
        self,
        model: ModelKey,
        deadline_s: float,
        upload_bytes: int,
        upload_ms: float,
        caller: Caller,
    ) -> Ticket:
        error: NearfarError | None = self._bound_passed(caller, upload_bytes)
        if error is not None:
            raise error
        now_s = self._clock()
        lane = self._lanes[model]
        ticket = Ticket(
            model=model, deadline_s=deadline_s, upload_bytes=upload_bytes, caller=caller
        )
        left_ms = ticket.left_ms(now_s)
        flow = self._shares.flow(caller.priority, caller.tenant, caller.weight, left_ms, now_s)
        fair_ms = self._shares.wait_ms(flow, left_ms, now_s)
        predicted = self._forecast(model, deadline_s, upload_ms, now_s, caller.priority, fair_ms)
        ticket.work_ms = lane.work_ms
        if predicted.idle_finish_ms <= left_ms:  # what nobody can do is no demand
            flow.ask(ticket.work_ms, now_s)
        error = refusal(predicted, left_ms, self._margin_ms(model, left_ms))
        if error is not None:
            ticket.probe = left_ms > 0 and self._idle() and wants_probe(lane.latency, now_s)
            if not ticket.probe:
                raise error
        ticket.left_at_admission_ms = left_ms
        ticket.predicted_start_s = now_s + predicted.start_ms / 1e3
        ticket.predicted_finish_s = now_s + predicted.finish_ms / 1e3
        ticket.place = lane.uploading.push(deadline_s, ticket, caller.priority)
        ticket.flow = flow
        self._shares.admit(flow, ticket.work_ms)
        self._bounds.take(ticket)
        return ticket

    def _release(self, ticket: Ticket) -> None:
        self._bounds.give_back(ticket)
        self._dispatcher.leave(ticket)
        if ticket.place is None:
            return
        lane = self._lanes[ticket.model]
        if ticket.outcome is None:
            lane.uploading.remove(ticket.place)
        elif lane.waiting.remove(ticket.place) and self._clock() >= ticket.deadline_s:
            self._dispatcher.dropped(ticket)  # its caller stopped waiting at the deadline

    def _forecast(
        self,
        model: ModelKey,
        deadline_s: float,
        upload_ms: float,
        now_s: float,
        priority: int,
        fair_ms: float = 0.0,
    ) -> Forecast:
        lane = self._lanes[model]
        others_ms = sum(
            other.latency.drain_ms(other.count_before(deadline_s, priority), other.max_batch)
            for other in self._lanes.values()
            if other is not lane and len(other)
        )
        under_way = self._dispatcher.under_way
        return forecast(
            lane.latency,
            ahead=lane.count_before(deadline_s, priority),
            others_ms=others_ms,
            residual_ms=self._dispatcher.residual_ms(now_s),
            upload_ms=upload_ms,
            max_batch=lane.max_batch,
            fair_ms=fair_ms,
            recent_batch=len(under_way[-1].tickets) if under_way else 0,
        )

    def _idle(self) -> bool:
        return self._dispatcher.idle and not any(len(lane) for lane in self._lanes.values())

    # The loop ------------------------------------------------------------------

    def remember(self, recall: Callable[[ModelKey], LatencyModel | None]) -> None:
        """Begin with what was learned before, where ``recall`` knows it."""
        for model, lane in self._lanes.items():
            lane.latency = recall(model) or lane.latency

    def learned(self) -> dict[ModelKey, LatencyModel]:
        """T(b) of each model, as far as it is known."""
        return {model: lane.latency for model, lane in self._lanes.items()}

    async def warm_up(self, bodies: Mapping[ModelKey, bytes]) -> None:
        """Run each model a few times, so that T(b) is known before the first request.

        ``bodies`` holds what each model is asked. Raises ``ModelLoadError`` when one cannot
        answer it.
        """
        for model, lane in self._lanes.items():
            await warm_up(lane, self._executor, model, bodies[model], self._clock)

    def start(self) -> asyncio.Task[None]:
        """Begin to run what is submitted. The task ends only by ``close``, or by a bug."""
        self._loop_task = asyncio.create_task(self._dispatcher.feed(), name="scheduler")
        return self._loop_task

    def drain(self) -> None:
        """Admit nobody any more; what is admitted still runs."""
        self._draining = True

    async def close(self) -> None:
        """Stop at once; what still waits fails with ``Overloaded``."""
        self._draining = True
        if self._loop_task is not None:
            self._loop_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop_task
        for lane in self._lanes.values():
            while lane.waiting:
                lane.waiting.pop().settle(Overloaded(SHUTTING_DOWN))
