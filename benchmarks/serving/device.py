"""The sleeping device as an executor of the broker: a process of its own behind two pipes.

Registered as anyone's executor is, by an entry point of the group ``nearfar.executors``; see
``targets.py`` for the folder that carries it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import os
import struct
import sys
import time
from collections.abc import Sequence

import msgspec

from broker.executors.base import (
    BatchItem,
    BatchOutcome,
    EventSink,
    ExecutorOptions,
    ExecutorStats,
)
from broker.models.servable import ModelKey, OpenedServable
from edge_runtime.contract.tasks import Prediction
from edge_runtime.contract.wire import EncodedAnswer

__all__ = ["DEVICE_VARIABLE", "SleepDevice", "main", "waited_share"]

DEVICE_VARIABLE = "NEARFAR_BENCH_DEVICE"
"""Fixed and per-image milliseconds, with a comma."""
_PIPE_BYTES = 2**20
_LENGTH = struct.Struct("<I")
_PAUSE_S = 0.5
"""A longer wait is no load."""
_WAITED = "device waited: "


class SleepDevice:
    """Sends each batch, bodies and all, to the process that sleeps."""

    depth = 2
    """As the broker's own worker."""

    def __init__(
        self, servables: Sequence[OpenedServable], options: ExecutorOptions, events: EventSink
    ) -> None:
        # A device that answers always the same, by a label that the model has.
        label = servables[0].labels[0] if servables and servables[0].labels else "0"
        self._answer = EncodedAnswer(predictions=(Prediction(index=0, label=label, score=1.0),))
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._batches = 0
        self._images = 0

    async def start(self) -> None:
        """Start the process."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.serving.device"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._process.stdin is not None
        pipe = self._process.stdin.transport.get_extra_info("pipe")
        with contextlib.suppress(OSError):  # as the broker's own worker has it
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    async def run(self, model: ModelKey, batch: Sequence[BatchItem]) -> BatchOutcome:
        """One batch there and back."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        payload = msgspec.msgpack.encode([item.body for item in batch])
        process.stdin.writelines((_LENGTH.pack(len(payload)), payload))
        async with self._turn:
            await process.stdin.drain()
            await process.stdout.readexactly(_LENGTH.size)
        self._batches += 1
        self._images += len(batch)
        return BatchOutcome(results=[self._answer] * len(batch))

    def ready_in_s(self) -> float:
        """It is ready from the start."""
        return 0.0

    async def wait_ready(self) -> None:
        """Nothing to wait for."""

    def stats(self) -> ExecutorStats:
        """What it did so far."""
        pid = None if self._process is None else self._process.pid
        return ExecutorStats(
            device="cpu", ready=True, batches=self._batches, images=self._images, pid=pid
        )

    async def close(self) -> None:
        """End the process by the end of its input."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            await self._process.wait()


def main() -> None:
    """The process: read a batch, sleep, say that it is done; in the end, how long it waited."""
    fixed_ms, image_ms = map(float, os.environ[DEVICE_VARIABLE].split(","))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    worked_s = waited_s = 0.0
    ended_s = -math.inf
    while len(header := source.read(_LENGTH.size)) == _LENGTH.size:
        bodies = msgspec.msgpack.decode(source.read(_LENGTH.unpack(header)[0]), type=list[bytes])
        began_s = time.perf_counter()
        if began_s - ended_s < _PAUSE_S:
            waited_s += began_s - ended_s
        time.sleep((fixed_ms + len(bodies) * image_ms) / 1e3)
        ended_s = time.perf_counter()
        worked_s += ended_s - began_s
        sink.write(header)
        sink.flush()
    if worked_s:
        print(f"{_WAITED}{waited_s / (waited_s + worked_s):.4f}", file=sys.stderr, flush=True)


def waited_share(log: str) -> float | None:
    """Of its time under load, from the last words of the device in a broker's log; None: none."""
    said = log.rpartition(_WAITED)[2] if _WAITED in log else ""
    return float(said.split()[0]) if said else None


if __name__ == "__main__":
    main()
