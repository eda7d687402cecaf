"""The body of one request of a session, as its DATA frames come in."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from edge_runtime.contract import limits
from edge_runtime.contract.errors import LimitExceeded, NearfarError, WireError
from edge_runtime.contract.frames import Admit, Data, Progress, Request

__all__ = ["SessionUpload"]


class SessionUpload:
    """Collects pieces, and says when the device is due a PROGRESS frame.

    ``arrived_s``: when the REQUEST frame was seen. ``admit`` and ``report`` send a frame.
    """

    def __init__(
        self,
        request: Request,
        arrived_s: float,
        admit: Callable[[Admit], None],
        report: Callable[[Progress], None],
    ) -> None:
        self.id = request.id
        self.size_bytes = request.size_bytes
        self.withdrawn = False
        self.received_bytes = 0
        self._arrived_s = arrived_s
        self._received_s = arrived_s
        self._admit = admit
        self._report = report
        self._admitted = False
        self._pieces: deque[bytes] = deque()
        self._error: NearfarError | None = None
        self._came = asyncio.Event()
        self._reported_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def complete(self) -> bool:
        """Whether the whole body is here."""
        return self.received_bytes == self.size_bytes

    def arrived(self, max_bytes: int) -> bytes | None:
        """None: what is here must be acknowledged piece by piece."""
        return None

    def feed(self, frame: Data, now_s: float) -> None:
        """One frame came; a wrong one fails the request, not the session."""
        if self._error is not None:
            return
        if frame.offset != self.received_bytes:
            self._error = WireError(
                f"DATA begins at byte {frame.offset}, byte {self.received_bytes} was due: "
                "send the body in order"
            )
        elif self.received_bytes + len(frame.data) > self.size_bytes:
            self._error = LimitExceeded(
                f"the body goes on after the {self.size_bytes} bytes that REQUEST announced"
            )
        else:
            self.received_bytes += len(frame.data)
            self._received_s = now_s
            self._pieces.append(frame.data)
            self._report_if_due(now_s)
        self._came.set()

    async def begin(self) -> None:
        """Admitted: say so, and acknowledge what came meanwhile."""
        self._admitted = True
        self._admit(Admit(id=self.id))
        if self.received_bytes:
            self._report_now(self._received_s)

    async def skip(self) -> None:
        """Admitted, and the body is not needed again."""
        self._admit(Admit(id=self.id, received_bytes=self.size_bytes))

    async def read_piece(self) -> bytes:
        """The next bytes; none at the end. Raises what was wrong with them."""
        while not self._pieces:
            if self._error is not None:
                raise self._error
            if self.complete:
                return b""
            self._came.clear()
            await self._came.wait()
        return self._pieces.popleft()

    def close(self) -> None:
        """It has ended: report nothing any more."""
        self._admitted = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _report_if_due(self, now_s: float) -> None:
        if not self._admitted:
            return
        unreported = self.received_bytes - self._reported_bytes
        if self.complete or unreported >= limits.PROGRESS_EVERY_BYTES:
            self._report_now(now_s)
        elif self._timer is None:  # a device whose window is full waits for this
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(limits.PROGRESS_EVERY_MS / 1e3, self._report_late)

    def _report_late(self) -> None:
        self._timer = None
        self._report_now(self._received_s)

    def _report_now(self, now_s: float) -> None:
        """``now_s``: when the last byte came, which is what the device reckons with."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._reported_bytes = self.received_bytes
        t_us = round((now_s - self._arrived_s) * 1e6)
        self._report(Progress(id=self.id, received_bytes=self.received_bytes, t_us=t_us))
