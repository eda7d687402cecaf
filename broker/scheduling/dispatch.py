"""The loop that feeds one executor.

It pulls: a batch is formed each time the executor is free, of the model whose earliest deadline
comes first. Where the executor takes one batch ahead (its ``depth`` is 2), a full one goes to it
shortly before the running one should end, so that the device does not wait while its answers
are given out. A batch that is not full waits for the device: it may still grow.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from broker.executors.base import BatchOutcome, Executor, depth_of
from broker.models.servable import ModelKey
from broker.scheduling.admission import Margin
from broker.scheduling.batcher import form_batch
from broker.scheduling.lane import Lane
from broker.scheduling.observer import Observer
from broker.scheduling.shares import Shares
from broker.scheduling.ticket import Answer, Ticket
from edge_runtime.contract import limits
from edge_runtime.contract.errors import BrokerFault, DeadlineExceeded, NearfarError, Overloaded

__all__ = ["SHUTTING_DOWN", "Dispatcher", "UnderWay"]

_LOG = logging.getLogger(__name__)
_LEAD_SHARE = 0.15
_MOST_LEAD_MS = 10.0
"""So long before the expected end of a batch the next one goes out: who comes later is not in it,
however early its deadline."""
SHUTTING_DOWN = "the broker is shutting down: use another one, or answer on the device"


@dataclass(slots=True, eq=False)
class UnderWay:
    """A batch that the executor has."""

    model: ModelKey
    tickets: list[Ticket]
    starts_s: float
    """When it began; of one that waits in the executor, when it should."""


class Dispatcher:
    """Feeds one executor from ``lanes``. ``clock`` is the event loop's, in seconds."""

    def __init__(
        self,
        executor: Executor,
        lanes: Mapping[ModelKey, Lane],
        observer: Observer,
        *,
        margin: Margin,
        shares: Shares,
        clock: Callable[[], float],
    ) -> None:
        self.under_way: deque[UnderWay] = deque()
        """The first one runs; another one waits in the executor."""
        self._executor = executor
        self._depth = depth_of(executor)
        self._lanes = lanes
        self._observer = observer
        self._margin = margin
        self._shares = shares
        self._clock = clock
        self._changed = asyncio.Event()
        self._look_s = -math.inf
        """A request that comes earlier changes nothing: no batch can go out yet."""
        self._timer: asyncio.TimerHandle | None = None

    def wake(self) -> None:
        """One more request waits."""
        if self._clock() >= self._look_s:
            self._changed.set()

    @property
    def idle(self) -> bool:
        """Whether a batch would start at once."""
        return not self.under_way and self._executor.ready_in_s() == 0.0

    def residual_ms(self, now_s: float) -> float:
        """What is left of the batches under way, and of the executor's start."""
        residual_ms = self._executor.ready_in_s() * 1e3
        for place, batch in enumerate(self.under_way):
            latency, images = self._lanes[batch.model].latency, len(batch.tickets)
            if place:
                residual_ms += latency.mean_ms(images)
                continue
            elapsed_ms = (now_s - batch.starts_s) * 1e3
            left_ms = latency.mean_ms(images) - elapsed_ms
            if left_ms < 0:  # overdue: it may be one of the slow ones
                left_ms = max(latency.high_ms(images) - elapsed_ms, 0.0)
            residual_ms += left_ms
        return residual_ms

    def leave(self, ticket: Ticket, *, dispatched: bool = False) -> None:
        """It waits no more: its work leaves the account, once."""
        flow, ticket.flow = ticket.flow, None
        if flow is None:
            return
        if dispatched:
            self._shares.dispatch(flow.priority, ticket.work_ms)
        else:
            self._shares.leave(flow, ticket.work_ms)

    def dropped(self, ticket: Ticket) -> None:
        """An admitted request left the queue unanswered, as it would be late."""
        self._observer.dropped(ticket.model)
        if not ticket.uploaded_late:
            # It would have come at the earliest now, alone.
            finish_s = self._clock() + self._lanes[ticket.model].latency.mean_ms(1) / 1e3
            error_ms = (finish_s - ticket.predicted_finish_s) * 1e3
            self._margin.observe(ticket.left_at_admission_ms, error_ms)

    async def feed(self) -> None:
        """Run what waits, until canceled; what is under way then fails with ``Overloaded``."""
        try:
            async with asyncio.TaskGroup() as runs:
                while True:
                    await self._changed.wait()
                    await self._executor.wait_ready()
                    self._changed.clear()
                    self._dispatch(runs)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            while self.under_way:
                for ticket in self.under_way.popleft().tickets:
                    ticket.settle(Overloaded(SHUTTING_DOWN))

    def _dispatch(self, runs: asyncio.TaskGroup) -> None:
        """Hand out what can go now."""
        while (place := self._next_place()) is not None:
            model, starts_s = place
            lane = self._lanes[model]
            formed = form_batch(
                lane.waiting,
                lane.latency,
                now_s=starts_s,
                max_batch=lane.max_batch,
                max_bytes=limits.MAX_BATCH_BYTES,
            )
            for ticket in formed.hopeless:
                self.leave(ticket)
                self.dropped(ticket)
                ticket.settle(DeadlineExceeded("the deadline would pass before the answer"))
            for ticket in formed.tickets:
                self.leave(ticket, dispatched=ticket.still_wanted)
            tickets = [ticket for ticket in formed.tickets if ticket.still_wanted]
            if tickets:
                batch = UnderWay(model, tickets, starts_s)
                self.under_way.append(batch)
                runs.create_task(self._run(batch, lane, runs), name="batch")

    def _next_place(self) -> tuple[ModelKey, float] | None:
        """The model whose turn it is, and when its batch would start; None: it is not time yet."""
        now_s = starts_s = self._clock()
        self._look_s = -math.inf
        if self.under_way:
            self._look_s = math.inf
            if len(self.under_way) >= self._depth:
                return None  # the end of a batch looks again
            last = self.under_way[-1]
            mean_ms = self._lanes[last.model].latency.mean_ms(len(last.tickets))
            ends_s = last.starts_s + mean_ms / 1e3
            self._look_s = ends_s - min(_LEAD_SHARE * mean_ms, _MOST_LEAD_MS) / 1e3
            if now_s < self._look_s:
                self._look_again()
                return None
            starts_s = max(now_s, ends_s)
        model = self._most_urgent()
        if model is None:
            return None
        lane = self._lanes[model]
        if self.under_way and len(lane.waiting) < lane.max_batch:
            return None
        return model, starts_s

    def _look_again(self) -> None:
        if self._timer is None:
            left_s = self._look_s - self._clock()
            self._timer = asyncio.get_running_loop().call_later(left_s, self._time_to_look)

    def _time_to_look(self) -> None:
        self._timer = None
        self._changed.set()

    def _most_urgent(self) -> ModelKey | None:
        """The model whose head goes first: by class, then by deadline."""
        heads = [
            (head[0], model)
            for model, lane in self._lanes.items()
            if (head := lane.waiting.earliest()) is not None
        ]
        return min(heads)[1] if heads else None

    async def _run(self, batch: UnderWay, lane: Lane, runs: asyncio.TaskGroup) -> None:
        model, tickets = batch.model, batch.tickets
        try:
            outcome = await self._executor.run(model, [ticket.item for ticket in tickets])
        except Exception as error:
            self._ended(batch, self._clock())
            self._changed.set()
            if not isinstance(error, NearfarError):
                _LOG.exception("the executor failed in a way nobody foresaw")
                error = BrokerFault("the broker failed on this batch; it is logged")
            self._observer.batch_lost(model, len(tickets))
            for ticket in tickets:
                ticket.settle(type(error)(error.detail))
            return
        now_s = self._clock()
        self._ended(batch, now_s)
        answered = sum(not isinstance(result, NearfarError) for result in outcome.results)
        if answered:  # what failed to decode did not go through the model
            lane.latency.observe(answered, (now_s - batch.starts_s) * 1e3, now_s)
        # The device first: the next batch goes out before the answers of this one do.
        if self._executor.ready_in_s() == 0.0:
            self._dispatch(runs)
        else:
            self._changed.set()
        self._give_out(batch, outcome, now_s)

    def _ended(self, batch: UnderWay, now_s: float) -> None:
        ran = self.under_way[0] is batch
        self.under_way.remove(batch)
        if ran and self.under_way:
            self.under_way[0].starts_s = now_s

    def _give_out(self, batch: UnderWay, outcome: BatchOutcome, now_s: float) -> None:
        duration_ms = (now_s - batch.starts_s) * 1e3
        self._observer.batch_ran(batch.model, len(batch.tickets), duration_ms)
        for ticket, result in zip(batch.tickets, outcome.results, strict=True):
            if not ticket.uploaded_late:
                error_ms = (now_s - ticket.predicted_finish_s) * 1e3
                self._margin.observe(ticket.left_at_admission_ms, error_ms)
            if isinstance(result, NearfarError):
                ticket.settle(result)
                continue
            queue_ms = (batch.starts_s - ticket.queued_s) * 1e3
            ticket.settle(Answer(result, queue_ms=queue_ms, inference_ms=duration_ms))
