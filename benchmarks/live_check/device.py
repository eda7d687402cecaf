"""The device: ``python -m benchmarks.live_check.device``, one process per policy run.

It reads one JSON line with what to do, says that it has loaded everything, waits for a line,
connects (a link that dies soon must not be dead by then), says that it is ready, waits for the
time of its start on ``CLOCK_MONOTONIC``, which all processes share, and then takes each
photo at its time, answered or not (open loop). It ends with one JSON line of records.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.live_check.measured import BREAKER_SEED
from edge_runtime import EdgeRuntime, SettableSignals
from edge_runtime.contract.errors import NearfarError
from edge_runtime.log.entries import LogEntry
from edge_runtime.offload.uplink import Uplink
from edge_runtime.policies.base import Policy
from edge_runtime.simulation.lineup import make_policy

__all__ = ["DeviceTask", "Record"]

_CONNECT_MS = 5000.0
_SESSION_S = 0.5


class DeviceTask(msgspec.Struct, frozen=True, kw_only=True):
    """What to do. ``photos`` and ``arrived_s`` have one value per request."""

    bundle: str
    variant: str
    broker: str
    api_key: str
    policy: str
    link_type: str
    deadline_ms: float
    photos: list[str]
    arrived_s: list[float]


class Record(msgspec.Struct, kw_only=True):
    """What became of one request."""

    latency_ms: float
    predicted: int | None = None
    """Class index; None: no answer."""
    source: str | None = None
    error: str | None = None
    late_ms: float = 0.0
    """How much later than planned the request was made."""
    entry: LogEntry | None = None
    """What the runtime logged of it: decisions, timings, confidence."""


async def _ask(runtime: EdgeRuntime, data: bytes, at_s: float) -> Record:
    called_s = time.monotonic()
    record = Record(latency_ms=0.0, late_ms=(called_s - at_s) * 1e3)
    try:
        result = await runtime.arun(data)
    except NearfarError as error:
        record.error = error.code
    else:
        record.predicted = result.predictions[0].index
        record.source = result.inference_source.value
    record.latency_ms = (time.monotonic() - called_s) * 1e3
    return record


async def _ask_all(
    runtime: EdgeRuntime, task: DeviceTask, images: dict[str, bytes], start_s: float
) -> list[Record]:
    asked = []
    for path, arrived_s in zip(task.photos, task.arrived_s, strict=True):
        at_s = start_s + arrived_s
        await asyncio.sleep(max(0.0, at_s - time.monotonic()))
        asked.append(asyncio.create_task(_ask(runtime, images[path], at_s)))
    return list(await asyncio.gather(*asked))


def _connected(task: DeviceTask, entries: list[LogEntry]) -> EdgeRuntime:
    policy: Policy = make_policy(task.policy)
    runtime = EdgeRuntime(
        task.bundle,
        broker=task.broker,
        policy=policy,
        api_key=task.api_key,
        allow_plain_http=True,
        deadline_ms=task.deadline_ms,
        variant=task.variant,
        conditions=SettableSignals(link_type=task.link_type),
        log=entries.append,
    )
    if policy.uses_cloud and not runtime.prewarm(wait_ms=_CONNECT_MS):
        runtime.close()
        raise SystemExit("the broker did not answer before the start")
    time.sleep(_SESSION_S)  # the session opens in the background
    if isinstance(runtime._engine.uplink, Uplink):
        # The simulated breaker draws the same back-offs: over a dead link all hangs on them.
        breaker = runtime._engine.uplink._health.breaker
        breaker._random = random.Random(BREAKER_SEED).random  # noqa: S311
    return runtime


def main() -> None:
    """Answer all photos of the task on stdin."""
    task = msgspec.json.decode(sys.stdin.readline(), type=DeviceTask)
    entries: list[LogEntry] = []
    images = {path: Path(path).read_bytes() for path in set(task.photos)}
    print(json.dumps({"loaded": True}), flush=True)
    sys.stdin.readline()
    with _connected(task, entries) as runtime:
        print(json.dumps({"ready": True}), flush=True)
        start: dict[str, Any] = json.loads(sys.stdin.readline())
        records = asyncio.run(_ask_all(runtime, task, images, start["start_s"]))
    # Entries come in the order of ends; wall times of calls put them in order of arrival.
    for record, entry in zip(records, sorted(entries, key=lambda one: one.unix_s), strict=True):
        record.entry = entry
    sys.stdout.buffer.write(msgspec.json.encode(records) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
