"""The line before the local model: one thread, earliest deadline first.

A run that can no longer end in time is not begun when its request asked for that and others
wait, which it would make late as well; alone, a late answer is better than none. One that is
not wanted any longer (the cloud was faster) leaves the line. A run under way is not
interrupted: interpreters cannot be.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

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


class LocalQueue:
    """Owns the thread. Times are seconds on ``time.monotonic``."""

    def __init__(self, name: str) -> None:
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

    def ahead(self, ticket: Ticket[Any] | None, deadline_s: float) -> tuple[int, float | None]:
        """Runs in line before ``ticket``, and for how many seconds one has been running.

        ``ticket`` None: before a new one with that deadline. Seconds None: none is running.
        The run of ``ticket`` itself counts as none before it.
        """
        with self._condition:
            key = (deadline_s, self._numbers + 1) if ticket is None else ticket.key
            waiting = sum(one.key < key and not one.future.cancelled() for one in self._line)
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
                ticket = self._line.pop(0)
                if not ticket.future.set_running_or_notify_cancel():
                    continue
                self._running, self._started_s = ticket, time.monotonic()
                others = any(not one.future.cancelled() for one in self._line)
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
