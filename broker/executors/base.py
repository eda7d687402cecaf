"""What every executor looks like, and how to find one.

An executor runs batches of encoded images through models it loaded at the start, one batch
at a time. Executors register in the entry-point group ``nearfar.executors``; the built-in
ones use the same group as anyone else's. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Literal, Protocol

import msgspec

from broker.models.servable import ModelKey, OpenedServable
from edge_runtime.contract.errors import ConfigError, NearfarError
from edge_runtime.contract.tasks.classification import Prediction

__all__ = [
    "BatchOutcome",
    "Device",
    "EventSink",
    "Executor",
    "ExecutorOptions",
    "ExecutorStats",
    "ImageInput",
    "create_executor",
]

Device = Literal["auto", "cpu", "cuda"]

EventSink = Callable[[str, Mapping[str, object]], None]
"""Takes an event's name and fields: the structured log, in the broker."""


class ImageInput(msgspec.Struct, frozen=True, array_like=True):
    """One encoded image of a batch, and how many answers it wants (None: the task's)."""

    image: bytes
    top_k: int | None = None


class BatchOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """One result for each image of the batch, in order."""

    results: Sequence[tuple[Prediction, ...] | NearfarError]


class ExecutorOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How an executor runs."""

    device: Device = "auto"
    threads: int = 1
    """Threads of one forward pass on the CPU."""
    start_timeout_s: float = 300.0
    """From the start of a process to its models being loaded."""
    hang_timeout_s: float = 30.0
    """Without a sign of life during a batch, a worker counts as hung."""


class ExecutorStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counted since the start."""

    device: str
    ready: bool
    batches: int = 0
    images: int = 0
    restarts: int = 0
    pid: int | None = None
    """The process that runs the models."""


class Executor(Protocol):
    """Runs batches. One caller at a time, on one event loop."""

    async def start(self) -> None:
        """Load the models and return once they can run.

        Raises ``ModelLoadError``, ``ManifestError``, ``ConfigError`` (no such device) or
        ``BackendUnavailable``; nothing is left running then.
        """

    async def run(self, model: ModelKey, batch: Sequence[ImageInput]) -> BatchOutcome:
        """Run one batch. An image that fails does so alone, as an error in its place.

        Raises ``WorkerLost`` when the whole batch is lost.
        """

    def ready_in_s(self) -> float:
        """Seconds until a batch can run: 0 when ready, infinity when nobody knows."""

    async def wait_ready(self) -> None:
        """Return once a batch can run; at once when it can now."""

    def stats(self) -> ExecutorStats:
        """What it did so far."""

    async def close(self) -> None:
        """Free everything; the processes it started have ended when this returns."""


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
