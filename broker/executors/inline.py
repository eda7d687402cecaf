"""Models in this process, on one thread: for embedding and for tests.

Cheaper to start than a worker, and less safe: a crash of the model is a crash of the
broker, and a model that hangs cannot be stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from broker.executors.base import (
    BatchItem,
    BatchOutcome,
    EventSink,
    ExecutorOptions,
    ExecutorStats,
    not_in_memory,
)
from broker.models.servable import ModelKey, OpenedServable

if TYPE_CHECKING:
    from broker.executors.program import TorchProgram

__all__ = ["InlineExecutor"]


class InlineExecutor:
    """Runs batches on a thread of its own."""

    def __init__(
        self, servables: Sequence[OpenedServable], options: ExecutorOptions, events: EventSink
    ) -> None:
        self._servables = {servable.key: servable for servable in servables}
        self._options = options
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nearfar-inline")
        self._programs: dict[ModelKey, TorchProgram] = {}
        self._unwanted: set[ModelKey] = set()
        """Unloaded before the start."""
        self._device = options.device
        self._started = False
        self._batches = 0
        self._images = 0

    async def start(self) -> None:
        """Import torch and load the models, on the thread."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        except BaseException:
            self._thread.shutdown(wait=False)
            raise

    def _load(self) -> None:
        from broker.executors.device import pick_device, use_threads

        device = pick_device(self._options.device)
        use_threads(self._options.threads)
        self._device = "cuda" if device == "cuda" else "cpu"
        for model in self._servables:
            if model not in self._unwanted:
                self._load_one(model)
        self._started = True

    async def run(self, model: ModelKey, batch: Sequence[BatchItem]) -> BatchOutcome:
        """Run one batch on the thread."""
        program = self._programs.get(model)
        if program is None:
            return BatchOutcome(results=[not_in_memory(model)] * len(batch))
        loop = asyncio.get_running_loop()
        results = await loop.run_in_executor(self._thread, program.run, batch)
        self._batches += 1
        self._images += len(batch)
        return BatchOutcome(results=results)

    async def load(self, model: ModelKey) -> None:
        """Load a model again, on the thread."""
        if model not in self._programs:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, self._load_one, model)

    def _load_one(self, model: ModelKey) -> None:
        from broker.executors.program import TorchProgram

        options = self._options
        self._programs[model] = TorchProgram.load(
            self._servables[model],
            self._device,
            runtime=options.runtime,
            precision=options.precision,
            calibration=options.calibration,
            threads=options.threads,
        )

    async def unload(self, model: ModelKey) -> None:
        """Free a model, on the thread; before ``start``, keep it from being loaded."""
        if not self._started:
            self._unwanted.add(model)
        program = self._programs.pop(model, None)
        if program is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, program.free)

    def ready_in_s(self) -> float:
        """0 once started."""
        return 0.0 if self._started else float("inf")

    async def wait_ready(self) -> None:
        """Nothing to wait for once ``start`` has returned."""

    def stats(self) -> ExecutorStats:
        """What it did so far."""
        return ExecutorStats(
            device=self._device,
            ready=self.ready_in_s() == 0.0,
            batches=self._batches,
            images=self._images,
            models={key: program.loaded for key, program in self._programs.items()},
        )

    async def close(self) -> None:
        """Wait for the batch that runs, then drop the models."""
        await asyncio.get_running_loop().run_in_executor(
            None, lambda: self._thread.shutdown(wait=True, cancel_futures=True)
        )
        self._programs.clear()
