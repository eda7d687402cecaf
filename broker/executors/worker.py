"""Models in a process of their own, which may crash or hang without taking the broker along.

A supervisor starts the process again whenever it ends. The batch that it took along is run
again, one request at a time, so that the request which ended it is found: that one is
answered with an error and not taken again, the others get their answers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Final

from broker.executors import frames
from broker.executors.base import (
    BatchItem,
    BatchOutcome,
    EventSink,
    ExecutorOptions,
    ExecutorStats,
    Outcome,
)
from broker.executors.nursery import Child
from broker.executors.quarantine import Quarantine
from broker.executors.supervisor import Supervisor
from broker.executors.watchdog import Watchdog
from broker.models.servable import ModelKey, OpenedServable
from edge_runtime.contract.errors import WireError, WorkerLost, error_from_code

__all__ = ["WorkerExecutor"]

_RECOVERY_S: Final = 10.0
"""How long the requests of a lost batch may hold up the others."""
_STRIKES: Final = 2
_STRIKES_KILLED: Final = 3
"""Losses that a request must have seen, the last of them alone, to count as their cause. A
SIGKILL may come from outside, so it takes one more."""
_SIGKILL: Final = -9


class _Lost(WorkerLost):
    """One batch was lost, with how suspect its requests are."""

    def __init__(self, detail: str, *, killed: bool = False, hung: bool = False) -> None:
        super().__init__(detail)
        self.killed = killed
        """By somebody else, as far as can be told."""
        self.hung = hung


class WorkerExecutor:
    """Runs batches in one supervised child process."""

    depth = 2
    """A second batch waits with the child while the first one runs."""

    def __init__(
        self, servables: Sequence[OpenedServable], options: ExecutorOptions, events: EventSink
    ) -> None:
        self._servables = {servable.key: servable for servable in servables}
        self._supervisor = Supervisor(servables, options, events)
        self._options = options
        self._events = events
        self._quarantine = Quarantine()
        self._watchdog = Watchdog(options.hang_timeout_s)
        self._turn = asyncio.Lock()
        self._in_line = 0
        """Who waits for the turn."""
        self._smooth: Child | None = None
        """Who runs the batch whose turn it is, while nothing went wrong with it."""
        self._batches = 0
        self._images = 0
        self._lost = 0
        """Batches whose child died or hung."""
        self._crashed = 0
        """Attempts whose child died or hung, and was not killed by somebody else."""

    async def start(self) -> None:
        """Start the child and wait until it has loaded everything."""
        await self._supervisor.start()

    async def run(self, model: ModelKey, batch: Sequence[BatchItem]) -> BatchOutcome:
        """Run one batch in the child. Raises ``WorkerLost`` when none can run.

        When the child dies or hangs meanwhile, its requests run again one by one; the one
        that ends the child again is answered ``RequestRejected``, now and later. What has no
        answer after ten seconds of that is answered ``WorkerLost``.
        """
        results: dict[int, Outcome] = {}
        for row, item in enumerate(batch):
            refusal = self._quarantine.refusal(model, item)
            if refusal is not None:
                results[row] = refusal
        rows = [row for row in range(len(batch)) if row not in results]
        interrupted = at_fault = False
        if rows:
            items = [batch[row] for row in rows]
            sent_to = self._send_ahead(model, items)
            async with self._my_turn(sent_to):
                lost_before, crashed_before = self._lost, self._crashed
                given = await self._run(model, items, sent_to)
                # Also where it was sent ahead to a child that died before its turn.
                resent = sent_to is not None and sent_to is not self._supervisor.child
                interrupted = resent or self._lost != lost_before
                at_fault = self._crashed != crashed_before
            results |= zip(rows, given, strict=True)
        ordered = [results[row] for row in range(len(batch))]
        return BatchOutcome(results=ordered, interrupted=interrupted, at_fault=at_fault)

    def _send_ahead(self, model: ModelKey, items: Sequence[BatchItem]) -> Child | None:
        """Send a batch behind the one that runs, where nobody stands between; to whom, if so.

        The child answers in the order of its frames: so no step may come between this and
        standing in line.
        """
        child = self._supervisor.child
        if child is None or child is not self._smooth or self._in_line:
            return None
        child.put(frames.RunBatch(model=model, items=tuple(items)))
        return child

    @contextlib.asynccontextmanager
    async def _my_turn(self, sent_to: Child | None = None) -> AsyncIterator[None]:
        self._in_line += 1
        try:
            await self._turn.acquire()
        except asyncio.CancelledError:
            if sent_to is not None:
                self._supervisor.abandon(sent_to)  # its answer would be taken for another's
            raise
        finally:
            self._in_line -= 1
        try:
            yield
        finally:
            self._smooth = None
            self._turn.release()

    async def _run(
        self, model: ModelKey, items: Sequence[BatchItem], sent_to: Child | None
    ) -> Sequence[Outcome]:
        if sent_to is not None and not self._supervisor.ready.is_set():
            # It stood in line while the batch before it ended the child.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(_RECOVERY_S, self._supervisor.ready_in_s())):
                    await self._ready_child()
        child = self._supervisor.child
        if child is None or not self._supervisor.ready.is_set():
            raise WorkerLost("the model's process is starting again: ask again shortly")
        limit_s = self._limit_s(model, items)
        try:
            # What was sent to another child than this one died with it, before its turn.
            return await self._attempt(child, model, items, limit_s, sent=sent_to is child)
        except _Lost as lost:
            self._smooth = None
            self._lost += 1
            self._crashed += not lost.killed
            self._events("batch_lost", {"model": model.name, "images": len(items)})
            return await self._one_by_one(model, items, lost)

    async def _one_by_one(
        self, model: ModelKey, items: Sequence[BatchItem], lost: _Lost
    ) -> list[Outcome]:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + max(_RECOVERY_S, self._supervisor.ready_in_s())
        results: list[Outcome] = []
        for item in items:
            strikes, outcome = 1, None
            while outcome is None and loop.time() < end_s:
                try:
                    async with asyncio.timeout_at(end_s):
                        child = await self._ready_child()
                except TimeoutError:
                    break
                limit_s, left_s = self._limit_s(model, [item]), end_s - loop.time()
                try:
                    (outcome,) = await self._attempt(child, model, [item], min(limit_s, left_s))
                except _Lost as again:
                    if again.hung and left_s < limit_s:
                        break  # it had less time than it may take: nothing is proved
                    strikes += 1
                    self._crashed += not again.killed
                    if strikes >= (_STRIKES_KILLED if again.killed else _STRIKES):
                        outcome = self._quarantine.add(model, item)
                        self._events(
                            "request_quarantined",
                            {"model": model.name, "bytes": len(item.body), "text": again.detail},
                        )
            results.append(outcome or WorkerLost(lost.detail))
        return results

    async def _ready_child(self) -> Child:
        while True:
            await self._supervisor.ready.wait()
            if self._supervisor.child is not None:
                return self._supervisor.child
            await asyncio.sleep(0)

    def _limit_s(self, model: ModelKey, items: Sequence[BatchItem]) -> float:
        return self._watchdog.limit_s(model, len(items))

    async def _attempt(
        self,
        child: Child,
        model: ModelKey,
        items: Sequence[BatchItem],
        limit_s: float,
        *,
        sent: bool | None = None,
    ) -> Sequence[Outcome]:
        """One batch, once. Raises ``_Lost``; the child is gone then.

        ``sent``: whether the child has it already; None: nor may another one follow it.
        """
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        answer: frames.FromWorker = frames.Progress()
        try:
            async with asyncio.timeout(limit_s) as watchdog:
                if not sent:
                    child.put(frames.RunBatch(model=model, items=tuple(items)))
                self._smooth = None if sent is None else child
                await child.drain()
                while isinstance(answer, frames.Progress):
                    answer = await child.receive()
                    watchdog.reschedule(loop.time() + limit_s)
        except TimeoutError:
            self._supervisor.abandon(child)
            raise _Lost(
                f"the model gave no sign of life for {limit_s:.3g} s and was stopped: ask again",
                hung=True,
            ) from None
        except (ConnectionError, asyncio.IncompleteReadError, WireError):
            self._supervisor.abandon(child)
            status = await child.wait()
            raise _Lost(
                "the model's process died during this batch: ask again",
                killed=status is None or status == _SIGKILL,
            ) from None
        except asyncio.CancelledError:
            self._supervisor.abandon(child)  # half a conversation: the next batch would read on
            raise
        if not isinstance(answer, frames.BatchDone) or len(answer.results) != len(items):
            self._supervisor.abandon(child)
            raise _Lost("the model's process gave another answer than asked: ask again")
        self._note(model, answer, len(items), loop.time() - started_s)
        return [frames.result_of(result) for result in answer.results]

    def _note(self, model: ModelKey, done: frames.BatchDone, images: int, took_s: float) -> None:
        self._supervisor.worked = True
        self._watchdog.observe(model, images, took_s)
        self._batches += 1
        self._images += images
        if done.cap is not None and self._supervisor.caps.get(model) != done.cap:
            self._supervisor.caps[model] = done.cap
            self._events("batch_cap_learned", {"model": model.name, "images": done.cap})

    async def load(self, model: ModelKey) -> None:
        """Bring a model back into the child's memory; nothing changes where it is there.

        Raises ``ModelLoadError``, ``ManifestError`` or ``WorkerLost``.
        """
        if model in self._supervisor.servables:
            return
        servable = self._servables[model]
        async with self._my_turn():
            ref = frames.ref_of(servable)
            answer = await self._control(frames.LoadModel(servable=ref))
            if isinstance(answer, frames.Failed):
                raise error_from_code(answer.code, answer.detail)
            self._supervisor.loaded |= dict(answer.models)
            self._supervisor.servables[model] = servable

    async def unload(self, model: ModelKey) -> None:
        """Free a model's memory in the child; later starts do not load it.

        Raises ``WorkerLost``; the model is not loaded again all the same.
        """
        if self._supervisor.servables.pop(model, None) is None:
            return
        self._watchdog.forget(model)
        self._supervisor.loaded.pop(model, None)
        async with self._my_turn():
            if self._supervisor.ready.is_set():
                await self._control(frames.UnloadModel(model=model))

    async def _control(
        self, message: frames.LoadModel | frames.UnloadModel
    ) -> frames.Ready | frames.Failed:
        """Ask the child between two batches. Raises ``WorkerLost``."""
        limit_s = self._options.start_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                child = await self._ready_child()
        except TimeoutError:
            raise WorkerLost(f"no process runs the models after {limit_s:g} s") from None
        try:
            async with asyncio.timeout(limit_s):
                await child.send(message)
                answer = await child.receive()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, WireError):
            self._supervisor.abandon(child)
            raise WorkerLost("the model's process died while it loaded: ask again") from None
        except asyncio.CancelledError:
            self._supervisor.abandon(child)
            raise
        if not isinstance(answer, frames.Ready | frames.Failed):
            self._supervisor.abandon(child)
            raise WorkerLost("the model's process gave another answer than asked: ask again")
        return answer

    def ready_in_s(self) -> float:
        """See ``Supervisor.ready_in_s``."""
        return self._supervisor.ready_in_s()

    async def wait_ready(self) -> None:
        """Return once a child has loaded its models."""
        await self._supervisor.ready.wait()

    def stats(self) -> ExecutorStats:
        """What it did so far, all children together."""
        supervisor = self._supervisor
        return ExecutorStats(
            device=supervisor.device,
            ready=supervisor.ready.is_set(),
            batches=self._batches,
            images=self._images,
            restarts=supervisor.restarts,
            pid=supervisor.child.pid if supervisor.child else None,
            models=dict(supervisor.loaded),
            quarantined=len(self._quarantine),
        )

    async def close(self) -> None:
        """Stop the supervisor and its child; both are gone when this returns."""
        await self._supervisor.close()
