"""Models behind another server: any that speaks the Open Inference Protocol v2.

This process decodes, normalizes and makes the answers; tensors go there and back. Which
models the other server holds, and in what memory, is its operator's business.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from broker.executors.base import (
    BatchItem,
    BatchOutcome,
    EventSink,
    ExecutorOptions,
    ExecutorStats,
    not_in_memory,
)
from broker.executors.program import TorchProgram, normalization_of
from broker.executors.runtimes.oip import Backend, OipRuntime
from broker.models.servable import ModelKey, OpenedServable
from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    BackendUnavailable,
    ConfigError,
    DeadlineExceeded,
    NearfarError,
    WorkerLost,
)

__all__ = ["OipExecutor"]

_POLL_S: Final = 0.25


class OipExecutor:
    """Runs batches on another server, over one connection and one thread."""

    def __init__(
        self, servables: Sequence[OpenedServable], options: ExecutorOptions, events: EventSink
    ) -> None:
        if options.backend is None:
            raise ConfigError("the executor oip needs the URL of a server: pass --backend URL")
        self._servables = {servable.key: servable for servable in servables}
        self._options = options
        self._events = events
        self._backend = Backend(options.backend, options.backend_key, options.hang_timeout_s)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nearfar-oip")
        self._programs: dict[ModelKey, TorchProgram] = {}
        self._ready = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        self._batches = 0
        self._images = 0
        self._losses = 0

    async def start(self) -> None:
        """Wait for the server, and compare its models with ours.

        Raises ``BackendUnavailable`` when it is not ready in time, ``ModelNotFound`` and
        ``ModelLoadError``.
        """
        limit_s = self._options.start_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._until_ready()
                for model in self._servables:
                    await self.load(model)
        except BaseException as error:
            await self.close()
            if isinstance(error, TimeoutError):
                raise BackendUnavailable(
                    f"the backend was not ready in {limit_s:g} s: start it first"
                ) from None
            raise
        self._ready.set()

    async def _until_ready(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if await loop.run_in_executor(self._thread, self._backend.is_ready):
                return
            await asyncio.sleep(_POLL_S)

    async def run(self, model: ModelKey, batch: Sequence[BatchItem]) -> BatchOutcome:
        """Run one batch there.

        Raises ``WorkerLost`` when the server cannot be reached, ``DeadlineExceeded`` when it
        gives no answer within the hang timeout, and what its status stands for.
        """
        program = self._programs.get(model)
        if program is None:
            return BatchOutcome(results=[not_in_memory(model)] * len(batch))
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._thread, program.run, batch)
        except (WorkerLost, DeadlineExceeded) as error:
            self._lost(error)
            raise
        self._batches += 1
        self._images += len(batch)
        return BatchOutcome(results=results)

    def _lost(self, error: NearfarError) -> None:
        """Run nothing until the server says again that it is ready."""
        self._losses += 1
        self._events("backend_lost", {"text": error.detail})
        self._ready.clear()
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._recover(), name="backend watch")

    async def _recover(self) -> None:
        await self._until_ready()
        self._events("backend_ready", {})
        self._ready.set()

    async def load(self, model: ModelKey) -> None:
        """Ask the server what its model takes and gives. Raises as ``start`` does."""
        if model not in self._programs:
            loop = asyncio.get_running_loop()
            self._programs[model] = await loop.run_in_executor(self._thread, self._connect, model)

    def _connect(self, model: ModelKey) -> TorchProgram:
        servable = self._servables[model]
        runtime = OipRuntime(servable, self._backend)
        program = TorchProgram(servable, runtime, normalization_of(servable), "remote")
        program.cap = limits.MAX_INFER_ROWS
        return program

    async def unload(self, model: ModelKey) -> None:
        """Send the server nothing more for it."""
        program = self._programs.pop(model, None)
        if program is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, program.free)

    def ready_in_s(self) -> float:
        """0 while the server is there; nobody knows when it comes back."""
        return 0.0 if self._ready.is_set() else float("inf")

    async def wait_ready(self) -> None:
        """Return once the server says that it is ready."""
        await self._ready.wait()

    def stats(self) -> ExecutorStats:
        """What it did so far; a loss of the server counts as a restart."""
        return ExecutorStats(
            device="remote",
            ready=self._ready.is_set(),
            batches=self._batches,
            images=self._images,
            restarts=self._losses,
            models={key: program.loaded for key, program in self._programs.items()},
        )

    async def close(self) -> None:
        """Wait for the batch that runs, then drop the connection."""
        self._ready.clear()
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        await asyncio.get_running_loop().run_in_executor(
            None, lambda: self._thread.shutdown(wait=True, cancel_futures=True)
        )
        self._backend.close()
