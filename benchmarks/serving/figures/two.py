"""Two brokers behind one runtime: one of them three times slower, then one of them killed.

The device of one takes 80 + 20 n ms, that of the other three times as long. Requests come at
1.5 times what both can do together, each goes where ``EdgeRuntime`` sends it, and none may be
answered on the device. In a second run the faster broker is killed halfway: what was asked of it
is answered by the other one or refused, in time either way.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from pathlib import Path

import msgspec

from benchmarks.serving.figures.base import Bench, Finding, Row
from benchmarks.serving.measure import median, quantile
from benchmarks.serving.targets import NEARFAR
from benchmarks.serving.workload import Work
from edge_runtime import Bundle, EdgeRuntime
from edge_runtime.contract.errors import NearfarError
from tests.support.bundles import photo, servable, tiny_bundle

DEADLINE_MS = 2000
SLOWED = 3
OFFERED = 1.5
DEMANDED_SHARE = 0.95
GRACE_MS = 50.0
"""An answer that comes so much after its deadline counts as late: what the caller's own process
needs beside 60 other requests."""


def measure(bench: Bench) -> Finding:
    model = servable(bench.folder / "two")
    fast = Work(
        kind="sleep", deadline_ms=DEADLINE_MS, fixed_ms=80, image_ms=20, servable=str(model)
    )
    slow = msgspec.structs.replace(
        fast, fixed_ms=SLOWED * fast.fixed_ms, image_ms=SLOWED * fast.image_ms
    )
    capacity_per_s = fast.capacity_per_s + slow.capacity_per_s
    seconds = 12.0 if bench.quick else 20.0
    rows: list[Row] = []
    for number in bench.turns():
        for killed in (False, True):
            with (
                bench.server(NEARFAR, fast, ()) as first,
                bench.server(NEARFAR, slow, ()) as second,
            ):
                urls = [f"http://127.0.0.1:{target.port}" for target in (first, second)]
                load = _Load(urls, OFFERED * capacity_per_s, seconds, number + 1)
                asyncio.run(load.run(first.pid if killed else None))
            row = load.row(capacity_per_s)
            row |= {"server": NEARFAR, "killed": killed, "load_average": os.getloadavg()[0]}
            rows.append(row)
    share = median([row["capacity_share"] for row in rows if not row["killed"]])
    late = max(row["late"] for row in rows if row["killed"])
    answered = min(row["good_per_s"] for row in rows if row["killed"])
    return Finding(
        title="two brokers, one slowed three times; then one killed",
        rows=rows,
        passed={
            "two_brokers_95_percent_of_both": share >= DEMANDED_SHARE,
            "a_killed_broker_makes_nobody_late": late == 0 and answered > 0,
        },
    )


class _Load:
    """Open loop through one runtime; ends of requests by their start and duration."""

    def __init__(self, urls: list[str], per_s: float, seconds: float, seed: int) -> None:
        self._urls = urls
        self._per_s = per_s
        self._seconds = seconds
        self._random = random.Random(seed)  # noqa: S311  # arrivals, no secrets
        self._image = photo(seed)
        self._ends: list[tuple[float, float, bool]] = []
        self._started_s = 0.0

    async def run(self, victim: int | None) -> None:
        """``victim``: the process to kill halfway."""
        bundle = Bundle.open(Path(tiny_bundle()))
        runtime = await asyncio.to_thread(EdgeRuntime, bundle, self._urls, "ONLY_IN_CLOUD")
        async with runtime:
            await asyncio.to_thread(runtime.prewarm, wait_ms=10_000)
            self._started_s = time.perf_counter()
            due_s = 0.0
            async with asyncio.TaskGroup() as group:
                while (due_s := due_s + self._random.expovariate(self._per_s)) < self._seconds:
                    await asyncio.sleep(due_s - (time.perf_counter() - self._started_s))
                    if victim is not None and due_s >= self._seconds / 2:
                        os.kill(victim, signal.SIGKILL)
                        victim = None
                    group.create_task(self._ask(runtime))

    async def _ask(self, runtime: EdgeRuntime) -> None:
        started_s = time.perf_counter()
        try:
            await runtime.arun(self._image, deadline_ms=DEADLINE_MS)
            answered = True
        except NearfarError:
            answered = False
        ended_s = time.perf_counter()
        self._ends.append((started_s - self._started_s, (ended_s - started_s) * 1e3, answered))

    def row(self, capacity_per_s: float) -> Row:
        """Of the requests after the first quarter, the last deadline's left out."""
        from_s, to_s = self._seconds / 4, self._seconds - DEADLINE_MS / 1e3
        window = [end for end in self._ends if from_s <= end[0] < to_s]
        times = [ms for _, ms, answered in window if answered]
        good_per_s = sum(ms <= DEADLINE_MS for ms in times) / (to_s - from_s)
        return {
            "offered_per_s": round(len(window) / (to_s - from_s), 1),
            "good_per_s": round(good_per_s, 1),
            "capacity_share": round(good_per_s / capacity_per_s, 4),
            "late": sum(ms > DEADLINE_MS + GRACE_MS for ms in times),
            "answered_p50_ms": quantile(times, 0.5),
            "answered_p99_ms": quantile(times, 0.99),
            "refused": len(window) - len(times),
        }
