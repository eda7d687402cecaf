"""Models in actors of a Ray cluster: one actor a slot, one call for its part of a batch.

The cluster runs this package, and has the servables' folders under the same paths: each
actor checks their digests. Ray is imported by ``start`` and not before. Nodes of one cluster
must agree on ``RAY_AUTH_MODE``; what is set in the broker's environment is left as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any, Final, Literal

from broker.executors import frames
from broker.executors.base import (
    BatchItem,
    BatchOutcome,
    EventSink,
    ExecutorOptions,
    ExecutorStats,
    LoadedModel,
    Outcome,
)
from broker.executors.worker_process import Models
from broker.models.servable import ModelKey, OpenedServable
from edge_runtime.contract.errors import (
    BackendUnavailable,
    ConfigError,
    ModelLoadError,
    NearfarError,
    WireError,
    WorkerLost,
    error_from_code,
)

__all__ = ["RayActor", "RayExecutor"]

_FIRST_BACKOFF_S: Final = 0.1
_MAX_BACKOFF_S: Final = 10.0
_PING_S: Final = 2.0
_LOOPBACK: Final = "127.0.0.2"
"""Ray takes 127.0.0.1 for the address that other machines see, and would bind that."""
_CONNECT_S: Final = 5.0
_STORE_BYTES: Final = 128 * 2**20
"""Of a cluster that this executor starts: frames of a batch are all that goes through it."""


class RayActor:
    """What runs in an actor: frames in, frames out, as in a worker process."""

    def __init__(self) -> None:
        self._models: Models | None = None

    def call(self, payload: bytes) -> bytes:
        """Answer one frame; errors travel as ``Failed``."""
        try:
            answer = self._answer(frames.decode_to_worker(payload))
        except NearfarError as error:
            answer = frames.failure_of(error)
        return bytes(frames.encode_frame(answer)[frames.HEADER_BYTES :])

    def _answer(self, request: frames.ToWorker) -> frames.FromWorker:
        if isinstance(request, frames.Load):
            self._models = Models(request)
            loaded = tuple(self._models.load(ref) for ref in request.servables)
            return frames.Ready(device=self._models.device, models=loaded)
        models = self._models
        if models is None:
            raise WireError("the first frame must be Load")
        if isinstance(request, frames.RunBatch):
            return models.run(request, lambda: None)
        if isinstance(request, frames.LoadModel):
            return frames.Ready(device=models.device, models=(models.load(request.servable),))
        models.unload(request.model)
        return frames.Ready(device=models.device)

    def ping(self) -> None:
        """Answer at once, where the actor lives."""


class _Slot:
    """One actor, and whether it can run a batch."""

    def __init__(self) -> None:
        self.actor: Any = None
        self.lost = asyncio.Event()
        self.lost.set()


class RayExecutor:
    """Runs batches in actors, each batch spread over those that are ready."""

    def __init__(
        self, servables: Sequence[OpenedServable], options: ExecutorOptions, events: EventSink
    ) -> None:
        self._all = {servable.key: servable for servable in servables}
        self._wanted = dict(self._all)
        self._loaded: dict[ModelKey, LoadedModel] = {}
        self._options = options
        self._events = events
        self._ray: Any = None
        self._slots = [_Slot() for _ in range(options.slots)]
        self._tasks: list[asyncio.Task[None]] = []
        self._ready = asyncio.Event()
        self._turn = asyncio.Lock()
        self._device: Literal["auto", "cpu", "cuda"] = options.device
        self._batches = 0
        self._images = 0
        self._restarts = 0

    async def start(self) -> None:
        """Join the cluster, or start one of this machine, and load every actor's models."""
        if self._options.backend is not None:
            await _reachable(self._options.backend)
        self._ray = _import_ray()
        limit_s = self._options.start_timeout_s
        try:
            self._connect()  # on the main thread, as Ray sets signal handlers
            async with asyncio.timeout(limit_s):
                await asyncio.gather(*(self._fill(slot) for slot in self._slots))
        except BaseException as error:
            await self.close()
            if isinstance(error, TimeoutError):
                raise ModelLoadError(
                    f"the actors did not load their models in {limit_s:g} s: does the cluster "
                    f"have {self._options.slots} free slots?"
                ) from None
            raise
        self._tasks = [asyncio.create_task(self._keep(slot), name="slot") for slot in self._slots]

    def _connect(self) -> None:
        handler = signal.getsignal(signal.SIGTERM)
        common = {
            "namespace": "nearfar",
            "log_to_driver": False,
            "logging_level": "error",
            "ignore_reinit_error": True,
        }
        try:
            if self._options.backend is not None:
                self._ray.init(address=self._options.backend, **common)
            else:
                self._ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=_STORE_BYTES,
                    _node_ip_address=_LOOPBACK,
                    **common,
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise BackendUnavailable(f"no Ray cluster: {str(error).splitlines()[0]}") from None
        finally:
            if handler is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # whoever drains keeps doing so

    async def _fill(self, slot: _Slot) -> None:
        """Give a slot an actor with all models loaded. Raises what that raises."""
        options = self._options
        gpus = 0 if options.device == "cpu" else self._ray.cluster_resources().get("GPU", 0)
        actor = (
            self._ray.remote(RayActor)
            .options(num_cpus=options.threads, num_gpus=1 if gpus else 0, max_restarts=0)
            .remote()
        )
        try:
            load = frames.Load(
                servables=tuple(frames.ref_of(one) for one in self._wanted.values()),
                device=options.device if gpus else "cpu",
                threads=options.threads,
                runtime=options.runtime,
                precision=options.precision,
                calibration=options.calibration,
            )
            answer = await self._call(actor, load)
            if isinstance(answer, frames.Failed):
                raise error_from_code(answer.code, answer.detail)
            if not isinstance(answer, frames.Ready):
                raise WireError("an actor answered Load with something else than Ready")
        except BaseException:
            self._kill(actor)
            raise
        self._device = "cuda" if answer.device == "cuda" else "cpu"
        self._loaded |= dict(answer.models)
        slot.actor = actor
        slot.lost.clear()
        self._ready.set()

    async def _keep(self, slot: _Slot) -> None:
        """Replace a slot's actor whenever it is lost, with its node or alone."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            while not slot.lost.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(slot.lost.wait(), _PING_S)
                await self._ping(slot)
            try:
                await self._fill(slot)
                self._restarts += 1
                self._events("actor_ready", {})
                backoff_s = _FIRST_BACKOFF_S
            except Exception as error:  # of ours, or of Ray
                self._events("actor_failed", {"error": type(error).__name__, "text": str(error)})
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    async def _ping(self, slot: _Slot) -> None:
        if slot.lost.is_set() or self._turn.locked():
            return
        try:
            await slot.actor.ping.remote()
        except self._ray.exceptions.RayError as error:
            self._lose(slot, error)

    def _lose(self, slot: _Slot, error: BaseException) -> None:
        if slot.lost.is_set():
            return
        self._events("actor_lost", {"error": type(error).__name__})
        self._kill(slot.actor)
        slot.actor = None
        slot.lost.set()
        if all(one.lost.is_set() for one in self._slots):
            self._ready.clear()

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(Exception):  # it, or its cluster, is gone already
            self._ray.kill(actor, no_restart=True)

    async def _call(self, actor: Any, request: frames.ToWorker) -> frames.FromWorker:
        payload = bytes(frames.encode_frame(request)[frames.HEADER_BYTES :])
        return frames.decode_from_worker(await actor.call.remote(payload))

    async def run(self, model: ModelKey, batch: Sequence[BatchItem]) -> BatchOutcome:
        """Run one batch. Requests whose actor is lost are answered ``WorkerLost``.

        Raises ``WorkerLost`` when there is no actor at all.
        """
        async with self._turn:
            slots = [slot for slot in self._slots if not slot.lost.is_set()][: len(batch)]
            if not slots:
                raise WorkerLost("the models' actors are starting again: ask again shortly")
            count = len(slots)
            parts = [batch[at::count] for at in range(count)]
            given = await asyncio.gather(
                *(self._part(slot, model, part) for slot, part in zip(slots, parts, strict=True))
            )
        results: list[Outcome] = [given[row % count][row // count] for row in range(len(batch))]
        self._batches += 1
        self._images += len(batch)
        interrupted = any(isinstance(result, WorkerLost) for result in results)
        return BatchOutcome(results=results, interrupted=interrupted)

    async def _part(
        self, slot: _Slot, model: ModelKey, items: Sequence[BatchItem]
    ) -> Sequence[Outcome]:
        limit_s = self._options.hang_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                request = frames.RunBatch(model=model, items=tuple(items))
                answer = await self._call(slot.actor, request)
        except TimeoutError as error:
            self._lose(slot, error)
            lost = WorkerLost(f"the model gave no answer for {limit_s:g} s: ask again")
            return [lost] * len(items)
        except (self._ray.exceptions.RayError, WireError) as error:
            self._lose(slot, error)
            return [WorkerLost("the model's actor died during this batch: ask again")] * len(items)
        if isinstance(answer, frames.Failed):
            return [error_from_code(answer.code, answer.detail)] * len(items)
        if not isinstance(answer, frames.BatchDone) or len(answer.results) != len(items):
            self._lose(slot, WireError("another answer than asked"))
            return [WorkerLost("the model's actor gave another answer: ask again")] * len(items)
        return [frames.result_of(result) for result in answer.results]

    async def load(self, model: ModelKey) -> None:
        """Bring a model back into every actor. Raises the first actor's error."""
        if model in self._wanted:
            return
        servable = self._all[model]
        await self._everywhere(frames.LoadModel(servable=frames.ref_of(servable)))
        self._wanted[model] = servable

    async def unload(self, model: ModelKey) -> None:
        """Free a model's memory in every actor."""
        if self._wanted.pop(model, None) is not None:
            self._loaded.pop(model, None)
            await self._everywhere(frames.UnloadModel(model=model))

    async def _everywhere(self, request: frames.LoadModel | frames.UnloadModel) -> None:
        async with self._turn:
            for slot in self._slots:
                if slot.lost.is_set():
                    continue  # its next actor loads what is wanted then
                try:
                    answer = await self._call(slot.actor, request)
                except self._ray.exceptions.RayError as error:
                    self._lose(slot, error)
                    continue
                if isinstance(answer, frames.Failed):
                    raise error_from_code(answer.code, answer.detail)
                if isinstance(answer, frames.Ready):
                    self._loaded |= dict(answer.models)

    def ready_in_s(self) -> float:
        """0 while any actor is ready; where Ray puts the next one, nobody knows how soon."""
        return 0.0 if self._ready.is_set() else float("inf")

    async def wait_ready(self) -> None:
        """Return once any actor is ready."""
        await self._ready.wait()

    def stats(self) -> ExecutorStats:
        """What it did so far, all actors together."""
        return ExecutorStats(
            device=self._device,
            ready=self._ready.is_set(),
            batches=self._batches,
            images=self._images,
            restarts=self._restarts,
            models=dict(self._loaded),
        )

    async def close(self) -> None:
        """End the actors and leave the cluster; one that ``start`` started ends."""
        self._ready.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for slot in self._slots:
            if slot.actor is not None:
                self._kill(slot.actor)
        if self._ray is not None:
            await asyncio.to_thread(self._ray.shutdown)
            self._ray = None


async def _reachable(address: str) -> None:
    """Raise ``ConfigError`` unless it is ``host:port``, ``BackendUnavailable`` unless one listens.

    Ray itself would try for many minutes.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(f"Ray cluster {address!r} must be like 10.0.0.7:6379")
    try:
        async with asyncio.timeout(_CONNECT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except OSError:  # TimeoutError is one
        raise BackendUnavailable(f"no Ray cluster listens at {address}: start it first") from None
    writer.close()


def _import_ray() -> Any:
    """Ray, which then reports its use to nobody. Raises ``BackendUnavailable``."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise BackendUnavailable(f"ray: {error}; pip install 'nearfar[ray]'") from None
    return ray
