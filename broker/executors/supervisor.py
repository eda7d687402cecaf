"""Keeps one worker process running, with its models loaded, whatever happens to it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Iterable
from typing import Literal

from broker.executors import frames
from broker.executors.base import EventSink, ExecutorOptions, LoadedModel
from broker.executors.nursery import Child, Nursery, exit_text
from broker.models.servable import ModelKey, OpenedServable
from edge_runtime.contract.errors import ModelLoadError, WireError, error_from_code

__all__ = ["Supervisor"]

_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 10.0
_FAREWELL_S = 1.0


class Supervisor:
    """Starts a worker again whenever it ends. Used from one event loop.

    The first restart after good work comes at once, later ones ever more slowly.
    """

    def __init__(
        self, servables: Iterable[OpenedServable], options: ExecutorOptions, events: EventSink
    ) -> None:
        self.servables = {servable.key: servable for servable in servables}
        """What a worker loads at its start."""
        self.loaded: dict[ModelKey, LoadedModel] = {}
        """What the worker said about each model."""
        self.caps: dict[ModelKey, int] = {}
        """Batch sizes beyond which a model ran out of memory."""
        self.device: Literal["auto", "cpu", "cuda"] = options.device
        self.restarts = 0
        self.worked = False
        """Whether the present worker answered a batch: set by whoever gives it work."""
        self.ready = asyncio.Event()
        self.child: Child | None = None
        self._options = options
        self._events = events
        self._nursery = Nursery(self._printed)
        self._task: asyncio.Task[None] | None = None
        self._failing = False
        self._started_s = 0.0
        self._load_s: float | None = None

    async def start(self) -> None:
        """Start the first worker and wait until it has loaded everything.

        Raises what it reports, or ``ModelLoadError``; nothing is left running then.
        """
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._supervise(first), name="worker supervisor")
        try:
            await first
        except BaseException:
            await self.close()
            raise

    async def _supervise(self, first: asyncio.Future[None]) -> None:
        """Keep one child running until cancelled; no child is left then."""
        backoff_s = 0.0
        while True:
            self.worked = False
            try:
                async with self._running_child() as child:
                    await self._load(child)
                    self.ready.set()
                    self._failing = False
                    if not first.done():
                        first.set_result(None)
                    self._events("worker_ready", {"pid": child.pid, "device": self.device})
                    await child.wait()
            except Exception as error:  # of ours, or the system's (no memory, no process)
                if not first.done():
                    first.set_exception(error)
                    return
                self._failing = True
                self._events("worker_failed", {"error": type(error).__name__, "text": str(error)})
            finally:
                self.ready.clear()
            self.restarts += 1
            if self.worked:
                backoff_s = 0.0
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311  # jitter
            backoff_s = min(max(2 * backoff_s, _FIRST_BACKOFF_S), _MAX_BACKOFF_S)

    @contextlib.asynccontextmanager
    async def _running_child(self) -> AsyncIterator[Child]:
        """A worker that is dead and reaped when the block ends."""
        self._started_s = time.monotonic()
        limit_s = self._options.start_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                child = await self._nursery.spawn()
        except TimeoutError:
            raise ModelLoadError(f"no worker process started in {limit_s:g} s") from None
        except ConnectionError:
            raise ModelLoadError(
                "the process that starts workers ended: see worker_stderr in the log"
            ) from None
        self.child = child
        try:
            yield child
        finally:
            self.ready.clear()
            self.child = None
            status = await child.end(_FAREWELL_S)
            self._events("worker_exited", {"pid": child.pid, "exit": exit_text(status)})

    async def _load(self, child: Child) -> None:
        """Have the child load the models. Raises what the child reports, or its death."""
        options = self._options
        load = frames.Load(
            servables=tuple(frames.ref_of(one) for one in self.servables.values()),
            device=options.device,
            threads=options.threads,
            runtime=options.runtime,
            precision=options.precision,
            calibration=options.calibration,
            caps=tuple(self.caps.items()),
            known=tuple(self.loaded.items()),
        )
        limit_s = options.start_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await child.send(load)
                answer = await child.receive()
        except TimeoutError:
            raise ModelLoadError(f"the worker did not load its models in {limit_s:g} s") from None
        except (ConnectionError, asyncio.IncompleteReadError):
            raise ModelLoadError(
                f"the worker died while it loaded its models ({exit_text(await child.wait())}): "
                "see worker_stderr in the log"
            ) from None
        if isinstance(answer, frames.Failed):
            raise error_from_code(answer.code, answer.detail)
        if not isinstance(answer, frames.Ready):
            raise WireError("the worker answered Load with something else than Ready")
        self.device = "cuda" if answer.device == "cuda" else "cpu"
        self.loaded = dict(answer.models)
        self._load_s = time.monotonic() - self._started_s

    def _printed(self, pid: int, line: str) -> None:
        """What a worker prints becomes events, one a line."""
        self._events("worker_stderr", {"pid": pid, "line": line})

    def abandon(self, child: Child) -> None:
        """Kill a child that is lost; another one starts."""
        self.ready.clear()
        child.kill()

    def ready_in_s(self) -> float:
        """0 when ready; else what is left of the time that loading took before.

        Infinity before the first start, after ``close``, and when the last start failed.
        """
        if self.ready.is_set():
            return 0.0
        if self._load_s is None or self._failing or self._task is None:
            return float("inf")
        elapsed_s = time.monotonic() - self._started_s
        return max(self._load_s - elapsed_s, 0.05) if self.child else self._load_s

    async def close(self) -> None:
        """Stop; the worker and the process that forks workers are gone when this returns."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        await self._nursery.close()
