"""How many requests, of how many bytes, one session carries at a time.

The broker refuses what goes beyond; here it waits its turn instead, as a request waits for
one of HTTP's connections. First come, first served.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

__all__ = ["Places"]


class Places:
    """Of one session. ``requests`` may change while it is open. One event loop."""

    def __init__(self, requests: int, size_bytes: int) -> None:
        self.requests = requests
        self._most_bytes = size_bytes
        self._taken = 0
        self._taken_bytes = 0
        self._line: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size_bytes: int) -> None:
        """Wait for a place; ``give`` it back. One that is cancelled here has none."""
        if not self._line and self._fits(size_bytes):
            self._count(size_bytes)
            return
        turn = asyncio.get_running_loop().create_future()
        self._line.append((size_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came at the same moment
                self.give(size_bytes)
            else:
                with contextlib.suppress(ValueError):  # passed over already
                    self._line.remove((size_bytes, turn))
                self._call()
            raise

    def give(self, size_bytes: int) -> None:
        """The request has ended, and was ``size_bytes`` large."""
        self._taken -= 1
        self._taken_bytes -= size_bytes
        self._call()

    def _fits(self, size_bytes: int) -> bool:
        """One larger than all the bytes goes alone."""
        within = self._taken_bytes + size_bytes <= self._most_bytes or not self._taken
        return self._taken < self.requests and within

    def _count(self, size_bytes: int) -> None:
        self._taken += 1
        self._taken_bytes += size_bytes

    def _call(self) -> None:
        while self._line and self._fits(self._line[0][0]):
            size_bytes, turn = self._line.popleft()
            if not turn.cancelled():
                self._count(size_bytes)
                turn.set_result(None)
