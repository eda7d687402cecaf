"""What the scheduler knows of one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from broker.executors.base import BatchItem, Executor
from broker.models.servable import ModelKey
from broker.scheduling.latency import LatencyModel
from broker.scheduling.queue import EdfQueue
from broker.scheduling.ticket import Ticket
from edge_runtime.contract.errors import ModelLoadError, NearfarError

__all__ = ["Lane", "warm_up"]

_WARM_UP_BUDGET_MS = 2_000.0


@dataclass(slots=True)
class Lane:
    """T(b) of one model, and who uploads or waits for it."""

    max_batch: int
    latency: LatencyModel = field(default_factory=LatencyModel)
    uploading: EdfQueue[Ticket] = field(default_factory=EdfQueue)
    waiting: EdfQueue[Ticket] = field(default_factory=EdfQueue)

    def __len__(self) -> int:
        return len(self.uploading) + len(self.waiting)

    def count_before(self, deadline_s: float, priority: int) -> int:
        """How many go before one of this deadline and class."""
        uploading = self.uploading.count_before(deadline_s, priority)
        return uploading + self.waiting.count_before(deadline_s, priority)

    @property
    def work_ms(self) -> float:
        """What one request takes of a full batch."""
        return self.latency.mean_ms(self.max_batch) / self.max_batch


async def warm_up(
    lane: Lane, executor: Executor, model: ModelKey, body: bytes, clock: Callable[[], float]
) -> None:
    """Run batches of 1, 2, 4, ... and the largest, so that T(b) is known before any request.

    Sizes that would take over two seconds are left to real requests. Raises ``ModelLoadError``
    when the model cannot answer ``body``.
    """
    item = BatchItem(body)

    async def measure(size: int) -> float:
        started_s = clock()
        outcome = await executor.run(model, [item] * size)
        now_s = clock()
        for result in outcome.results:
            if isinstance(result, NearfarError):
                raise ModelLoadError(
                    f"{model.name!r} loads but fails on a plain request: {result.detail}"
                )
        duration_ms = (now_s - started_s) * 1e3
        lane.latency.observe(size, duration_ms, now_s)
        return duration_ms

    remembered = lane.latency
    lane.latency = LatencyModel()
    await measure(1)
    lane.latency = remembered  # the first run pays for caches and allocations: it counts nowhere
    size, duration_ms = 1, await measure(1)
    while size < lane.max_batch and 2 * duration_ms <= _WARM_UP_BUDGET_MS:
        size = min(2 * size, lane.max_batch)
        duration_ms = await measure(size)
