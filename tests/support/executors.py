"""An executor with a known cost: a simulated device, for tests of scheduling alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from broker.executors.base import BatchItem, BatchOutcome, ExecutorStats
from broker.models.servable import ModelKey
from edge_runtime.contract.errors import NearfarError
from edge_runtime.contract.tasks import Prediction
from edge_runtime.contract.wire import EncodedAnswer


class SleepExecutor:
    """Takes ``fixed_ms + images * image_ms`` a batch, and answers each image with its bytes."""

    def __init__(self, fixed_ms: float = 1.0, image_ms: float = 0.0) -> None:
        self.fixed_ms = fixed_ms
        self.image_ms = image_ms
        self.batches: list[tuple[str, list[bytes]]] = []
        self.fail_next: Exception | None = None
        self.interrupt_next = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def start(self) -> None:
        pass

    async def run(self, model: ModelKey, batch: Sequence[BatchItem]) -> BatchOutcome:
        self.batches.append((model.name, [item.body for item in batch]))
        await self.gate.wait()
        await asyncio.sleep((self.fixed_ms + len(batch) * self.image_ms) / 1e3)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        results = [self._answer(item.body) for item in batch]
        interrupted, self.interrupt_next = self.interrupt_next, False
        return BatchOutcome(results=results, interrupted=interrupted)

    def _answer(self, body: bytes) -> EncodedAnswer | NearfarError:
        label = body.decode("latin-1")
        return EncodedAnswer(predictions=(Prediction(index=0, label=label, score=1.0),))

    async def load(self, model: ModelKey) -> None:
        pass

    async def unload(self, model: ModelKey) -> None:
        pass

    def ready_in_s(self) -> float:
        return 0.0

    async def wait_ready(self) -> None:
        pass

    def stats(self) -> ExecutorStats:
        return ExecutorStats(device="cpu", ready=True)

    async def close(self) -> None:
        pass
