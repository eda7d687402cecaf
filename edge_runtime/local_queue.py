"""The line before the local model: one thread, earliest deadline first.

A run that can no longer end in time is not begun when its request asked for that and others
wait, which it would make late as well; alone, a late answer is better than none. One that is
not wanted any longer (the cloud was faster) leaves the line. A run under way is not
interrupted: interpreters cannot be. So one that is held back (the cloud is asked first) and due
before others goes before them, where it would have to start while they run.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, NamedTuple, TypeVar

from edge_runtime.contract.errors import DeadlineExceeded

__all__ = ["LocalQueue", "Ticket"]

T = TypeVar("T")


class Ticket(Generic[T]):
    """One run in line."""

    def __init__(self, call: Callable[[], T], deadline_s: float, number: int) -> None:
        self.call = call
        self.deadline_s = deadline_s
        self.number = number
        self.least_ms: Callable[[], float] | None = None
        """Time that the fastest runs take; asked right before this one would begin."""
        self.future: Future[T] = Future()

    @property
    def key(self) -> tuple[float, int]:
        """Order in the line."""
        return self.deadline_s, self.number


class Held(NamedTuple):
    """A run that its request holds back."""

    start_s: float
    """When it has to start."""
    deadline_s: float
    begin: Callable[[], None]
    """Puts it in line; must not raise."""


class LocalQueue:
    """Owns the thread. Times are seconds on ``time.monotonic``.

    ``long_ms``: what a run may take; None: not known, and nothing held back goes first.
    """

    def __init__(self, name: str, long_ms: Callable[[], float] | None = None) -> None:
        self._long_ms = long_ms
        self._held: dict[int, Held] = {}
        self._condition = threading.Condition()
        self._line: list[Ticket[Any]] = []
        self._running: Ticket[Any] | None = None
        self._started_s = 0.0
        self._numbers = 0
        self._closed = False
        # Daemon: an interpreter that hangs must not keep the program from ending.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(
        self,
        call: Callable[[], T],
        deadline_s: float = float("-inf"),
        *,
        least_ms: Callable[[], float] | None = None,
    ) -> Ticket[T]:
        """Put a run in line. Its future can be cancelled until its turn comes.

        With ``least_ms`` it raises ``DeadlineExceeded`` instead of beginning too late while
        others wait. Raises ``RuntimeError`` after ``close``.
        """
        with self._condition:
            if self._closed:
                raise RuntimeError("closed")
            self._numbers += 1
            ticket = Ticket(call, deadline_s, self._numbers)
            ticket.least_ms = least_ms
            bisect.insort(self._line, ticket, key=lambda one: one.key)
            self._condition.notify()
        return ticket

    def hold(self, owner: int, held: Held) -> None:
        """A run of ``owner`` is held back; replaces what it held before."""
        with self._condition:
            self._held[owner] = held

    def release(self, owner: int) -> None:
        """It is in line, or not needed any more."""
        with self._condition:
            self._held.pop(owner, None)

    def reserved_ms(self, owner: int, deadline_s: float) -> tuple[float, ...]:
        """When held-back runs start, from now and rising, but for those that ``ahead`` counts."""
        with self._condition:
            now_s = time.monotonic()
            first = self._locked_out(deadline_s, now_s)
            return tuple(
                sorted(
                    (held.start_s - now_s) * 1e3
                    for other, held in self._held.items()
                    if other != owner and other not in first
                )
            )

    def _locked_out(self, deadline_s: float, now_s: float) -> list[int]:
        """Owners of runs due before ``deadline_s`` that have to start before a run now ends."""
        if self._long_ms is None or not self._held:
            return []
        until_s = now_s + self._long_ms() / 1e3
        return [
            owner
            for owner, held in self._held.items()
            if held.deadline_s < deadline_s and held.start_s < until_s
        ]

    def ahead(self, ticket: Ticket[Any] | None, deadline_s: float) -> tuple[int, float | None]:
        """Runs in line before ``ticket``, and for how many seconds one has been running.

        ``ticket`` None: before a new one with that deadline. Seconds None: none is running.
        The run of ``ticket`` itself counts as none before it; one that is held back and would
        go first counts as in line.
        """
        with self._condition:
            key = (deadline_s, self._numbers + 1) if ticket is None else ticket.key
            waiting = sum(one.key < key and not one.future.cancelled() for one in self._line)
            waiting += len(self._locked_out(key[0], time.monotonic()))
            if self._running is None:
                return waiting, None
            own = self._running is ticket
            return 0 if own else waiting, time.monotonic() - self._started_s

    @property
    def pending(self) -> int:
        """In line or running."""
        with self._condition:
            waiting = sum(not one.future.cancelled() for one in self._line)
            return waiting + (self._running is not None)

    def close(self, last: Callable[[], None]) -> None:
        """Finish the line, then ``last``, in the thread; end it. Twice is harmless."""
        with self._condition:
            if self._closed:
                return
            ticket = Ticket(last, float("inf"), self._numbers + 1)
            self._line.append(ticket)
            self._closed = True
            self._condition.notify()
        ticket.future.result()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._condition:
                while not self._line:
                    if self._closed:
                        return
                    self._condition.wait()
                ticket = self._line[0]
                first: list[int] = []
                if not self._closed and not ticket.future.cancelled():
                    first = self._locked_out(ticket.deadline_s, time.monotonic())
                held = [self._held.pop(owner) for owner in first]
                if not held:
                    self._line.pop(0)
                    if not ticket.future.set_running_or_notify_cancel():
                        continue
                    self._running, self._started_s = ticket, time.monotonic()
                others = any(not one.future.cancelled() for one in self._line)
            for one in held:
                one.begin()  # outside the lock: it submits
            if not held:
                self._run(ticket, others)

    def _run(self, ticket: Ticket[Any], others: bool) -> None:
        try:
            late = _too_late(ticket) if others else None
            result = None if late is not None else ticket.call()
        except BaseException as error:  # the future's to raise, whatever it is
            late, result = error, None
        with self._condition:
            self._running = None
        if late is not None:
            ticket.future.set_exception(late)
        else:
            ticket.future.set_result(result)


def _too_late(ticket: Ticket[Any]) -> BaseException | None:
    if ticket.least_ms is None:
        return None
    left_ms, least_ms = (ticket.deadline_s - time.monotonic()) * 1e3, ticket.least_ms()
    if left_ms >= least_ms:
        return None
    return DeadlineExceeded(
        f"the local model needs {least_ms:.0f} ms and {max(left_ms, 0.0):.0f} ms were left when "
        "its turn came: allow more time, or ask for less at once"
    )
