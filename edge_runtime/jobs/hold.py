"""Deferred jobs that wait for their conditions: sent a few at a time, once these hold."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

import msgspec

from edge_runtime.conditions import read_conditions
from edge_runtime.contract.errors import NearfarError
from edge_runtime.engine import Engine
from edge_runtime.jobs.deferral import obstacle
from edge_runtime.jobs.entry import Entry
from edge_runtime.results import Result

__all__ = ["Held"]

_MAX_SENDING: Final = 2
_LOOK_EVERY_S: Final = 15.0


class Held:
    """Thread-safe. ``start`` sends a job, ``expire`` ends one whose time is over."""

    def __init__(
        self,
        engine: Engine,
        *,
        start: Callable[[Entry], None],
        expire: Callable[[Entry, NearfarError], None],
    ) -> None:
        self._engine = engine
        self._start = start
        self._expire = expire
        self._lock = threading.RLock()
        self._entries: list[Entry] = []
        self._sending = 0
        self._watching = False
        self._closed = False

    def add(self, entry: Entry) -> None:
        """One more, after the others."""
        with self._lock:
            self._entries.append(entry)
        self.release()

    def close(self) -> None:
        """Send none any more."""
        with self._lock:
            self._closed = True
            self._entries.clear()

    def release(self) -> None:
        """Send what may be sent now; look again later while others wait."""
        conditions = read_conditions(self._engine.conditions)
        for entry in self._due():
            assert entry.record.deferred is not None  # noqa: S101  # it is held
            error = obstacle(entry.record.deferred, conditions)
            if error is None:
                if self._take(entry, sending=True):
                    entry.core.done.add_done_callback(self._sent)
                    self._start(entry)
            elif error.retryable:
                entry.core.tell(msgspec.structs.replace(entry.core.status, trouble="deferred"))
            elif self._take(entry, sending=False):
                self._expire(entry, error)
        self._watch()

    def _due(self) -> tuple[Entry, ...]:
        with self._lock:
            self._entries = [entry for entry in self._entries if not entry.core.done.done()]
            return tuple(self._entries)

    def _take(self, entry: Entry, *, sending: bool) -> bool:
        """Whether this caller has it now: others may look at the same time."""
        with self._lock:
            if entry not in self._entries or (sending and self._sending >= _MAX_SENDING):
                return False
            self._entries.remove(entry)
            self._sending += sending
            return True

    def _sent(self, _: Future[Result]) -> None:
        with self._lock:
            self._sending -= 1
            if self._closed:
                return
        self.release()

    def _watch(self) -> None:
        way = self._engine.uplink
        with self._lock:
            if self._watching or self._closed or not self._entries or way is None:
                return
            self._watching = True
        try:
            way.pick(None).spawn(self._look_again())
        except NearfarError:
            return  # being closed

    async def _look_again(self) -> None:
        """In the network thread: a timer, and only while something waits."""
        await asyncio.sleep(_LOOK_EVERY_S)
        with self._lock:
            self._watching = False
        self.release()
