"""What every executor looks like, and how to find one.

An executor runs batches of requests through models it loaded at the start, one batch
at a time. Executors register in the entry-point group ``nearfar.executors``; the built-in
ones use the same group as anyone else's. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Literal, Protocol

import msgspec

from broker.models.servable import ModelKey, OpenedServable
from edge_runtime.contract.errors import ConfigError, ModelNotFound, NearfarError
from edge_runtime.contract.wire import EncodedAnswer, PictureType

__all__ = [
    "BatchItem",
    "BatchOutcome",
    "Device",
    "EventSink",
    "Executor",
    "ExecutorOptions",
    "ExecutorStats",
    "LoadedModel",
    "Outcome",
    "Precision",
    "RuntimeName",
    "TensorAnswer",
    "create_executor",
    "depth_of",
    "not_in_memory",
]

Device = Literal["auto", "cpu", "cuda"]
RuntimeName = Literal["auto", "eager", "openvino", "compile"]
Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]

EventSink = Callable[[str, Mapping[str, object]], None]
"""Takes an event's name and fields: the structured log, in the broker."""


class BatchItem(msgspec.Struct, frozen=True, array_like=True):
    """One request of a batch, and how it wants its answer."""

    body: bytes
    """The encoded image, or for a model that generates a ``SeedRequest`` as JSON; with
    ``tensor`` what goes into the model."""
    top_k: int | None = None
    """None: the task's."""
    media_type: PictureType = "image/png"
    """Of an answer that is an image."""
    colored: bool = False
    """Give a mask a palette."""
    tensor: bool = False
    """``body`` is one row of the model's input as its manifest records it, little-endian: its
    size was checked, and no pre-processing follows."""
    outputs: tuple[int, ...] | None = None
    """Which of the model's outputs to give as they are, by their place in the manifest; None:
    the answer of the task and nothing else."""
    output_bytes: int = 0
    """What those outputs take together."""
    answered: bool = True
    """Give the answer of the task beside them."""


class TensorAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One request's outputs as the model gave them."""

    tensors: tuple[bytes, ...]
    """One for each place in ``BatchItem.outputs``: one row, in the dtype, shape and axis order
    of the manifest, little-endian."""
    answer: EncodedAnswer | None
    """None: it was not asked for."""


Outcome = EncodedAnswer | TensorAnswer | NearfarError
"""Of one request: ``TensorAnswer`` where it names ``outputs``."""


class BatchOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """One result for each request of the batch, in order."""

    results: Sequence[Outcome]
    interrupted: bool = False
    """What ran it was lost meanwhile: how long it took says nothing of the next batch."""
    at_fault: bool = False
    """It was lost while it ran this batch, and nobody else ended it: it crashed, or hung. As far as
    can be told: the images of the next batch decode meanwhile."""


class ExecutorOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How an executor runs."""

    device: Device = "auto"
    threads: int = 1
    """Threads of one forward pass on the CPU."""
    runtime: RuntimeName = "auto"
    precision: Precision = "auto"
    calibration: str | None = None
    """Folder of the photos that int8 is learned on."""
    backend: str | None = None
    """Where the executors ``oip`` (a URL) and ``ray`` (a cluster's address) find what runs."""
    backend_key: str | None = None
    """The API key for it."""
    slots: int = 1
    """Actors of the executor ``ray``."""
    start_timeout_s: float = 300.0
    """From the start of a process to its models being loaded."""
    hang_timeout_s: float = 30.0
    """Without a sign of life during a batch, a worker counts as hung."""


class LoadedModel(msgspec.Struct, frozen=True, array_like=True):
    """How a model is run."""

    runtime: str
    """``eager`` (PyTorch, operator by operator), ``compile`` (inductor) or ``openvino``."""
    precision: str
    """Of its arithmetic: ``fp32``, ``bf16``, ``fp16``, ``int8``."""
    sqnr_db: float | None = None
    """The lowest signal-to-noise ratio on trial inputs, against eager fp32; of ``int8`` the mean
    on photos. None: it is that."""


class ExecutorStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counted since the start."""

    device: str
    ready: bool
    batches: int = 0
    images: int = 0
    restarts: int = 0
    pid: int | None = None
    """The process that runs the models."""
    models: Mapping[ModelKey, LoadedModel] = msgspec.field(default_factory=dict)
    """Those in memory."""
    quarantined: int = 0
    """Inputs that are not taken again."""


class Executor(Protocol):
    """Runs batches. One caller at a time, on one event loop; see ``depth_of`` for two."""

    async def start(self) -> None:
        """Load the models and return once they can run.

        Raises ``ModelLoadError``, ``ManifestError``, ``ConfigError`` (no such device) or
        ``BackendUnavailable``; nothing is left running then.
        """

    async def run(self, model: ModelKey, batch: Sequence[BatchItem]) -> BatchOutcome:
        """Run one batch. A request that fails does so alone, as an error in its place.

        Raises ``WorkerLost`` when the whole batch is lost.
        """

    async def load(self, model: ModelKey) -> None:
        """Bring one of its models back into memory; at once where it is there.

        Raises what ``start`` raises, or ``WorkerLost``.
        """

    async def unload(self, model: ModelKey) -> None:
        """Free the memory of one model between two batches; none for it may follow.

        Before ``start``: that one does not load it.
        """

    def ready_in_s(self) -> float:
        """Seconds until a batch can run: 0 when ready, infinity when nobody knows."""

    async def wait_ready(self) -> None:
        """Return once a batch can run; at once when it can now."""

    def stats(self) -> ExecutorStats:
        """What it did so far."""

    async def close(self) -> None:
        """Free everything; the processes it started have ended when this returns."""


def depth_of(executor: Executor) -> int:
    """How many batches may be with the executor: its attribute ``depth``, else one.

    With 2, ``run`` is called for a next batch while one runs: it waits there, near the device,
    and starts when that one ends. Batches end in the order they were given.
    """
    return int(getattr(executor, "depth", 1))


def not_in_memory(model: ModelKey) -> ModelNotFound:
    """What a request gets that came late for a model."""
    return ModelNotFound(f"model {model.name!r} was unloaded: ask its operator to load it again")


class ExecutorFactory(Protocol):
    """What an entry point of the group names: a class or function."""

    def __call__(
        self, servables: Sequence[OpenedServable], options: ExecutorOptions, events: EventSink
    ) -> Executor:
        """Make an executor for these models; nothing is started yet."""


def create_executor(
    name: str, servables: Sequence[OpenedServable], options: ExecutorOptions, events: EventSink
) -> Executor:
    """The executor registered as ``name``. ``ConfigError`` names the ones there are."""
    points = {point.name: point for point in entry_points(group="nearfar.executors")}
    if name not in points:
        raise ConfigError(f"no executor {name!r}; there are: {', '.join(sorted(points))}")
    factory: ExecutorFactory = points[name].load()
    return factory(servables, options, events)
