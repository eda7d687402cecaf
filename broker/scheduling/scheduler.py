"""The scheduler: admission, queues and the loop that feeds one executor.

Life of a request: ``admit`` on its headers, ``submit`` with its body, an ``Answer`` or a
typed error, ``release`` whatever happened. The loop pulls: it forms a batch each time the
executor is free, of the model whose earliest deadline comes first.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping

from broker.executors.base import BatchItem, Executor, depth_of
from broker.models.servable import ModelKey
from broker.scheduling.admission import (
    Forecast,
    Margin,
    forecast,
    refusal,
    wants_probe,
)
from broker.scheduling.batcher import form_batch
from broker.scheduling.bounds import Bounds
from broker.scheduling.lane import Lane, warm_up
from broker.scheduling.latency import LatencyModel
from broker.scheduling.observer import Observer
from broker.scheduling.residency import Residency
from broker.scheduling.runs import SHUTTING_DOWN, Runs
from broker.scheduling.shares import Shares
from broker.scheduling.ticket import ANYBODY, DEFAULT_PRIORITY, Answer, Caller, Ticket
from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    DeadlineExceeded,
    NearfarError,
    Overloaded,
)

__all__ = ["Scheduler"]

_LATE_UPLOAD_S = 0.001
_DELAY_KEPT_S = 0.001


class _Held:
    """Releases a ticket at the end of a block; a generator would take three times as long."""

    __slots__ = ("_release", "_ticket")

    def __init__(self, ticket: Ticket, release: Callable[[Ticket], None]) -> None:
        self._ticket = ticket
        self._release = release

    def __enter__(self) -> Ticket:
        return self._ticket

    def __exit__(self, *_: object) -> None:
        self._release(self._ticket)


class Scheduler:
    """Feeds one executor. Used from one event loop only.

    ``max_batch`` bounds every batch, ``largest`` those of single models further. ``clock``
    gives seconds and must be the event loop's, as deadlines are compared with it.
    ``residency``: who is in memory, where not all models fit; None: all are.
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
        residency: Residency | None = None,
    ) -> None:
        self._executor = executor
        self._residency = residency
        caps = largest or {}
        self._lanes = {
            model: Lane(max_batch=min(max_batch, caps.get(model, max_batch))) for model in models
        }
        self._observer = observer
        self._clock = clock
        self._margin = Margin()
        self._shares = Shares()
        self._bounds = Bounds(max_queue)
        depth = 1 if residency is not None else depth_of(executor)
        self._runs = Runs(executor, observer, self._margin, clock, depth)
        self._said: dict[ModelKey, tuple[float, int]] = {}
        """The delay that was published last, and when."""
        self._draining = False
        self._work = asyncio.Event() if residency is None else residency.work
        self._loop_task: asyncio.Task[None] | None = None

    # Requests ------------------------------------------------------------------

    def admitted(
        self,
        model: ModelKey,
        deadline_s: float,
        upload_bytes: int,
        upload_ms: float = 0.0,
        caller: Caller = ANYBODY,
    ) -> contextlib.AbstractContextManager[Ticket]:
        """A ticket, for the block that follows at once; its place is free again afterwards.

        ``upload_bytes``: what the body may have at most; ``upload_ms``: how long it will
        take at least; ``caller``: on whose account. Raises ``DeadlineExceeded`` or
        ``Overloaded`` when the deadline cannot be kept, and ``Overloaded`` at a bound.
        """
        return _Held(self._admit(model, deadline_s, upload_bytes, upload_ms, caller), self._release)

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
        self._work.set()
        self._runs.wake()
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
        """Predicted wait of a new request behind all others, for ``X-Queue-Delay-Ms``.

        Every answer carries it: those of one batch say the same.
        """
        now_s, (said_s, delay_ms) = self._clock(), self._said.get(model, (-math.inf, 0))
        if now_s - said_s > _DELAY_KEPT_S:
            forecast = self._forecast(model, math.inf, 0.0, now_s, DEFAULT_PRIORITY)
            delay_ms = math.ceil(min(forecast.wait_ms, limits.MAX_DEADLINE_MS))
            self._said[model] = now_s, delay_ms
        return delay_ms

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
        queued = 0
        for lane in self._lanes.values():
            queued += len(lane)
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
            if self._residency is not None and self._residency.want(model, now_s):
                raise error
            ticket.probe = left_ms > 0 and self.idle and wants_probe(lane.latency, now_s)
            if not ticket.probe:
                raise error
        ticket.left_at_admission_ms = left_ms
        ticket.predicted_start_s = start_s = now_s + predicted.start_ms / 1e3
        ticket.predicted_finish_s = start_s + predicted.batch_ms / 1e3
        ticket.place = lane.uploading.push(deadline_s, ticket, caller.priority)
        ticket.flow = flow
        self._shares.admit(flow, ticket.work_ms)
        self._bounds.take(ticket)
        return ticket

    def _release(self, ticket: Ticket) -> None:
        self._bounds.give_back(ticket)
        self._leave(ticket)
        if self._residency is not None:
            self._work.set()  # a load may have waited for this one
        if ticket.place is None:
            return
        lane = self._lanes[ticket.model]
        if ticket.outcome is None:
            lane.uploading.remove(ticket.place)
        elif lane.waiting.remove(ticket.place) and self._clock() >= ticket.deadline_s:
            self._runs.dropped(ticket, lane)  # its caller stopped waiting at the deadline

    def _leave(self, ticket: Ticket, *, dispatched: bool = False) -> None:
        """It waits no more: its work leaves the account, once."""
        flow, ticket.flow = ticket.flow, None
        if flow is None:
            return
        if dispatched:
            self._shares.dispatch(flow.priority, ticket.work_ms)
        else:
            self._shares.leave(flow, ticket.work_ms)

    def _forecast(
        self,
        model: ModelKey,
        deadline_s: float,
        upload_ms: float,
        now_s: float,
        priority: int,
        fair_ms: float = 0.0,
    ) -> Forecast:
        lane, others_ms = self._lanes[model], 0.0
        for other in self._lanes.values():
            if other is not lane and len(other):
                ahead = other.count_before(deadline_s, priority)
                others_ms += other.latency.drain_ms(ahead, other.max_batch)
        if self._residency is not None:
            others_ms += self._residency.extra_ms(self._lanes, model, deadline_s, priority, now_s)
        return forecast(
            lane.latency,
            ahead=lane.count_before(deadline_s, priority),
            others_ms=others_ms,
            residual_ms=self._executor.ready_in_s() * 1e3 + self._runs.left_ms(self._lanes, now_s),
            upload_ms=upload_ms,
            max_batch=lane.max_batch,
            fair_ms=fair_ms,
            recent_batch=self._runs.images,
        )

    @property
    def idle(self) -> bool:
        """Nothing uploads, waits or runs, and a batch could start now."""
        return (
            not self._runs.images
            and self._executor.ready_in_s() == 0.0
            and not any(len(lane) for lane in self._lanes.values())
        )

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
            async with self._in_memory(model):
                await warm_up(lane, self._executor, model, bodies[model], self._clock)

    def start(self) -> asyncio.Task[None]:
        """Begin to run what is submitted. The task ends only by ``close``, or by a bug."""
        self._loop_task = asyncio.create_task(self._feed(), name="scheduler")
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

    async def _feed(self) -> None:
        try:
            async with asyncio.TaskGroup() as batches:
                await self._dispatch(batches)
        finally:
            self._runs.abandon()

    async def _dispatch(self, batches: asyncio.TaskGroup) -> None:
        while True:
            await self._work.wait()
            starts_s = await self._runs.room(self._lanes, self._is_full)
            await self._executor.wait_ready()
            if self._residency is not None:
                await self._residency.prefetch(self._lanes)
            model = self._most_urgent()
            if model is None:
                self._work.clear()
                if self._residency is not None:
                    await self._residency.rest(self._lanes)
                continue
            try:
                async with self._in_memory(model):
                    await self._serve(model, starts_s, batches)
            except NearfarError as error:  # it could not be loaded
                self._fail(model, error)

    def _in_memory(self, model: ModelKey) -> contextlib.AbstractAsyncContextManager[None]:
        """The model loaded for the length of the block. Raises what loading raises."""
        held = self._residency
        return contextlib.nullcontext() if held is None else held.holding(model)

    def _fail(self, model: ModelKey, error: NearfarError) -> None:
        waiting = self._lanes[model].waiting
        self._observer.batch_lost(model, len(waiting))
        while waiting:
            ticket = waiting.pop()
            self._leave(ticket)
            ticket.settle(type(error)(error.detail))

    def _is_full(self) -> bool:
        """Whether the next batch could not grow any more."""
        model = self._most_urgent()
        lane = None if model is None else self._lanes[model]
        return lane is not None and len(lane.waiting) >= lane.max_batch

    async def _serve(self, model: ModelKey, starts_s: float, batches: asyncio.TaskGroup) -> None:
        """Run one batch of a model that is in memory, or have it run where there is room."""
        lane = self._lanes[model]
        formed = form_batch(
            lane.waiting,
            lane.latency,
            now_s=max(starts_s, self._clock()),
            max_batch=lane.max_batch,
            max_bytes=limits.MAX_BATCH_BYTES,
        )
        for ticket in formed.hopeless:
            self._leave(ticket)
            self._runs.dropped(ticket, lane)
            ticket.settle(DeadlineExceeded("the deadline would pass before the answer"))
        for ticket in formed.tickets:
            self._leave(ticket, dispatched=ticket.still_wanted)
        tickets = [ticket for ticket in formed.tickets if ticket.still_wanted]
        if tickets:
            run = self._runs.run(model, lane, tickets, starts_s)
            if self._runs.depth == 1:
                await run
            else:
                batches.create_task(run, name="batch")
                await asyncio.sleep(0)  # it has begun

    def _most_urgent(self) -> ModelKey | None:
        """The model whose head goes first: by class, then by deadline."""
        if self._residency is not None:
            return self._residency.choose(self._lanes, self._clock())
        heads = [
            (head[0], model)
            for model, lane in self._lanes.items()
            if (head := lane.waiting.earliest()) is not None
        ]
        return min(heads)[1] if heads else None
