"""The batches on the executor: started, watched, and their answers handed out.

A batch goes out when the executor is free. Where the executor takes one ahead (``depth_of``), a
full one goes to it shortly before the running one should end, so that the device does not wait
while answers are given out. A batch that is not full waits for the device: it may still grow.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from broker.executors.base import BatchOutcome, Executor
from broker.models.servable import ModelKey
from broker.scheduling.admission import Margin
from broker.scheduling.lane import Lane
from broker.scheduling.observer import Observer
from broker.scheduling.ticket import Answer, Ticket
from edge_runtime.contract.errors import BrokerFault, NearfarError, Overloaded

__all__ = ["SHUTTING_DOWN", "Running", "Runs"]

_LOG = logging.getLogger(__name__)
_LEAD_SHARE: Final = 0.15
_MOST_LEAD_MS: Final = 10.0
"""So long before the expected end of a batch the next one goes out: who comes later is not in it,
however early its deadline."""
SHUTTING_DOWN: Final = "the broker is shutting down: use another one, or answer on the device"


@dataclass(slots=True, eq=False)
class Running:
    """A batch that the executor has."""

    model: ModelKey
    tickets: list[Ticket]
    started_s: float
    """Of one that waits in the executor: when it should begin."""

    @property
    def images(self) -> int:
        """How many are in it."""
        return len(self.tickets)


class Runs:
    """``depth`` batches at most. ``margin`` learns how wrong the forecasts were."""

    def __init__(
        self,
        executor: Executor,
        observer: Observer,
        margin: Margin,
        clock: Callable[[], float],
        depth: int = 1,
    ) -> None:
        self.depth = depth
        self._executor = executor
        self._observer = observer
        self._margin = margin
        self._clock = clock
        self._under_way: deque[Running] = deque()
        self._changed = asyncio.Event()
        self._look_s = math.inf
        """A request that comes earlier changes nothing: no batch can go out yet."""

    @property
    def running(self) -> Running | None:
        """The batch that runs; None: none does."""
        return self._under_way[0] if self._under_way else None

    @property
    def images(self) -> int:
        """Of the batch that went out last; 0: none is under way."""
        return self._under_way[-1].images if self._under_way else 0

    def left_ms(self, lanes: Mapping[ModelKey, Lane], now_s: float) -> float:
        """What is left of the batches under way."""
        if not self._under_way:
            return 0.0
        first, *ahead = self._under_way
        latency = lanes[first.model].latency
        elapsed_ms = (now_s - first.started_s) * 1e3
        left_ms = latency.mean_ms(first.images) - elapsed_ms
        if left_ms < 0:  # overdue: it may be one of the slow ones
            # Beyond those it may hang: what is late is expected to be as late again
            # (Lindy's law: the mean rest of a heavy-tailed duration grows with its age).
            left_ms = abs(latency.high_ms(first.images) - elapsed_ms)
        return left_ms + sum(lanes[one.model].latency.mean_ms(one.images) for one in ahead)

    def wake(self) -> None:
        """One more request waits."""
        if self._clock() >= self._look_s:
            self._changed.set()

    async def room(self, lanes: Mapping[ModelKey, Lane], is_full: Callable[[], bool]) -> float:
        """Return when a batch may go out: when it would start, on the clock.

        ``is_full`` says whether the next one is, as far as can be known.
        """
        while self._under_way:
            timer: asyncio.TimerHandle | None = None
            self._look_s = math.inf
            if len(self._under_way) < self.depth:
                last, now_s = self._under_way[-1], self._clock()
                mean_ms = lanes[last.model].latency.mean_ms(last.images)
                ends_s = last.started_s + mean_ms / 1e3
                self._look_s = ends_s - min(_LEAD_SHARE * mean_ms, _MOST_LEAD_MS) / 1e3
                if now_s < self._look_s:
                    loop = asyncio.get_running_loop()
                    timer = loop.call_later(self._look_s - now_s, self._changed.set)
                elif is_full():
                    return max(now_s, ends_s)
            self._changed.clear()
            try:
                await self._changed.wait()
            finally:
                if timer is not None:
                    timer.cancel()
        return self._clock()

    def abandon(self) -> None:
        """What is under way fails: nobody runs it any more."""
        while self._under_way:
            _settle_all(self._under_way.popleft().tickets, Overloaded(SHUTTING_DOWN))

    async def run(
        self, model: ModelKey, lane: Lane, tickets: list[Ticket], starts_s: float
    ) -> None:
        """Run a batch and settle its tickets, whatever happens; ``lane`` learns from it."""
        batch = Running(model, tickets, max(starts_s, self._clock()))
        self._under_way.append(batch)
        try:
            outcome = await self._executor.run(model, [ticket.item for ticket in tickets])
        except Exception as error:
            self._ended(batch)
            if not isinstance(error, NearfarError):
                _LOG.exception("the executor failed in a way nobody foresaw")
                error = BrokerFault("the broker failed on this batch; it is logged")
            self._observer.batch_lost(model, len(tickets))
            for ticket in tickets:
                ticket.settle(type(error)(error.detail))
            return
        except asyncio.CancelledError:
            self._ended(batch)
            _settle_all(tickets, Overloaded(SHUTTING_DOWN))
            raise
        # The device first: the next batch is looked for before the answers of this one go out.
        now_s = self._ended(batch)
        duration_ms = (now_s - batch.started_s) * 1e3
        answered = sum(not isinstance(result, NearfarError) for result in outcome.results)
        # What failed to decode did not go through the model.
        if answered and not outcome.interrupted:
            lane.latency.observe(answered, duration_ms, now_s)
        if outcome.interrupted:
            self._observer.batch_interrupted(
                model, len(tickets), duration_ms, at_fault=outcome.at_fault
            )
        else:
            self._observer.batch_ran(model, len(tickets), duration_ms)
        self._give_out(batch, outcome, duration_ms, now_s)

    def dropped(self, ticket: Ticket, lane: Lane) -> None:
        """An admitted request left the queue of ``lane`` unanswered, as it would be late."""
        self._observer.dropped(ticket.model)
        if not ticket.uploaded_late:
            # It would have come at the earliest now, alone.
            finish_s = self._clock() + lane.latency.mean_ms(1) / 1e3
            error_ms = (finish_s - ticket.predicted_finish_s) * 1e3
            self._margin.observe(ticket.left_at_admission_ms, error_ms)

    def _ended(self, batch: Running) -> float:
        """When it did; what waits behind it in the executor begins."""
        now_s = self._clock()
        if batch in self._under_way:
            ran = self._under_way[0] is batch
            self._under_way.remove(batch)
            if ran and self._under_way:
                self._under_way[0].started_s = now_s
        self._changed.set()
        return now_s

    def _give_out(
        self, batch: Running, outcome: BatchOutcome, duration_ms: float, now_s: float
    ) -> None:
        for ticket, result in zip(batch.tickets, outcome.results, strict=True):
            if not ticket.uploaded_late and not outcome.interrupted:
                error_ms = (now_s - ticket.predicted_finish_s) * 1e3
                self._margin.observe(ticket.left_at_admission_ms, error_ms)
            if isinstance(result, NearfarError):
                ticket.settle(result)
                continue
            queue_ms = (batch.started_s - ticket.queued_s) * 1e3
            ticket.settle(Answer(result, queue_ms=queue_ms, inference_ms=duration_ms))


def _settle_all(tickets: list[Ticket], error: NearfarError) -> None:
    for ticket in tickets:
        ticket.settle(error)
