"""What every server is asked to run: the same work, the same bytes.

``sleep``: a device of known speed, T(n) = fixed + n * image milliseconds, one batch at a time;
it needs no processor, so what is seen is the server. ``program``: a servable, run by the very
code that the broker's worker runs, so that decoder and runtime are no difference.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

__all__ = ["Work", "runner"]


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """One workload, as it is told to a server."""

    kind: Literal["sleep", "program"]
    deadline_ms: int
    max_batch: int = 8
    fixed_ms: float = 0.0
    image_ms: float = 0.0
    servable: str = ""
    tensor: bool = False
    """Bodies are tensors, not images."""
    threads: int = 1

    @property
    def capacity_per_s(self) -> float:
        """Of the sleeping device, with full batches."""
        return self.max_batch * 1e3 / (self.fixed_ms + self.max_batch * self.image_ms)


def runner(work: Work) -> Callable[[Sequence[bytes]], list[int]]:
    """Runs a batch of bodies; one batch at a time, whoever calls."""
    lock = threading.Lock()
    run = _sleeper(work) if work.kind == "sleep" else _program(work)

    def locked(bodies: Sequence[bytes]) -> list[int]:
        with lock:
            return run(bodies)

    return locked


def _sleeper(work: Work) -> Callable[[Sequence[bytes]], list[int]]:
    def run(bodies: Sequence[bytes]) -> list[int]:
        time.sleep((work.fixed_ms + len(bodies) * work.image_ms) / 1e3)
        return [len(body) for body in bodies]

    return run


def _program(work: Work) -> Callable[[Sequence[bytes]], list[int]]:
    from broker.executors.base import BatchItem
    from broker.executors.device import pick_device, use_threads
    from broker.executors.program import TorchProgram
    from broker.models.servable import open_servable
    from edge_runtime.contract.errors import NearfarError

    use_threads(work.threads)
    program = TorchProgram.load(open_servable(Path(work.servable)), pick_device("cpu"))
    extra = {"tensor": True, "outputs": (0,), "answered": False} if work.tensor else {}

    def run(bodies: Sequence[bytes]) -> list[int]:
        outcomes = program.run([BatchItem(body, **extra) for body in bodies])
        for outcome in outcomes:
            if isinstance(outcome, NearfarError):
                raise outcome
        return [len(body) for body in bodies]

    return run
