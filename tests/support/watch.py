"""Instruments for timing and leak tests on a machine that others share."""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType


class StallMeter:
    """Measures how late this process is woken while the block runs.

    A thread sleeps one millisecond at a time and notes the longest oversleep: what the
    scheduler alone can add to any deadline here.
    """

    def __enter__(self) -> StallMeter:
        self.worst_ms = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall-meter")
        self._thread.start()
        return self

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(0.001):
            now = time.monotonic()
            self.worst_ms = max(self.worst_ms, (now - before) * 1e3 - 1.0)
            before = now

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()


def open_sockets() -> set[str]:
    """Every socket of this process, as the kernel names it."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")  # noqa: PTH115
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


def our_threads() -> list[str]:
    """Names of the threads that edge runtimes started and that still run."""
    return [t.name for t in threading.enumerate() if t.name.startswith("nearfar-")]
