"""Which models are in memory, where there is not room for all of them.

Models have a budget of bytes. One that is asked for and not in memory is cold: it is loaded when
its turn comes, and the least recently used ones go to make room. Loading holds up everybody, so

- it begins only when what was admitted before the cold request, of any model, has been run:
  nobody was promised less than that load costs;
- from then on everybody who is let in has it counted in the forecast, and the time to come back
  too, where his own model is the one that goes;
- a cold model whose callers cannot wait for a load is loaded all the same, for those who ask
  again: at once when the device has been idle as long as the load takes, and in any case after
  ten times that. So two models that do not fit together do not swap for every request.

Sizes are those of the program files: weights are nearly all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from broker.executors.base import EventSink, Executor
from broker.models.servable import ModelKey
from broker.scheduling.lane import Lane
from edge_runtime.contract.errors import ConfigError, NearfarError, WorkerLost

__all__ = ["Residency"]

_POLL_S: Final = 0.02
_UNKNOWN_LOAD_MS: Final = 1000.0
_LOAD_WEIGHT: Final = 0.5
_PATIENCE: Final = 10.0


@dataclass(slots=True)
class _Wanted:
    """A cold model that shall come into memory though no request waits for it."""

    since_s: float
    forced: bool = False
    announced_s: float | None = None
    """Since then it counts in every forecast."""
    waiters: list[asyncio.Future[None]] = field(default_factory=list)


class Residency:
    """The models of one executor. Used from one event loop, on the scheduler's clock.

    ``sizes``: bytes of each model; one that is larger than the budget raises ``ConfigError``.
    Nothing is in memory at the start: see ``begin``.
    """

    def __init__(
        self,
        executor: Executor,
        sizes: Mapping[ModelKey, int],
        budget_bytes: int,
        events: EventSink,
        clock: Callable[[], float],
    ) -> None:
        for model, size_bytes in sizes.items():
            if size_bytes > budget_bytes:
                raise ConfigError(
                    f"model {model.name!r} ({model.version}) takes {size_bytes / 1e6:.1f} MB, the "
                    f"memory budget is {budget_bytes / 1e6:.1f} MB: raise --memory-budget"
                )
        self.budget_bytes = budget_bytes
        self.loads = 0
        self.evictions = 0
        self._executor = executor
        self._sizes = dict(sizes)
        self._events = events
        self._clock = clock
        self._resident: OrderedDict[ModelKey, float] = OrderedDict()
        """When each was used last; the least recently used first."""
        self._load_ms: dict[ModelKey, float] = {}
        self._loading: tuple[ModelKey, float] | None = None
        self._wanted: dict[ModelKey, _Wanted] = {}
        self._turn = asyncio.Lock()
        self.work = asyncio.Event()
        """Set where the scheduler's loop has something to look at: it is the loop's own."""
        self._used_s = clock()

    async def begin(self) -> None:
        """Empty the executor, before it starts."""
        for model in self._sizes:
            await self._executor.unload(model)

    # What is known -----------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """Of the models in memory."""
        return sum(self._sizes[model] for model in self._resident)

    def resident(self, model: ModelKey) -> bool:
        """Whether it is in memory, or about to be."""
        return model in self._resident or (self._loading is not None and self._loading[0] == model)

    def load_ms(self, model: ModelKey) -> float:
        """What bringing it into memory takes: as before, or as others of its size."""
        known = self._load_ms.get(model)
        if known is not None:
            return known
        if not self._load_ms:
            return _UNKNOWN_LOAD_MS
        per_byte = sum(self._load_ms.values()) / max(
            sum(self._sizes[other] for other in self._load_ms), 1
        )
        return max(per_byte * self._sizes[model], min(self._load_ms.values()))

    def extra_ms(
        self,
        lanes: Mapping[ModelKey, Lane],
        model: ModelKey,
        deadline_s: float,
        priority: int,
        now_s: float,
    ) -> float:
        """What loads add to the wait of a request for ``model``, made now."""
        extra_ms = 0.0
        if self._loading is not None:
            loaded, started_s = self._loading
            extra_ms += max(self.load_ms(loaded) - (now_s - started_s) * 1e3, 1.0)
        is_cold = not self.resident(model)
        coming = [
            other
            for other, lane in lanes.items()
            if other != model and len(lane) and not self.resident(other)
        ]
        coming += [
            other
            for other, wanted in self._wanted.items()
            if wanted.announced_s is not None and other != model and other not in coming
        ]
        for other in coming:
            extra_ms += self.load_ms(other)
        if is_cold or any(model in self._victims(other) for other in coming):
            extra_ms += self.load_ms(model)
        if is_cold or coming:  # whoever came before goes first, whatever his deadline
            for other, lane in lanes.items():
                if other == model or not len(lane):
                    continue
                later = len(lane) - lane.count_before(deadline_s, priority)
                extra_ms += lane.latency.drain_ms(later, lane.max_batch)
        if is_cold:
            extra_ms += max((_upload_ms(lane, now_s) for lane in lanes.values()), default=0.0)
        return extra_ms

    def _victims(self, model: ModelKey) -> list[ModelKey]:
        """Which go to make room, the least recently used first."""
        if self.resident(model):
            return []
        excess = self.used_bytes + self._sizes[model] - self.budget_bytes
        victims: list[ModelKey] = []
        for other in self._resident:
            if excess <= 0:
                break
            victims.append(other)
            excess -= self._sizes[other]
        return victims

    # Turns -------------------------------------------------------------------------------

    def choose(self, lanes: Mapping[ModelKey, Lane], now_s: float) -> ModelKey | None:
        """Whose head runs next; None: nobody's, or a load must wait for older requests.

        By class, then by deadline; that of a cold model counts earlier, by its load.
        """
        heads = []
        for model, lane in lanes.items():
            head = lane.waiting.earliest()
            if head is not None:
                place = head[0]
                cold_s = 0.0 if self.resident(model) else self.load_ms(model) / 1e3
                heads.append(((place.priority, place.deadline_s - cold_s, place.turn), model))
        for _, model in sorted(heads):
            if self.resident(model):
                return model
            oldest_s = min(ticket.admitted_s for ticket in lanes[model].waiting)
            if not _older_work(lanes, oldest_s, now_s, besides=model):
                return model
        return None

    def want(self, model: ModelKey, now_s: float) -> bool:
        """A request for this model was refused: whether it is cold, and shall come in then."""
        if self.resident(model):
            return False
        self._wanted.setdefault(model, _Wanted(since_s=now_s))
        return True

    async def bring(self, model: ModelKey) -> None:
        """Return once it is in memory: the scheduler's loop loads it in its turn.

        Raises what ``Executor.load`` raises.
        """
        if model in self._resident:
            return
        wanted = self._wanted.setdefault(model, _Wanted(since_s=self._clock()))
        wanted.forced = True
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        wanted.waiters.append(waiter)
        self.work.set()
        await waiter

    async def drop(self, model: ModelKey) -> None:
        """Free a model, between two batches; it comes back when it is asked for."""
        async with self._turn:
            self._resident.pop(model, None)
            await self._executor.unload(model)

    async def rest(self, lanes: Mapping[ModelKey, Lane]) -> None:
        """Nothing can run now: load what is wanted, or wait until that, or something, is due.

        Leaves ``work`` set where there is more to look at.
        """
        waiting = any(len(lane.waiting) for lane in lanes.values())
        if not self._wanted and not waiting:
            return
        if not await self.prefetch(lanes):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await self.work.wait()
        self.work.set()

    async def prefetch(self, lanes: Mapping[ModelKey, Lane]) -> bool:
        """Load one model that is wanted, if its time has come; whether it was."""
        now_s = self._clock()
        for model, wanted in list(self._wanted.items()):
            load_s = self.load_ms(model) / 1e3
            idle_s = now_s - self._used_s
            patience_s = _PATIENCE * load_s
            if wanted.announced_s is None and (
                wanted.forced or idle_s >= load_s or now_s - wanted.since_s >= patience_s
            ):
                wanted.announced_s = now_s
            announced_s = wanted.announced_s
            if announced_s is None or _older_work(lanes, announced_s, now_s):
                continue
            error: NearfarError | None = None
            try:
                async with self.holding(model, used=False):
                    pass
            except NearfarError as failed:
                error = failed
                self._events("load_failed", {"model": model.name, "text": failed.detail})
            self._settle(model, error)
            return True
        return False

    def _settle(self, model: ModelKey, error: NearfarError | None = None) -> None:
        wanted = self._wanted.pop(model, None)
        for waiter in [] if wanted is None else wanted.waiters:
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(type(error)(error.detail))

    @contextlib.asynccontextmanager
    async def holding(self, model: ModelKey, *, used: bool = True) -> AsyncIterator[None]:
        """``model`` in memory for the length of the block; nothing else comes or goes.

        Raises what ``Executor.load`` raises; what went to make room is gone then.
        """
        async with self._turn:
            if model not in self._resident:
                await self._load(model)
            self._resident.move_to_end(model)
            yield
            self._resident[model] = self._clock()
            if used:
                self._used_s = self._clock()

    async def _load(self, model: ModelKey) -> None:
        started_s = self._clock()
        for victim in self._victims(model):
            del self._resident[victim]
            with contextlib.suppress(WorkerLost):  # its memory went with its process
                await self._executor.unload(victim)
            self.evictions += 1
            self._events("model_evicted", {"model": victim.name, "version": victim.version})
        self._loading = (model, started_s)
        try:
            try:
                await self._executor.load(model)
            except WorkerLost:  # once more, in the process that takes its place
                await self._executor.load(model)
        finally:
            self._loading = None
        now_s = self._clock()
        took_ms = (now_s - started_s) * 1e3
        before_ms = self._load_ms.get(model, took_ms)
        self._load_ms[model] = before_ms + _LOAD_WEIGHT * (took_ms - before_ms)
        self._resident[model] = now_s
        self.loads += 1
        fields = {"model": model.name, "version": model.version, "ms": round(took_ms, 1)}
        self._events("model_brought_in", fields)
        self._settle(model)


def _older_work(
    lanes: Mapping[ModelKey, Lane], than_s: float, now_s: float, besides: ModelKey | None = None
) -> bool:
    """Whether somebody was admitted before, and is not the reason for being late himself."""
    for model, lane in lanes.items():
        if model == besides or not len(lane):
            continue
        if any(ticket.admitted_s < than_s for ticket in lane.waiting):
            return True
        for ticket in lane.uploading:
            if ticket.admitted_s < than_s and ticket.predicted_start_s >= now_s:
                return True
    return False


def _upload_ms(lane: Lane, now_s: float) -> float:
    """Until the bodies under way should have come."""
    starts = [ticket.predicted_start_s for ticket in lane.uploading]
    return max((max(starts) - now_s) * 1e3, 0.0) if starts else 0.0
