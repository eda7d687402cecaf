"""The batch on the executor: started, watched, and its answers handed out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from broker.executors.base import Executor
from broker.models.servable import ModelKey
from broker.scheduling.admission import Margin
from broker.scheduling.lane import Lane
from broker.scheduling.observer import Observer
from broker.scheduling.ticket import Answer, Ticket
from edge_runtime.contract.errors import BrokerFault, NearfarError, Overloaded

__all__ = ["SHUTTING_DOWN", "Running", "Runs"]

_LOG = logging.getLogger(__name__)
SHUTTING_DOWN: Final = "the broker is shutting down: use another one, or answer on the device"


@dataclass(frozen=True, slots=True)
class Running:
    """A batch on the executor."""

    model: ModelKey
    images: int
    started_s: float


class Runs:
    """One batch after the other. ``margin`` learns how wrong the forecasts were."""

    def __init__(
        self,
        executor: Executor,
        observer: Observer,
        margin: Margin,
        clock: Callable[[], float],
    ) -> None:
        self._executor = executor
        self._observer = observer
        self._margin = margin
        self._clock = clock
        self.running: Running | None = None
        """None: none does."""

    @property
    def images(self) -> int:
        """Of the batch that runs; 0: none does."""
        return 0 if self.running is None else self.running.images

    def left_ms(self, lanes: Mapping[ModelKey, Lane], now_s: float) -> float:
        """What is left of the running batch."""
        if self.running is None:
            return 0.0
        latency = lanes[self.running.model].latency
        elapsed_ms = (now_s - self.running.started_s) * 1e3
        left_ms = latency.mean_ms(self.running.images) - elapsed_ms
        if left_ms < 0:  # overdue: it may be one of the slow ones
            # Beyond those it may hang: what is late is expected to be as late again
            # (Lindy's law: the mean rest of a heavy-tailed duration grows with its age).
            left_ms = abs(latency.high_ms(self.running.images) - elapsed_ms)
        return left_ms

    async def run(self, model: ModelKey, lane: Lane, tickets: list[Ticket]) -> None:
        """Run a batch and settle its tickets, whatever happens; ``lane`` learns from it."""
        started_s = self._clock()
        self.running = Running(model, len(tickets), started_s)
        batch = [ticket.item for ticket in tickets]
        try:
            outcome = await self._executor.run(model, batch)
        except Exception as error:
            if not isinstance(error, NearfarError):
                _LOG.exception("the executor failed in a way nobody foresaw")
                error = BrokerFault("the broker failed on this batch; it is logged")
            self._observer.batch_lost(model, len(tickets))
            for ticket in tickets:
                ticket.settle(type(error)(error.detail))
            return
        except asyncio.CancelledError:
            for ticket in tickets:
                ticket.settle(Overloaded(SHUTTING_DOWN))
            raise
        finally:
            self.running = None
        now_s = self._clock()
        duration_ms = (now_s - started_s) * 1e3
        self._observer.batch_ran(model, len(tickets), duration_ms)
        answered = 0
        for ticket, result in zip(tickets, outcome.results, strict=True):
            if not ticket.uploaded_late and not outcome.interrupted:
                error_ms = (now_s - ticket.predicted_finish_s) * 1e3
                self._margin.observe(ticket.left_at_admission_ms, error_ms)
            if isinstance(result, NearfarError):
                ticket.settle(result)
                continue
            answered += 1
            queue_ms = (started_s - ticket.queued_s) * 1e3
            ticket.settle(Answer(result, queue_ms=queue_ms, inference_ms=duration_ms))
        # What failed to decode did not go through the model.
        if answered and not outcome.interrupted:
            lane.latency.observe(answered, duration_ms, now_s)
